"""Many pieces of audio through one scheduler: every slot is busy as long as any piece has rows."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import closing
from typing import TYPE_CHECKING

from mt3_runtime.decoding import decode_rows
from mt3_runtime.errors import DeviceError, Mt3Error, OptionError
from mt3_runtime.piece import Piece
from mt3_runtime.reading import rows_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from numpy.typing import ArrayLike

    from mt3_runtime.notes import Note
    from mt3_runtime.piece import RowKey
    from mt3_runtime.rows import DecodedRow, Row
    from mt3_runtime.transcriber import ManyProgress, Source, Transcriber
    from mt3_runtime.transcription import Transcription

    Item = str | os.PathLike[str] | tuple[ArrayLike, int]
    Outcome = tuple[int, Transcription | Mt3Error]


class ManyPieces:
    """The pieces under way: those with rows in slots, and those that are being read."""

    def __init__(self, transcriber: Transcriber, sources: Iterable[Item], progress: ManyProgress | None) -> None:
        if isinstance(sources, str | bytes | os.PathLike) or not isinstance(sources, Iterable):
            raise OptionError(f"{sources!r:.100} is no list of sources: give a list of them, or use transcribe")
        self._transcriber, self._sources, self._progress = transcriber, sources, progress
        self._pieces: dict[int, Piece] = {}
        self._notes: dict[int, list[list[Note]]] = {}  # of each segment that is done
        self._reading: dict[int, Generator[Row[RowKey] | None, None, None]] = {}
        self._failed: list[Outcome] = []

    def results(self) -> Iterator[Outcome]:
        """Index and result, or error, of every source, in the order in which they are finished."""
        busy = self._transcriber
        with closing(self._rows()) as rows:
            for row in decode_rows(
                busy.backend, rows, busy.rules, wanted=lambda key: key.piece in self._pieces, fallback=busy.fallback
            ):
                yield from self._failures()
                yield from self._take(row)
        yield from self._failures()

    def _rows(self) -> Generator[Row[RowKey] | None, None, None]:
        """Rows of the first piece that has one ready; the next source is opened when none has.

        That is one file at a time, or one for every slot where segments wait for those before them.
        """
        sources = enumerate(self._sources)
        try:
            while True:
                row = self._ready_row()
                if row is None and len(self._reading) < self._transcriber.backend.slots and self._open_next(sources):
                    continue
                if row is None and not self._reading:
                    return
                yield row
        finally:
            for rows in self._reading.values():
                rows.close()

    def _ready_row(self) -> Row[RowKey] | None:
        for number, rows in list(self._reading.items()):
            try:
                row = next(rows)
            except StopIteration:
                del self._reading[number]
            except DeviceError:
                raise  # it is no fault of the source, and no other source would fare better
            except Mt3Error as error:
                del self._reading[number]
                self._fail(number, error)
            else:
                if row is not None:
                    return row
        return None

    def _open_next(self, sources: Iterator[tuple[int, Item]]) -> bool:
        for number, source in sources:
            try:
                audio, rate = _audio_and_rate(source)
            except Mt3Error as error:
                self._fail(number, error)
                continue
            piece = Piece(self._transcriber, number=number)
            self._pieces[number], self._notes[number] = piece, []
            self._reading[number] = rows_of(piece, audio, rate)
            return True
        return False

    def _fail(self, number: int, error: Mt3Error) -> None:
        self._forget(number)
        self._failed.append((number, error))

    def _failures(self) -> Iterator[Outcome]:
        while self._failed:
            yield self._failed.pop(0)

    def _take(self, row: DecodedRow[RowKey]) -> Iterator[Outcome]:
        number = row.key.piece
        piece, notes = self._pieces[number], self._notes[number]
        for segment in piece.take(row):
            notes.append(list(segment.notes))
            if self._progress:
                self._progress(number, len(notes), segment.count)
        if piece.is_finished:
            self._forget(number)
            yield number, piece.result([note for some in notes for note in some])

    def _forget(self, number: int) -> None:
        self._pieces.pop(number, None)
        self._notes.pop(number, None)


def _audio_and_rate(source: Item) -> tuple[Source, int | None]:
    if isinstance(source, str | os.PathLike):
        return source, None
    if not isinstance(source, tuple) or len(source) != 2:
        raise OptionError("a source is neither a path nor a pair: give paths, or pairs of samples and their rate in Hz")
    return source
