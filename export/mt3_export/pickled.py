"""Reads pickles without obeying them: which names they call for, and whether they are built to do harm.

Runs before torch's own restricted reader. That one also knows names that reserve memory by the number they are given,
and reads tuples nested so deep that hashing them overflows the stack, which ends the process.
"""

from __future__ import annotations

import enum
import io
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from mt3_export.state import printable
from mt3_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection

SIZE_LIMIT = 8 * 2**20  # bytes; a training state of the largest network of the family takes a twentieth
DEPTH_LIMIT = 100
_LEGACY_PICKLES = 5  # magic number, version, machine, content, keys of the numbers that follow

_PUSH = frozenset({
    "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "BININT", "BININT1",
    "BININT2", "BINFLOAT", "SHORT_BINSTRING", "LONG1",
})  # fmt: skip
_CALLS = frozenset({"REDUCE", "NEWOBJ"})
_USES = _CALLS | {"BUILD", "APPEND"}
_POP_TO_MARK = frozenset({"APPENDS", "SETITEMS"})
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = frozenset({"PROTO", "STOP"})
_ENCODE = "_codecs.encode"

_REBUILDERS = (
    "tensor", "tensor_v2", "tensor_v3", "parameter", "qtensor", "sparse_tensor", "meta_tensor_no_storage",
)  # fmt: skip
TENSOR_NAMES: frozenset[str] = frozenset({
    "collections.OrderedDict", "torch.nn.parameter.Parameter", "torch.Size", "torch.serialization._get_layout",
    "torch.storage.TypedStorage", "torch.storage.UntypedStorage",
    *(f"torch._utils._rebuild_{name}" for name in _REBUILDERS),
    *(f"torch.{name}" for name in dir(torch) if name.endswith("Storage")),
    *(str(value) for value in vars(torch).values() if isinstance(value, (torch.dtype, torch.qscheme))),
})  # fmt: skip


