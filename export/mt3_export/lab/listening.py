"""Clips through the runtime as its users have it: notes, and the tokens that they were made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mt3_runtime.audio import open_audio
from mt3_runtime.decoding import decode_rows
from mt3_runtime.piece import Piece
from mt3_runtime.reading import rows_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from mt3_runtime.arrays import FloatArray, IntArray
    from mt3_runtime.notes import Note
    from mt3_runtime.piece import RowKey
    from mt3_runtime.rows import Row, Status
    from mt3_runtime.transcriber import Transcriber
    from mt3_runtime.transcription import Transcription


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """What one row said: tokens without start and end. A silent segment's rows were not decoded."""

    segment: int
    channel: int
    tokens: IntArray
    status: Status
    fell_back: bool
    is_silent: bool


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """A clip's transcription and rows, in the order of segments and channels."""

    transcription: Transcription
    rows: tuple[Said, ...]


def read_samples(path: Path, rate: int, seconds: float | None) -> FloatArray:
    """Samples [samples] of a file at `rate`, of its first seconds if there is such a limit.

    Raises:
        AudioError: the file cannot be read.
    """
    with open_audio(path, sample_rate=rate) as stream:
        return np.concatenate([np.empty(0, np.float32), *beginning(stream.blocks, rate, seconds)])


def beginning(blocks: Iterable[FloatArray], rate: int, seconds: float | None) -> Iterator[FloatArray]:
    """Blocks [samples] at `rate` of the first seconds, or of all."""
    if seconds is None:
        yield from blocks
        return
    count = round(seconds * rate)
    for block in blocks:
        yield block[:count]
        count -= len(block)
        if count <= 0:
            return


def listen(transcriber: Transcriber, samples: FloatArray) -> Heard:
    """Transcribe samples at the model's rate.

    Raises:
        AudioError: the audio is out of bounds.
    """
    piece = Piece(transcriber)
    rate = transcriber.bundle.manifest.features.sample_rate
    said: list[Said] = []
    notes: list[Note] = []
    silent: set[RowKey] = set()

    def watched() -> Iterator[Row[RowKey] | None]:
        for row in rows_of(piece, samples, rate):
            if row is not None and row.known is not None:
                silent.add(row.key)
            yield row

    for row in decode_rows(transcriber.backend, watched(), transcriber.rules, fallback=transcriber.fallback):
        key = row.key
        said.append(Said(key.segment, key.channel, row.tokens, row.status, row.fell_back, key in silent))
        for segment in piece.take(row):
            notes.extend(segment.notes)
    said.sort(key=lambda each: (each.segment, each.channel))
    return Heard(piece.result(notes), tuple(said))
