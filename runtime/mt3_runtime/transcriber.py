"""Audio in, notes out: composes reading, features, encoding, decoding and the notes of a family."""

from __future__ import annotations

import threading
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mt3_runtime.decoding import decode_rows
from mt3_runtime.errors import AudioError, OptionError, SampleError
from mt3_runtime.families import NoteState, check_options, decoding_rules, midi_style, new_note_state
from mt3_runtime.features import feature_extractor
from mt3_runtime.live import LiveStreams
from mt3_runtime.many import ManyPieces
from mt3_runtime.piece import Piece
from mt3_runtime.reading import rows_of
from mt3_runtime.silence import OFF
from mt3_runtime.vocabulary import Vocabulary

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Generator, Iterable, Iterator

    from numpy.typing import ArrayLike

    from mt3_runtime.backends import Backend
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.errors import Mt3Error
    from mt3_runtime.many import Item
    from mt3_runtime.notes import Note
    from mt3_runtime.piece import RowKey
    from mt3_runtime.rows import Row
    from mt3_runtime.silence import SilenceRule
    from mt3_runtime.transcription import SegmentNotes, Transcription

    Source = str | os.PathLike[str] | ArrayLike
    Progress = Callable[[int, int], None]
    ManyProgress = Callable[[int, int, int], None]


class Transcriber:
    """A loaded model. One transcription runs at a time; other threads wait for their turn.

    Args:
        bundle: the model.
        backend: what runs it.
        name: of the bundle, for the provenance.
        strict_upstream: make the notes that the authors' code makes, where it loses some too (YourMT3).
        fine_programs: write every instrument to MIDI, not the classes that the authors merge them to (YourMT3).
        silence: which segments are not decoded, as there is nothing to hear in them.
        fallback: gives the backend for second attempts in fp32 (see `decode_rows`); the same one at every call.
        device_reason: why the backend is this one, for the provenance.
        notices: what every transcription has to tell of the backend, one line each.

    Raises:
        OptionError: an option of YourMT3 for another model.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        name: str,
        strict_upstream: bool = False,
        fine_programs: bool = False,
        silence: SilenceRule = OFF,
        fallback: Callable[[], Backend] | None = None,
        device_reason: str = "",
        notices: tuple[str, ...] = (),
    ) -> None:
        manifest = bundle.manifest
        check_options(manifest.model, strict_upstream=strict_upstream, fine_programs=fine_programs)
        self.bundle, self.backend, self.name = bundle, backend, name
        self.fallback, self.device_reason, self.notices = fallback, device_reason, notices
        self.extractor = feature_extractor(manifest.features)
        self.vocabulary = Vocabulary(manifest.vocabulary)
        self.rules = decoding_rules(manifest.model)
        self.strict_upstream, self.silence = strict_upstream, silence
        self.midi_style = midi_style(manifest.model, fine_programs=fine_programs)
        self._lock, self._owner = threading.Lock(), 0

    def transcribe(
        self, audio: Source, sample_rate: int | None = None, *, progress: Progress | None = None
    ) -> Transcription:
        """Transcribe a file, or samples. A file is read as it is needed, so that its length costs no memory.

        Args:
            audio: path of a sound file, or samples [samples] or [samples, channels].
            sample_rate: of the samples in Hz; not given for a file.
            progress: called after every segment with the segments done and their number (see `SegmentNotes`).

        Raises:
            AudioError: the audio cannot be read or is out of bounds.
            OptionError: samples without a rate, or a file with one.
        """
        with self._turn():
            piece = Piece(self)
            notes: list[Note] = []
            for done, segment in enumerate(self._segments(rows_of(piece, audio, sample_rate), piece), start=1):
                notes.extend(segment.notes)
                if progress:
                    progress(done, segment.count)
            return piece.result(notes)

    def iter_segments(self, audio: Source, sample_rate: int | None = None) -> Generator[SegmentNotes, None, None]:
        """Transcribe as `transcribe` does, and yield the notes segment by segment as they are complete.

        Until the iterator is used up or closed, this transcriber is busy; keep the iterator in one thread.
        What is wrong in the middle of a file is raised when the reading comes to it, after the segments before it.
        """
        with self._turn():
            piece = Piece(self)
            yield from self._segments(rows_of(piece, audio, sample_rate, patient=True), piece)

    def transcribe_many(
        self, sources: Iterable[Item], *, progress: ManyProgress | None = None
    ) -> Generator[tuple[int, Transcription | Mt3Error], None, None]:
        """Transcribe files side by side: rows of the next file take the slots that the last rows of one leave free.

        Each result is that of `transcribe`. A source that fails gives its error, and the others are done.
        Until the iterator is used up or closed, this transcriber is busy.

        Args:
            sources: paths of sound files, or pairs of samples and their rate in Hz. They are taken one by one as
                slots become free, and no more than one file is open at a time; of a model with memory, whose segments
                wait for each other, as many as there are slots.
            progress: called after every segment with the index of its source, and the segments of that source that
                are done, and their number.

        Returns:
            An iterator over the index of a source and what came of it, in the order in which they are finished.
        """
        with self._turn():
            yield from ManyPieces(self, sources, progress).results()

    def stream(self, blocks: Iterable[ArrayLike], sample_rate: int) -> Generator[SegmentNotes, None, None]:
        """Transcribe audio while it comes; yields the segments one by one, as `iter_segments` does.

        Before the next block is asked for, all segments that are complete were decoded and given: a segment's notes
        are there as soon as its last sample has come and it is decoded (at other rates than the model's, the resampler
        holds back the last 20 to 100 ms). A source that is faster than decoding should
        join what has come in the meantime to one block: its segments are decoded side by side. For several streams
        see `live`. The notes are those of `transcribe`.

        Args:
            blocks: [samples] or [samples, channels] each, of any lengths.
            sample_rate: of the blocks in Hz.

        Raises:
            AudioError: a block cannot be used, or a sample in it, after everything before it was given, as if it had
                been the end; or the audio is out of bounds.
        """
        with self.live() as live:
            live.open(None, sample_rate)
            error = None
            for block in blocks:
                try:
                    live.feed(None, block)
                except AudioError as found:
                    error = found
                    if isinstance(found, SampleError):
                        live.feed(None, np.asarray(block)[: found.usable])
                    break
                yield from (segment for _, segment in live.drain())
            try:
                live.end(None)
            except AudioError as short:
                raise error or short from None
            yield from (segment for _, segment in live.drain())
            if error:
                raise error

    @contextmanager
    def live(self) -> Iterator[LiveStreams[Any]]:
        """Streams side by side; until the block ends, this transcriber is busy, and other threads wait."""
        with self._turn():
            streams: LiveStreams[Any] = LiveStreams(self)
            try:
                yield streams
            finally:
                streams.close()

    def new_note_state(self) -> NoteState:
        """What turns the tokens of one piece of audio into notes."""
        model = self.bundle.manifest.model
        return new_note_state(model, self.vocabulary, strict_upstream=self.strict_upstream)

    def _segments(
        self, source: Generator[Row[RowKey] | None, None, None], piece: Piece
    ) -> Generator[SegmentNotes, None, None]:
        with closing(source) as rows:
            for row in decode_rows(self.backend, rows, self.rules, fallback=self.fallback):
                yield from piece.take(row)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        thread = threading.get_ident()
        if self._owner == thread:  # waiting for oneself would be for ever
            raise OptionError(
                "this transcriber is in the middle of another transcription of this thread: "
                "let it finish, or close its iterator first"
            )
        with self._lock:
            self._owner = thread
            try:
                yield
            finally:
                self._owner = 0
