"""What is decoded: rows, the rules they are decoded by, and what became of them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from mt3_runtime.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mt3_runtime.arrays import FloatArray, IntArray
    from mt3_runtime.backends import Backend

Key = TypeVar("Key", bound=Hashable)
Status = Literal["ended", "truncated", "failed"]


@dataclass(frozen=True, slots=True, eq=False)
class Row(Generic[Key]):
    """A sequence to decode: who it is, and its encoder states, as the backend's `encode` gave them.

    The states are kept until the row ends: give an array of its own, not a view that keeps a whole group alive.
    `limit` stops this row earlier than `DecodingRules.max_tokens` does. `memory`: what the row is told of the segment
    before it, int32 [span], for models that have one; of all rows or of none.
    `encode` gives the row's states from another backend, for a second attempt there.
    `known`: what the row says, int32 [length] without start and end token, where that is known beforehand: it takes no
    slot, and no backend hears of it.
    """

    key: Key
    states: Any
    limit: int | None = None
    memory: IntArray | None = None
    encode: Callable[[Backend], Any] | None = None
    known: IntArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class DecodedRow(Generic[Key]):
    """What became of a row.

    `tokens` without start and end token, `log_probs` one for each. "truncated": the end token never came and every
    token is kept. "failed": logits were not finite twice; the tokens before that are kept.
    `seconds`: this row's share of the time, which is the time of every call divided by the rows that it served. The
    shares of all rows add up to the whole time, and that of rows decoded together can be told apart.
    `fell_back`: the tokens are those of a second attempt on another backend.
    """

    key: Key
    tokens: IntArray
    log_probs: FloatArray
    status: Status
    seconds: float
    fell_back: bool = False


@dataclass(frozen=True, slots=True)
class DecodingRules:
    """How a sequence starts and ends. Without `end_token` every row takes `max_tokens` steps.

    Without `first_may_end` an end token in the first place is a token like any other (YourMT3 `t5mod_helper.py`).

    Raises:
        OptionError: `max_tokens` is not positive.
    """

    start_token: int
    end_token: int | None
    max_tokens: int
    first_may_end: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise OptionError(f"{self.max_tokens} tokens a row decode nothing: ask for 1 or more")
