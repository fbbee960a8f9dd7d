"""Reads audio that is there to be read: files, and samples in memory."""

from __future__ import annotations

import os
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING

from mt3_runtime.audio import open_audio, prepare_audio
from mt3_runtime.devices import encode_group
from mt3_runtime.errors import Mt3Error, OptionError
from mt3_runtime.segments import iter_segments, segment_count, stream_segments

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from mt3_runtime.arrays import FloatArray
    from mt3_runtime.piece import Piece, RowKey
    from mt3_runtime.rows import Row
    from mt3_runtime.segments import Segment
    from mt3_runtime.transcriber import Source


def rows_of(
    piece: Piece, audio: Source, sample_rate: int | None, *, patient: bool = False
) -> Generator[Row[RowKey] | None, None, None]:
    """Read, cut and encode a whole piece of audio, one group of segments ahead of what is taken.

    None where the next row waits for one that is being decoded. An error is raised at once, or, if `patient`, when all
    segments before it are decoded.

    Raises:
        AudioError: the audio cannot be read or is out of bounds.
        OptionError: samples without a rate, or a file with one.
    """
    size = encode_group(piece.manifest, piece.device)
    with closing(_segments(piece, audio, sample_rate)) as cut:
        segments = piece.clock.each("read", cut)
        error = None
        while error is None:
            group, error = _group(segments, size)
            if not group or (error and not patient):
                break
            piece.add(group)
            while piece.has_rows:
                yield piece.next_row()
        while error and patient and piece.backlog:
            yield None
        if error:
            raise error


def _group(segments: Iterator[Segment], size: int) -> tuple[list[Segment], Mt3Error | None]:
    """The next segments, and what is wrong behind them."""
    group: list[Segment] = []
    try:
        group.extend(islice(segments, size))
    except Mt3Error as error:
        return group, error
    return group, None


def _segments(piece: Piece, audio: Source, sample_rate: int | None) -> Generator[Segment, None, None]:
    features, vocabulary = piece.manifest.features, piece.manifest.vocabulary
    if isinstance(audio, str | os.PathLike):
        if sample_rate is not None:
            raise OptionError("a sample rate was given for a file, which has its own: leave sample_rate out")
        with open_audio(audio, sample_rate=features.sample_rate) as stream:
            piece.expected = segment_count(stream.expected, features)
            yield from stream_segments(_measured(piece, stream.blocks), features, vocabulary)
    else:
        if sample_rate is None:
            raise OptionError("samples were given without their rate: pass sample_rate in Hz")
        samples = prepare_audio(audio, sample_rate, sample_rate=features.sample_rate)
        piece.samples, piece.expected = len(samples), segment_count(len(samples), features)
        yield from iter_segments(samples, features, vocabulary)


def _measured(piece: Piece, blocks: Iterable[FloatArray]) -> Iterator[FloatArray]:
    for block in blocks:
        piece.samples += len(block)
        yield block
