"""Audio that comes while it is played: any number of streams, through one scheduler."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from mt3_runtime.audio import MonoStream, as_blocks, check_bounds, check_rate, to_float
from mt3_runtime.decoding import RowDecoder
from mt3_runtime.errors import AudioError, OptionError, SampleError
from mt3_runtime.piece import Piece
from mt3_runtime.segments import SegmentCutter

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from mt3_runtime.arrays import FloatArray
    from mt3_runtime.decoding import Row
    from mt3_runtime.piece import RowKey
    from mt3_runtime.transcriber import Transcriber
    from mt3_runtime.transcription import SegmentNotes

Key = TypeVar("Key", bound="Hashable")


@dataclass(slots=True, eq=False)
class _Stream(Generic[Key]):
    key: Key
    name: str
    rate: int
    piece: Piece
    mono: MonoStream
    cutter: SegmentCutter
    channels: int | None = None  # known with the first block
    has_ended: bool = False

    def cut(self, samples: FloatArray) -> None:
        """Take samples [samples] at the model's rate."""
        self.piece.samples += len(samples)
        self.piece.add(self.cutter.cut(samples))


def _mixed(mono: MonoStream, array: NDArray[np.generic]) -> list[FloatArray]:
    blocks: list[FloatArray] = []
    try:
        blocks.extend(map(mono.mix, to_float(array)))
    except SampleError as error:
        error.usable += sum(map(len, blocks))
        raise
    return blocks


