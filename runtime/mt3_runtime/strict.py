"""JSON to frozen dataclasses, refusing whatever was not asked for: unknown, missing, repeated or mistyped keys."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections import Counter
from functools import cache
from typing import Any, Literal, TypeVar

from mt3_runtime.errors import BundleError

T = TypeVar("T")

INT_LIMIT = 2**63


def parse_json(text: bytes, where: str) -> Any:
    """Parse JSON without repeated keys and without NaN or Infinity.

    Raises:
        BundleError: `text` is not such JSON; the message starts with `where`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise BundleError(f"{where}: key {key!r:.80} stands twice: export the bundle again")
        return data

    def refuse(constant: str) -> None:
        raise BundleError(f"{where}: {constant} is not JSON: export the bundle again")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except BundleError:
        raise
    except (ValueError, RecursionError) as error:  # not only the decoder's own: int() refuses thousands of digits
        raise BundleError(f"{where} is not valid JSON ({error}): export or copy the bundle again") from None


def build(kind: type[T], data: Any, where: str) -> T:
    """Make a `kind` (a dataclass, or any type hint made of such) from parsed JSON.

    Raises:
        BundleError: `data` does not fit; the message names the place.
    """
    return typing.cast("T", _build(kind, data, where))


def _build(hint: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(typing.cast("type", hint), data, where)
    if origin is tuple:
        _expect(isinstance(data, list), where, "a list")
        return tuple(_build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict:
        _expect(isinstance(data, dict), where, "an object")
        return {
            _build_scalar(str, key, f"a key of {where}"): _build(arguments[1], value, f"{where}[{key!r:.80}]")
            for key, value in data.items()
        }
    if origin is Literal:
        _expect(isinstance(data, str) and data in arguments, where, f"one of {arguments}")
        return data
    if origin is types.UnionType:
        return _build_union(arguments, data, where)
    if hint is float:
        _expect(type(data) is float and math.isfinite(data), where, "a finite number with a decimal point")
        return data
    return _build_scalar(hint, data, where)


def _build_scalar(hint: type, data: Any, where: str) -> Any:
    _expect(type(data) is hint, where, f"of type {hint.__name__}")
    if hint is int:
        _expect(-INT_LIMIT <= data < INT_LIMIT, where, "an integer of 64 bits")
    if hint is str:  # texts are shown to people: no line breaks, no terminal controls
        _expect(data.isprintable(), where, "printable text of one line")
    return data


def _build_union(choices: tuple[Any, ...], data: Any, where: str) -> Any:
    for choice in choices:
        if type(data) is choice:
            return _build_scalar(choice, data, where)
        if dataclasses.is_dataclass(choice) and isinstance(data, dict):
            return _build_dataclass(typing.cast("type", choice), data, where)
    names = " or ".join(choice.__name__ for choice in choices)
    raise BundleError(f"{where} is of type {type(data).__name__}, not {names}: export the bundle again")


def _build_dataclass(kind: type, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, "an object")
    names = [field.name for field in dataclasses.fields(kind)]
    unknown, missing = sorted(set(data) - set(names)), [name for name in names if name not in data]
    if unknown or missing:
        problem = f"unknown key {unknown[0]!r:.80}" if unknown else f"no key {missing[0]!r}"
        raise BundleError(f"{where}: {problem}: use a bundle made by this version of mt3-export")
    hints = _hints(kind)
    return kind(**{name: _build(hints[name], data[name], f"{where}.{name}") for name in names})


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _expect(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise BundleError(f"{where} is not {what}: export the bundle again")
