"""What fp32 said of the clips, kept between processes, and the rows of it that others are told again."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from mt3_export.lab.listening import Said
from mt3_runtime.files import atomic_write
from mt3_runtime.memory import SongMemory
from mt3_runtime.rows import DecodedRow
from mt3_runtime.segments import iter_segments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from mt3_runtime.arrays import FloatArray, IntArray
    from mt3_runtime.manifest import Manifest
    from mt3_runtime.mel import Frontend
    from mt3_runtime.rows import Status

SEED = 8
STATUSES: tuple[Status, ...] = ("ended", "truncated", "failed")


@dataclass(frozen=True, slots=True, eq=False)
class ForcedRow:
    """A row whose tokens are told. `place`: of its segment among `Material.features`.

    `inputs`: int32 [steps], the start token and all that fp32 said but for the last; `memory`: int32 [span].
    """

    clip: int
    place: int
    channel: int
    inputs: IntArray
    memory: IntArray | None


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """Segments [segments, frames, bins], and rows of them, the longest first."""

    features: FloatArray
    rows: tuple[ForcedRow, ...]


def save_rows(path: Path, clips: Sequence[Sequence[Said]]) -> None:
    """Write what every clip's rows said.

    Raises:
        OutputError: the file cannot be written.
    """
    rows = [(clip, said) for clip, listed in enumerate(clips) for said in listed]
    numbers = [
        (
            clip,
            said.segment,
            said.channel,
            STATUSES.index(said.status),
            said.fell_back,
            said.is_silent,
            len(said.tokens),
        )
        for clip, said in rows
    ]
    tokens = np.concatenate([np.empty(0, np.int32), *(said.tokens for _, said in rows)])
    data = BytesIO()
    np.savez(data, numbers=np.array(numbers, np.int64).reshape(-1, 7), tokens=tokens)
    atomic_write(path, data.getvalue())


def read_rows(path: Path, count: int) -> list[list[Said]]:
    """What `save_rows` wrote of `count` clips."""
    clips: list[list[Said]] = [[] for _ in range(count)]
    with np.load(BytesIO(path.read_bytes()), allow_pickle=False) as file:  # numpy leaves damaged files open
        numbers, tokens = file["numbers"], file["tokens"]
    start = 0
    for clip, segment, channel, status, fell_back, silent, length in numbers.tolist():
        own = tokens[start : start + length]
        start += length
        clips[clip].append(Said(segment, channel, own, STATUSES[status], bool(fell_back), bool(silent)))
    return clips


def choose_rows(clips: Sequence[Sequence[Said]], most: int) -> list[tuple[int, Said]]:
    """Of all rows that were decoded to an end or a limit, at most so many, drawn from all of them by a fixed seed."""
    rows = [(clip, said) for clip, listed in enumerate(clips) for said in listed if is_usable(said)]
    if len(rows) <= most:
        return rows
    # Not every n-th: with many channels a row, that would choose some of them always and others never.
    drawn = np.random.default_rng(SEED).choice(len(rows), most, replace=False)
    return [rows[i] for i in sorted(drawn.tolist())]


def is_usable(said: Said) -> bool:
    """Whether it was decoded, and not in vain."""
    return said.status != "failed" and not said.is_silent


def gather(
    manifest: Manifest,
    extractor: Frontend,
    clips: Sequence[Sequence[Said]],
    chosen: Sequence[tuple[int, Said]],
    samples_of: Callable[[int], FloatArray],
) -> Material:
    """Features of the segments of some rows, and what the rows are told; `samples_of` reads a clip's samples."""
    places: dict[tuple[int, int], int] = {}
    features: list[FloatArray] = []
    for clip in dict.fromkeys(clip for clip, _ in chosen):
        wanted = {said.segment for other, said in chosen if other == clip}
        for segment in iter_segments(samples_of(clip), manifest.features, manifest.vocabulary):
            if segment.index in wanted:
                places[clip, segment.index] = len(features)
                features.append(extractor(segment.samples[None], [segment.frames])[0])
    rows = [
        ForcedRow(clip, places[clip, said.segment], said.channel, told, memory)
        for (clip, said), told, memory in zip(
            chosen, _inputs(manifest, chosen), _memories(manifest, clips, chosen), strict=True
        )
    ]
    rows.sort(key=lambda row: -len(row.inputs))
    return Material(np.stack(features) if features else np.empty((0, 0, 0), np.float32), tuple(rows))


def _inputs(manifest: Manifest, chosen: Sequence[tuple[int, Said]]) -> Iterator[IntArray]:
    for _, said in chosen:
        told = np.concatenate([np.array([manifest.model.start_token], np.int32), said.tokens])
        yield told[: len(said.tokens) + (said.status == "ended")]  # the end is foretold too; of a row cut off none is


def _memories(
    manifest: Manifest, clips: Sequence[Sequence[Said]], chosen: Sequence[tuple[int, Said]]
) -> Iterator[IntArray | None]:
    """What each row is told of the segment before it."""
    model = manifest.model
    for clip, said in chosen:
        if model.memory is None:
            yield None
            continue
        memory = SongMemory(model, model.memory)
        before = next((other for other in clips[clip] if other.segment == said.segment - 1), None)
        if said.segment and before:
            row = DecodedRow(None, before.tokens, np.empty(0, np.float32), before.status, 0.0)
            memory.keep(said.segment - 1, row)
        yield memory.ids_for(said.segment if before else 0)
