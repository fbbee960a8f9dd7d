"""Notes to MIDI at 120 BPM: one track for each program, drums on channel 10; the rest is a matter of style.

What one MIDI track cannot hold, and what becomes of it:

- A pitch that sounds twice at once on one program, or on programs that the style merges. The earlier note ends
  where the later one starts, as when a key is struck again; of notes that start within the same tick the one
  that lasts longest stays.
- A note shorter than a tick (2.27 ms in the style of MT3) lasts one tick.
- More than 15 melodic programs, or more than one drum kit: a MIDI port has 16 channels. The others go to
  further ports (meta event FF 21). For players that ignore ports, the program is set again wherever two
  tracks take turns on a channel number.

The first and the last are told by `midi_warnings`. Ticks and names follow note-seq's `midi_io.py`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import mido
import pretty_midi

from mt3_runtime.errors import OutputError
from mt3_runtime.files import atomic_write
from mt3_runtime.midi_styles import BEATS_PER_MINUTE, MT3_STYLE

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from mt3_runtime.midi_styles import MidiStyle
    from mt3_runtime.notes import Note

LONGEST = 0x0FFFFFFF  # ticks between two MIDI events at most, 169 hours of MT3's
LATEST = 2**40  # ticks: what is later has no time, but a fault
DRUM_CHANNEL = 9  # counted from 0
MELODIC_CHANNELS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15)


@dataclass(frozen=True, slots=True)
class _TickNote:
    start: int
    end: int
    pitch: int
    velocity: int


@dataclass(frozen=True, slots=True)
class _Track:
    name: str
    program: int  # as the file has it
    is_drum: bool
    port: int
    channel: int
    notes: tuple[_TickNote, ...]


def notes_to_midi(notes: Iterable[Note], *, style: MidiStyle = MT3_STYLE) -> pretty_midi.PrettyMIDI:
    """Return the notes as a PrettyMIDI, times rounded to ticks, one instrument for each program.

    `write_midi` is the better way to a file: PrettyMIDI's own `write` knows no ports, so that the 16th
    instrument shares a channel with the first.

    Raises:
        OutputError: a note has no time that music can have.
    """
    tracks, _ = _arrange(notes, style)
    midi = pretty_midi.PrettyMIDI(resolution=style.ticks_per_quarter, initial_tempo=BEATS_PER_MINUTE)
    rate = style.ticks_per_second
    for track in tracks:
        instrument = pretty_midi.Instrument(track.program, track.is_drum, track.name)
        instrument.notes = [pretty_midi.Note(n.velocity, n.pitch, n.start / rate, n.end / rate) for n in track.notes]
        midi.instruments.append(instrument)
    return midi


def midi_warnings(notes: Iterable[Note], *, style: MidiStyle = MT3_STYLE) -> tuple[str, ...]:
    """Say what a MIDI file of these notes will not hold, or hold in a way that some players ignore."""
    return _arrange(notes, style)[1]


def write_midi(notes: Iterable[Note], path: str | os.PathLike[str], *, style: MidiStyle = MT3_STYLE) -> tuple[str, ...]:
    """Write the notes as a MIDI file, whole or not at all.

    Files of more than 10 million ticks (6.3 hours in MT3's style, 2.9 in YourMT3's) are valid, but `pretty_midi`
    refuses to read them.

    Returns:
        The warnings of `midi_warnings`.

    Raises:
        OutputError: the file cannot be written, or a note has no time that music can have.
    """
    tracks, warnings = _arrange(notes, style)
    atomic_write(path, _encode(tracks, style.ticks_per_quarter))
    return warnings


def _arrange(notes: Iterable[Note], style: MidiStyle) -> tuple[list[_Track], tuple[str, ...]]:
    """Group the notes by instrument, pitched ones first, and give each group a port and a channel."""
    groups: defaultdict[tuple[bool, int], list[Note]] = defaultdict(list)
    for note in notes:
        groups[note.is_drum, note.program if note.is_drum else style.program_of(note.program)].append(note)
    tracks: list[_Track] = []
    shortened = left_out = 0
    melodic = sum(not is_drum for is_drum, _ in groups)
    for index, (is_drum, program) in enumerate(sorted(groups)):
        group = groups[is_drum, program]
        kept, cut = _separate(group, style.ticks_per_second)
        shortened += cut
        left_out += len(group) - len(kept)
        if is_drum:
            name, written = "Drums", program
            port, channel = index - melodic, DRUM_CHANNEL
        else:
            name, written = style.name_of(program), style.written.get(program, program)
            port, channel = index // len(MELODIC_CHANNELS), MELODIC_CHANNELS[index % len(MELODIC_CHANNELS)]
        tracks.append(_Track(name, written, is_drum, port, channel, tuple(kept)))
    return tracks, _warnings(tracks, shortened, left_out)


def _separate(notes: Sequence[Note], rate: float) -> tuple[list[_TickNote], int]:
    """Round one instrument's notes to ticks such that no pitch sounds twice; count the ones cut short."""
    by_pitch: defaultdict[int, dict[int, _TickNote]] = defaultdict(dict)
    for note in notes:
        start = _tick(note.onset, rate)
        new = _TickNote(start, max(_tick(note.offset, rate), start + 1), int(note.pitch), int(note.velocity))
        old = by_pitch[new.pitch].setdefault(start, new)
        by_pitch[new.pitch][start] = max(old, new, key=lambda n: (n.end, n.velocity))
    kept: list[_TickNote] = []
    shortened = 0
    for pitch, at in by_pitch.items():
        starts = sorted(at)
        for start, following in zip(starts, [*starts[1:], LATEST], strict=True):
            end = min(at[start].end, following)
            shortened += end < at[start].end
            kept.append(_TickNote(start, end, pitch, at[start].velocity))
    return sorted(kept, key=lambda n: (n.start, n.pitch)), shortened


