"""The three designs of MR-MT3: how each tells a segment of the one before it, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from mt3_runtime.specs import MemorySpec, VocabularySpec
from mt3_runtime.vocabulary import END_TOKEN, PAD_TOKEN, Event, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_LENGTH = 64  # vectors; of the authors' classes
_TIE = Vocabulary(VocabularySpec()).encode(Event("tie", 0))


@dataclass(frozen=True, slots=True)
class Variant:
    """`injection` and `first_tokens` as in `MemorySpec`."""

    injection: Literal["context", "prefix"]
    first_tokens: tuple[int, ...]


# T5SegMemV2WithPrev, T5SegMemV2 and T5SegMem of gudgud96/MR-MT3, `models/t5_segmem*.py`.
VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "mr-mt3": Variant("context", (_TIE, END_TOKEN)),
        "mr-mt3-v2": Variant("context", (END_TOKEN,)),
        "mr-mt3-v1": Variant("prefix", (END_TOKEN,)),
    }
)


def memory_of(model: str, length: int, span: int) -> MemorySpec | None:
    """The memory of a design; None where it is 0 vectors long, because segments then know nothing of each other."""
    variant = VARIANTS[model]
    return MemorySpec(variant.injection, length, span, PAD_TOKEN, variant.first_tokens) if length else None


def models_of(memory: MemorySpec) -> tuple[str, ...]:
    """The designs that have such a memory; all of them where none fits."""
    fitting = [name for name in VARIANTS if memory_of(name, memory.length, memory.span) == memory]
    return tuple(fitting or VARIANTS)
