"""Audio that comes while it is played: any number of streams, through one scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from mt3_runtime.audio import MonoStream, as_blocks, check_bounds, check_rate, to_float
from mt3_runtime.decoding import RowDecoder
from mt3_runtime.errors import AudioError, OptionError
from mt3_runtime.piece import Piece
from mt3_runtime.segments import SegmentCutter

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from numpy.typing import ArrayLike

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
    channels: int | None = field(default=None)  # known with the first block


class LiveStreams(Generic[Key]):
    """Streams by name, each decoded as `Transcriber.transcribe` would decode all of it; see `Transcriber.live`.

    Whoever owns this feeds blocks as they come, and calls `advance` as long as there is something to decode. A segment
    is decoded as soon as its last sample has come, beside those of the other streams; no notes are kept here.
    Use it in one thread.
    """

    def __init__(self, transcriber: Transcriber) -> None:
        self._transcriber = transcriber
        self._streams: dict[Key, _Stream[Key]] = {}  # that take blocks
        self._pieces: dict[int, _Stream[Key]] = {}  # that are not decoded to their end, in turn
        self._opened = 0
        self._decoder = RowDecoder(
            transcriber.backend, self._rows(), transcriber.rules, wanted=lambda key: key.piece in self._pieces
        )

    @property
    def is_idle(self) -> bool:
        """Whether `advance` has nothing to do until more audio comes."""
        return self._decoder.is_idle and not any(stream.piece.has_rows for stream in self._pieces.values())

    def open(self, key: Key, sample_rate: int) -> None:
        """Begin a stream of blocks at `sample_rate` Hz.

        Raises:
            AudioError: the rate is out of bounds.
            OptionError: a stream of that name is open.
        """
        if key in self._streams:
            raise OptionError(f"stream {key!r:.100} is open already: end it, or choose another name")
        name = f"stream {key!r:.100}"
        rate = check_rate(sample_rate, name)
        check_bounds(name, 1, rate, 0)
        features, vocabulary = (getattr(self._transcriber.bundle.manifest, part) for part in ("features", "vocabulary"))
        mono, cutter = MonoStream(name, rate, features.sample_rate), SegmentCutter(features, vocabulary)
        stream = _Stream(key, name, rate, Piece(self._transcriber, number=self._opened), mono, cutter)
        self._streams[key] = self._pieces[self._opened] = stream
        self._opened += 1

    def feed(self, key: Key, samples: ArrayLike) -> None:
        """Take the next block [samples] or [samples, channels] of a stream, of any length and type (`prepare_audio`).

        Raises:
            AudioError: the block cannot be used; the stream is then as it was before.
            OptionError: no stream of that name is open.
        """
        stream = self._stream(key)
        array = as_blocks(samples, stream.name)
        channels = array.shape[1]
        check_bounds(stream.name, channels, stream.rate, 0)
        if stream.channels not in (None, channels):
            raise AudioError(f"{stream.name} has {channels} channels after {stream.channels}: keep their number")
        blocks = [stream.mono.mix(block) for block in to_float(array)]  # all of it can be used, or none is taken
        stream.channels = channels
        for block in blocks:
            taken = stream.mono.take(block)
            stream.piece.samples += len(taken)
            stream.piece.add(stream.cutter.cut(taken))

    def end(self, key: Key) -> None:
        """Say that a stream has no more blocks; what is left of it is decoded, and its name is free.

        Raises:
            AudioError: it was too short to be transcribed; it is dropped.
            OptionError: no stream of that name is open.
        """
        stream = self._stream(key)
        del self._streams[key]
        try:
            taken = stream.mono.end()
        except AudioError:
            del self._pieces[stream.piece.number]
            raise
        stream.piece.samples += len(taken)
        stream.piece.add(stream.cutter.cut(taken))
        stream.piece.add(stream.cutter.end())

    def drop(self, key: Key) -> None:
        """Forget a stream at once; what was not decoded yet gives no notes.

        Raises:
            OptionError: no stream of that name is open.
        """
        stream = self._stream(key)
        del self._streams[key], self._pieces[stream.piece.number]

    def advance(self) -> list[tuple[Key, SegmentNotes]]:
        """Encode what is due, and decode one token of every row: the segments that are complete now, by stream.

        Those of one stream come in order of time; the last one of a stream that was ended says so.
        """
        complete = []
        for row in self._decoder.advance():
            stream = self._pieces[row.key.piece]
            complete += [(stream.key, segment) for segment in stream.piece.take(row)]
            if stream.piece.is_finished:
                del self._pieces[row.key.piece]
        return complete

    def _stream(self, key: Key) -> _Stream[Key]:
        if key not in self._streams:
            raise OptionError(f"no stream {key!r:.100} is open: open it first")
        return self._streams[key]

    def _rows(self) -> Iterator[Row[RowKey] | None]:
        """Rows that are ready, one of each stream in turn, so that a long block of one keeps nobody waiting."""
        while True:
            yield next(filter(None, map(self._next_of, list(self._pieces))), None)

    def _next_of(self, number: int) -> Row[RowKey] | None:
        row = self._pieces[number].piece.next_row()
        if row is not None:
            self._pieces[number] = self._pieces.pop(number)
        return row
