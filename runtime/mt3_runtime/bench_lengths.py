"""Times rows that end at forced lengths, to show that the cost of decoding follows the rows that are alive."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from mt3_runtime.decoding import decode_rows
from mt3_runtime.errors import OptionError
from mt3_runtime.memory import first_ids
from mt3_runtime.rows import DecodingRules, Row
from mt3_runtime.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_runtime.arrays import IntArray, RowStates
    from mt3_runtime.backends import Backend
    from mt3_runtime.specs import ModelSpec

LONG = 0.5  # of the longest length: rows from here on count as long ones


def parse_lengths(text: str) -> tuple[int, ...]:
    """Lengths from "32,32,2", or from a file that holds such a list, also over several lines.

    Raises:
        OptionError: neither a list of whole numbers from 1 nor a file of them.
    """
    listed = text
    if not _numbers(text) and "," not in text:
        try:
            listed = Path(text).read_text("utf-8")
        except (OSError, UnicodeError, ValueError) as error:
            raise OptionError(
                f"--lengths {text!r} is no list and no file: give a list such as 32,32,2, or a file"
            ) from error
    lengths = _numbers(listed)
    if not lengths:
        raise OptionError(f"--lengths {text!r} holds something else than whole numbers from 1: give such as 32,32,2")
    return lengths


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.replace(",", " ").split()
    whole = all(part.isascii() and part.isdecimal() and len(part) < 10 and int(part) > 0 for part in parts)
    return tuple(map(int, parts)) if whole else ()


def bench_lengths(
    backend: Backend, states: Sequence[Any], model: ModelSpec, lengths: Sequence[int], repeat: int
) -> dict[str, Any]:
    """Decode all rows with the lengths given, the long rows among them alone, and all rows at the longest length.

    Args:
        backend: computes.
        states: what the backend's `encode` gave for every row.
        model: what every row begins with.
        lengths: steps of each row, repeated as often as needed.
        repeat: rounds over the three, after one that is not counted; medians are reported.

    Returns:
        By name: `rows`, `row_steps` (tokens in all), `admit_s` (cross-KV of all rows), `decode_s` (all the rest);
        and `ratio`, the decode time with the lengths given over that of the long rows alone.

    Raises:
        OptionError: a length is more than the cache has positions.
    """
    longest = max(lengths)
    if longest > backend.length:
        raise OptionError(f"{longest} steps are more than the model's {backend.length}: give smaller --lengths")
    memory = first_ids(model)
    given = [
        Row(index, own, limit, memory) for index, (own, limit) in enumerate(zip(states, cycle(lengths), strict=False))
    ]
    runs = {
        "given": given,
        "long_alone": [row for row in given if _length(row) >= LONG * longest],
        "all_long": [replace(row, limit=longest) for row in given],
    }
    rules = DecodingRules(model.start_token, None, longest)
    rounds = [{name: _timed(backend, rows, rules) for name, rows in runs.items()} for _ in range(repeat + 1)][1:]
    result: dict[str, Any] = {
        name: {
            "rows": len(rows),
            "row_steps": sum(map(_length, rows)),
            **{f"{stage}_s": median(each[name][stage] for each in rounds) for stage in ("admit", "decode")},
        }
        for name, rows in runs.items()
    }
    ratios = [each["given"]["decode"] / each["long_alone"]["decode"] for each in rounds]
    return {**result, "lengths": list(islice(cycle(lengths), len(states))), "ratio": median(ratios)}


def to_lines(result: dict[str, Any]) -> list[str]:
    """The figures for a person."""
    names = {"given": "as given", "long_alone": "long rows alone", "all_long": "all rows long"}
    lines = [
        f"{text:<15} {run['rows']:4d} rows, {run['row_steps']:6d} row-steps: decode {run['decode_s']:.3f} s, "
        f"admission {run['admit_s']:.3f} s"
        for text, run in ((text, result[name]) for name, text in names.items())
    ]
    return [*lines, f"decode time {result['ratio']:.2f} times that of the long rows alone"]


def _length(row: Row[int]) -> int:
    return row.limit or 0


class _Timed:
    """A backend whose admissions are timed apart; on a device, where they take place later, as far as calls take."""

    def __init__(self, backend: Backend, clock: Stopwatch) -> None:
        self._backend, self._clock = backend, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def admit(self, first: int, states: RowStates, memory: IntArray | None = None) -> None:
        with self._clock.stage("admit"):
            self._backend.admit(first, states, memory)


def _timed(backend: Backend, rows: Sequence[Row[int]], rules: DecodingRules) -> dict[str, float]:
    clock = Stopwatch()
    for _ in clock.each("decode", decode_rows(cast("Backend", _Timed(backend, clock)), rows, rules)):
        pass
    return clock.seconds
