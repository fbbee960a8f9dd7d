"""The clips that a model is judged by: kinds, lengths and seeds. Needs nothing but numpy and the runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from demo_model.clips import HELD_OUT, make_clip
from demo_model.scores import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from demo_model.clips import Clip

SECONDS = (8.0, 20.0)  # of a held-out clip
ROWS = {
    "one": "one voice",
    "two": "two voices",
    "beat": "one voice, drums",
    "band": "four voices, drums",
    "drums": "drums alone",
}


def held_out_clips(kind: str, count: int, stream: int = HELD_OUT) -> Iterable[Clip]:
    """Clips of one kind whose seeds no training ever uses."""
    order = tuple(KINDS).index(kind)
    return (make_clip(KINDS[kind], SECONDS, (stream, order, index)) for index in range(count))