def check_pickles(data: bytes, allowed: Collection[str], *, legacy: bool) -> None:
    """Raise CheckpointError unless pickles call for nothing but `allowed` names and are of sane size and depth.

    Args:
        data: one pickle, or a torch file from before 1.6, which starts with several.
        allowed: dotted names.
        legacy: which of the two.
    """
    if not legacy and len(data) > SIZE_LIMIT:
        raise _too_large()
    stream = io.BytesIO(data)
    for _ in range(_LEGACY_PICKLES if legacy else 1):
        reader = _Reader(allowed)
        try:
            for opcode, argument, position in pickletools.genops(stream):
                if (position or 0) > SIZE_LIMIT:
                    raise _too_large()
                reader.read(opcode.name, argument)
        except (ValueError, LookupError, TypeError, ArithmeticError, MemoryError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError("is a cut off or damaged torch file: download or copy it again") from error


class _Function(enum.Enum):
    """A function whose arguments matter."""

    ENCODE = enum.auto()
    COPY = enum.auto()


@dataclass(frozen=True, slots=True)
class _Latin1:
    """A text and `latin1`: how pickle writes bytes."""

    length: int


class _Recalled(int):
    """A depth, of a value that was used before or of one or two in a tuple, of which one was."""


class _RecalledText(str):
    """A text that was used before."""

    __slots__ = ()


_Value: TypeAlias = str | int | _Function | _Latin1
_COPIES = ("builtins.set", "collections.OrderedDict", "torch.Size")
_FUNCTIONS = {_ENCODE: _Function.ENCODE, **dict.fromkeys(_COPIES, _Function.COPY)}


class _Reader:
    """A pickle machine that builds nothing: of every value it knows the text, or how deep tuples are nested in it."""

    def __init__(self, allowed: Collection[str]) -> None:
        self.allowed = allowed
        self.stack: list[_Value] = []
        self.marked: list[list[_Value]] = []
        self.memo: dict[int, _Value] = {}
        self.encoded = 0

    def read(self, name: str, argument: object) -> None:
        """Do as an opcode says. The operand stack is torch's: a mark starts a new one."""
        if name in _PUSH:
            self.stack.append(0)
        elif name == "BINUNICODE":
            self.stack.append(str(argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[int(str(argument))] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            value = self.memo[int(str(argument))]
            self.stack.append(_recalled(value))
        elif name in _TUPLES:
            parts = [self.stack.pop() for _ in range(_TUPLES[name])]
            self.stack.append(_tuple(parts[::-1]))
        else:
            self._read_rare(name, argument)

    def _read_rare(self, name: str, argument: object) -> None:
        if name == "MARK":
            self.marked.append(self.stack)
            self.stack = []
        elif name == "TUPLE":
            parts = self._pop_to_mark()
            self.stack.append(_tuple(parts))
        elif name in _USES:
            used = self.stack.pop()
            self._use(name, used)
        elif name == "SETITEM":
            del self.stack[-2:]
        elif name in _POP_TO_MARK:
            self._pop_to_mark()
        elif name == "BINPERSID":
            self.stack[-1] = 0
        elif name not in _NOTHING:
            self._read_name(name, argument)

    def _read_name(self, name: str, argument: object) -> None:
        if name in ("GLOBAL", "INST"):
            self._call_for(*str(argument).split(" ", 1))
        elif name == "STACK_GLOBAL":
            self._call_for(str(self.stack[-2]), str(self.stack[-1]), readable=False)
        else:
            raise _refusal("or is damaged")

    def _use(self, name: str, used: _Value) -> None:
        if name in _CALLS:
            self._check_call(self.stack[-1], used)
            self.stack[-1] = 0
        elif name == "BUILD" and isinstance(used, _Recalled):
            raise _repetition()

    def _check_call(self, function: _Value, arguments: _Value) -> None:
        """A codec may need time and memory beyond all measure, and a copy of one value may be made many times."""
        if function is _Function.ENCODE:
            if not isinstance(arguments, _Latin1):
                raise _refusal(f"({_ENCODE} of anything but bytes)")
            self.encoded += arguments.length
            if self.encoded > SIZE_LIMIT:
                raise _too_large()
        elif function is _Function.COPY and isinstance(arguments, _Recalled):
            raise _repetition()

    def _pop_to_mark(self) -> list[_Value]:
        parts, self.stack = self.stack, self.marked.pop()
        return parts

    def _call_for(self, module: str, name: str, *, readable: bool = True) -> None:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if f"{module}.{name}" not in self.allowed or not readable:
            raise _refusal(f"({printable(f'{module}.{name}', limit=80)})")
        self.stack.append(_FUNCTIONS.get(f"{module}.{name}", 0))


def _tuple(parts: list[_Value]) -> _Value:
    if len(parts) == 2 and isinstance(parts[0], str) and parts[1] == "latin1":
        return _Latin1(len(parts[0]))
    depth = 1 + max((_depth(part) for part in parts), default=0)
    if depth > DEPTH_LIMIT:
        raise CheckpointError(f"nests tuples more than {DEPTH_LIMIT} deep, no checkpoint does: download it again")
    shared = len(parts) <= 2 and any(isinstance(part, (_Recalled, _RecalledText)) for part in parts)
    return _Recalled(depth) if shared else depth


def _recalled(value: _Value) -> _Value:
    if isinstance(value, str):
        return _RecalledText(value)
    return _Recalled(value) if isinstance(value, int) else value


def _depth(value: _Value) -> int:
    return value if isinstance(value, int) else int(isinstance(value, _Latin1))


def _too_large() -> CheckpointError:
    return CheckpointError(f"holds more than {SIZE_LIMIT >> 20} MiB besides its numbers: save only the state dict")


def _repetition() -> CheckpointError:
    return CheckpointError("copies one value many times over, no checkpoint does: save only the state dict")


def _refusal(found: str) -> CheckpointError:
    return CheckpointError(
        f"holds more than tensors {found} and was not opened: save only the state dict, or download it again"
    )