def _tick(seconds: float, rate: float) -> int:
    if not seconds * rate < LATEST - 1:
        raise OutputError(f"a note at {seconds} s is not in any music: keep notes below {int(LATEST / rate)} s")
    return round(seconds * rate)


def _warnings(tracks: Sequence[_Track], shortened: int, left_out: int) -> tuple[str, ...]:
    warnings = []
    if shortened:
        warnings.append(f"MIDI: notes cut short where the same pitch starts again: {shortened}")
    if left_out:
        warnings.append(f"MIDI: notes left out because the same pitch starts on the same tick: {left_out}")
    if any(track.port for track in tracks):
        warnings.append(
            f"MIDI: {len(tracks)} instruments need more than one MIDI port of 16 channels; "
            "players that ignore ports share channels between them"
        )
    return tuple(warnings)


def _encode(tracks: Sequence[_Track], ticks_per_quarter: int) -> bytes:
    """Lay the tracks out as a type 1 MIDI file after a track with metre and tempo."""
    tempo = mido.bpm2tempo(BEATS_PER_MINUTE)
    timing = [
        mido.MetaMessage("time_signature", numerator=4, denominator=4),
        mido.MetaMessage("set_tempo", tempo=tempo),
    ]
    file = mido.MidiFile(type=1, ticks_per_beat=ticks_per_quarter)
    file.tracks.append(mido.MidiTrack(timing))
    turns = _turns(tracks)
    with_ports = any(track.port for track in tracks)
    for index, track in enumerate(tracks):
        file.tracks.append(_encode_track(track, turns[index], with_ports=with_ports))
    buffer = BytesIO()
    file.save(file=buffer)
    return buffer.getvalue()


def _encode_track(track: _Track, turns: set[int], *, with_ports: bool) -> mido.MidiTrack:
    """Write one track; at each tick note-offs come first, then the program, then the onsets."""
    events = [(tick, 1, 0, _program(track)) for tick in turns]
    for note in track.notes:
        for tick, order, velocity in ((note.start, 2, note.velocity), (note.end, 0, 0)):
            message = mido.Message("note_on", channel=track.channel, note=note.pitch, velocity=velocity)
            events.append((tick, order, note.pitch, message))
    messages = mido.MidiTrack([mido.MetaMessage("track_name", name=track.name)])
    if with_ports:
        messages.append(mido.MetaMessage("midi_port", port=track.port))
    messages.append(_program(track))
    now = 0
    for tick, *_, message in sorted(events, key=lambda event: event[:3]):
        while tick - now > LONGEST:
            messages.append(mido.MetaMessage("text", time=LONGEST))
            now += LONGEST
        message.time = tick - now
        messages.append(message)
        now = tick
    return messages


def _program(track: _Track) -> mido.Message:
    return mido.Message("program_change", channel=track.channel, program=track.program)


def _turns(tracks: Sequence[_Track]) -> list[set[int]]:
    """For each track, the ticks of onsets before which another track had its channel number.

    Players that ignore ports merge tracks in file order, so that at equal ticks the earlier track is first.
    """
    turns: list[set[int]] = [set() for _ in tracks]
    by_channel: defaultdict[int, list[int]] = defaultdict(list)
    for index, track in enumerate(tracks):
        by_channel[track.channel].append(index)
    for sharing in by_channel.values():
        at_start = {(0, index) for index in sharing}  # every track begins with its program
        onsets = {(note.start, index) for index in sharing for note in tracks[index].notes}
        owner = None
        for tick, index in sorted(at_start | onsets):
            if index != owner and tick > 0:
                turns[index].add(tick)
            owner = index
    return turns