class LiveStreams(Generic[Key]):
    """Streams by name, each decoded as `Transcriber.transcribe` would decode all of it; see `Transcriber.live`.

    Whoever owns this feeds blocks as they come, and calls `advance` as long as there is something to decode. A segment
    is decoded as soon as its last sample has come, beside those of the other streams; no notes are kept here.
    Audio that comes faster than it is decoded is kept: watch `backlog`.

    All of it belongs to the thread that made it. After an exception out of `advance` the streams are lost.

    Raises:
        OptionError: from every method, in another thread, after the block of `live`, or after `advance` has failed.
    """

    def __init__(self, transcriber: Transcriber) -> None:
        self._transcriber = transcriber
        self._streams: dict[Key, _Stream[Key]] = {}  # until their last segment was given
        self._pieces: dict[int, _Stream[Key]] = {}  # the same by the number of the piece, in turn
        self._opened, self._thread, self._closed = 0, threading.get_ident(), ""
        self._decoder = RowDecoder(
            transcriber.backend,
            iter(self._next_row, ...),  # without end
            transcriber.rules,
            wanted=lambda key: key.piece in self._pieces,
            fallback=transcriber.fallback,
        )

    @property
    def is_idle(self) -> bool:
        """Whether `advance` has nothing to do until more audio comes."""
        return self._decoder.is_idle and not any(stream.piece.has_rows for stream in self._pieces.values())

    def close(self) -> None:
        """Forget all streams; nothing can be done with this any more."""
        self._close("the block of live() has ended: begin another one")

    def open(self, key: Key, sample_rate: int) -> None:
        """Begin a stream of blocks at `sample_rate` Hz.

        Raises:
            AudioError: the rate is out of bounds.
            OptionError: a stream of that name is open, or its last segment was not given yet.
        """
        self._check()
        name = "the stream" if key is None else f"stream {key!r:.100}"
        if key in self._streams:
            raise OptionError(f"{name} is open already: take its last segment, drop it, or choose another name")
        rate = check_rate(sample_rate, name)
        check_bounds(name, 1, rate, 0)
        features, vocabulary = (getattr(self._transcriber.bundle.manifest, part) for part in ("features", "vocabulary"))
        mono, cutter = MonoStream(name, rate, features.sample_rate), SegmentCutter(features, vocabulary)
        stream = _Stream(key, name, rate, Piece(self._transcriber, number=self._opened, record=False), mono, cutter)
        self._streams[key] = self._pieces[self._opened] = stream
        self._opened += 1

    def feed(self, key: Key, samples: ArrayLike) -> None:
        """Take the next block [samples] or [samples, channels] of a stream, of any length and type (`prepare_audio`).

        Raises:
            AudioError: the block cannot be used; the stream is then as it was before.
            SampleError: as before, and its first `usable` samples can be fed.
            OptionError: no stream of that name is open.
        """
        stream = self._stream(key, taking=True)
        array = as_blocks(samples, stream.name)
        if not len(array):
            return
        channels = array.shape[1]
        check_bounds(stream.name, channels, stream.rate, 0)
        if stream.channels not in (None, channels):
            raise AudioError(f"{stream.name} has {channels} channels after {stream.channels}: keep their number")
        blocks = _mixed(stream.mono, array)  # all of it can be used, or none is taken
        stream.channels = channels
        for block in blocks:
            stream.cut(stream.mono.take(block))

    def end(self, key: Key) -> None:
        """Say that a stream has no more blocks: what is left of it comes from the next calls of `advance`.

        Raises:
            AudioError: it was too short to be transcribed; it is dropped.
            OptionError: no stream of that name is open.
        """
        stream = self._stream(key, taking=True)
        stream.has_ended = True
        try:
            rest = stream.mono.end()
        except AudioError:
            self._forget(stream)
            raise
        stream.cut(rest)
        stream.piece.add(stream.cutter.end())

    def drop(self, key: Key) -> None:
        """Forget a stream at once; what was not decoded yet gives no notes.

        Raises:
            OptionError: no stream of that name is open.
        """
        self._forget(self._stream(key))

    def backlog(self, key: Key) -> int:
        """Segments of a stream that have come and whose notes were not given yet.

        Raises:
            OptionError: no stream of that name is open.
        """
        return self._stream(key).piece.backlog

    def advance(self) -> list[tuple[Key, SegmentNotes]]:
        """Encode what is due, and decode one token of every row: the segments that are complete now, by stream.

        On a device it is not one token but as many as a launch takes, and what was launched before is read.
        Those of one stream come in order of time; the last one of a stream that was ended says so.
        """
        self._check()
        complete: list[tuple[Key, SegmentNotes]] = []
        try:
            for row in self._decoder.advance():
                stream = self._pieces[row.key.piece]
                complete += [(stream.key, segment) for segment in stream.piece.take(row)]
                if stream.piece.is_finished:
                    self._forget(stream)
        except BaseException as error:
            # Rows may be half in their slots: nothing that came of them could be relied on.
            self._close(f"the streams were lost to an error ({error!r:.100}): begin another live()")
            raise
        return complete

    def drain(self) -> Iterator[tuple[Key, SegmentNotes]]:
        """Call `advance` until there is nothing to do: the segments as they are complete, by stream."""
        while not self.is_idle:
            yield from self.advance()

    def _check(self) -> None:
        if self._closed:
            raise OptionError(self._closed)
        if self._thread != threading.get_ident():
            raise OptionError("these streams belong to another thread: hand it the blocks through a queue")

    def _close(self, reason: str) -> None:
        self._closed = self._closed or reason
        self._streams.clear()
        self._pieces.clear()
        self._decoder.is_idle = True

    def _forget(self, stream: _Stream[Key]) -> None:
        del self._streams[stream.key], self._pieces[stream.piece.number]

    def _stream(self, key: Key, *, taking: bool = False) -> _Stream[Key]:
        self._check()
        if key not in self._streams:
            raise OptionError(f"no stream {key!r:.100} is open: open it first")
        stream = self._streams[key]
        if taking and stream.has_ended:
            raise OptionError(f"{stream.name} has ended: take its last segment, then open it again")
        return stream

    def _next_row(self) -> Row[RowKey] | None:
        """A row that is ready, one of each stream in turn, so that a long block of one keeps nobody waiting."""
        for number in list(self._pieces):
            row = self._pieces[number].piece.next_row()
            if row is not None:
                self._pieces[number] = self._pieces.pop(number)
                return row
        return None
