"""Compare notes with the YourMT3 authors' own tokenizer and note code, which mt3-infer 0.2.0 ships.

    .oracle/bin/python tests/oracle/compare_notes.py [STREAMS]

Runs in the oracle's environment; of this project only the runtime is imported. Random token streams, good ones and
wild ones, are decoded by both; notes that do not meet are written as MIDI files by both. Then the vocabularies: every
token id, and the instruments that MIDI files name. Exits with 1 if anything differs.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import mido

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "runtime"), str(ROOT / "tests")]

from mt3_infer.models.yourmt3.config.vocabulary import program_vocab_presets  # noqa: E402
from mt3_infer.models.yourmt3.utils.event2note import merge_zipped_note_events_and_ties_to_notes  # noqa: E402
from mt3_infer.models.yourmt3.utils.note2event import mix_notes  # noqa: E402
from mt3_infer.models.yourmt3.utils.note_event_dataclasses import Note as TheirNote  # noqa: E402
from mt3_infer.models.yourmt3.utils.task_manager import TaskManager  # noqa: E402
from mt3_infer.models.yourmt3.utils.utils import create_inverse_vocab, write_model_output_as_midi  # noqa: E402

from mt3_runtime.midi import write_midi  # noqa: E402
from mt3_runtime.midi_styles import YOURMT3_FINE_STYLE, YOURMT3_STYLE  # noqa: E402
from mt3_runtime.note_decoding import SegmentTokens  # noqa: E402
from mt3_runtime.notes import Note  # noqa: E402
from mt3_runtime.specs import VocabularySpec  # noqa: E402
from mt3_runtime.vocabulary import Vocabulary  # noqa: E402
from mt3_runtime.yourmt3_notes import YourMt3NoteDecoder  # noqa: E402
from yourmt3_streams import Dice, good_stream, wild_stream  # noqa: E402

VOCABULARY = Vocabulary(VocabularySpec(max_shift_steps=205))
TASKS = ("mt3_full_plus", "mc13_full_plus_256")
DRUMS = 128  # the authors' own program number for them


def theirs(tasks, stream):
    """(onset, offset, pitch, program, is_drum) of every note, and the errors counted."""
    starts = [start for start, _ in stream]
    errors = Counter()
    by_channel = []
    for rows in zip(*(rows for _, rows in stream), strict=True):
        batches = [[row] for row in rows]
        zipped, _, found = tasks.detokenize_list_batches(batches, starts, return_events=True)
        errors.update(found)
        notes, found = merge_zipped_note_events_and_ties_to_notes(zipped)
        errors.update(found)
        by_channel.append(notes)
    mixed = mix_notes(by_channel)
    rows = [(n.onset, n.offset, n.pitch, 0 if n.program == DRUMS else n.program, n.is_drum) for n in mixed]
    return sorted(rows), errors


def ours(stream, *, strict=True):
    decoder = YourMt3NoteDecoder(VOCABULARY, len(stream[0][1]), strict_upstream=strict)
    ends = [start for start, _ in stream[1:]] + [None]
    notes = []
    for (start, rows), end in zip(stream, ends, strict=True):
        notes += decoder.decode_segment([SegmentTokens(start, row) for row in rows], end)
    notes += decoder.flush(len(stream) * 32767 / 16000)
    return sorted((n.onset, n.offset, n.pitch, n.program, n.is_drum) for n in notes)


def compare_streams(amount):
    dice, managers = Dice(1), [TaskManager(name) for name in TASKS]
    found, errors = Counter(), Counter()
    for number in range(amount):
        is_good = number % 4 == 0
        stream = good_stream(dice)[0] if is_good else wild_stream(dice)
        manager = managers[len(stream[0][1]) > 1]
        wanted, seen = theirs(manager, stream)
        found.update(streams=1, notes=len(wanted), rows=len(stream) * len(stream[0][1]))
        found["streams that differ"] += ours(stream) != wanted
        if is_good:
            found["good streams"] += 1
            found["good streams that differ without strict_upstream"] += ours(stream, strict=False) != wanted
        errors.update(seen)
    return found, errors


def separate_notes(dice):
    """(onset, offset, pitch, program, is_drum), each pitch once at a time over all programs; at most 15 programs."""
    programs = [dice.choice((*range(96), 100, 101)) for _ in range(8)]
    notes, busy = [], Counter()
    for _ in range(60):
        is_drum, pitch = dice.chance(0.2), dice.below(128)
        onset = busy[pitch] + dice.below(300) / 100
        offset = onset + (0.01 if is_drum else 0.01 + dice.below(200) / 100)
        busy[pitch] = offset + 0.01
        notes.append((onset, offset, pitch, 0 if is_drum else dice.choice(programs), is_drum))
    return notes


def tracks_of(path):
    """Resolution, and (name, program, channel, notes) of every track with notes; times in ticks."""
    file = mido.MidiFile(path)
    found = []
    for track in file.tracks:
        now, name, onsets, notes = 0, None, {}, []
        for message in track:
            now += message.time
            if message.type == "track_name":
                name = message.name
            elif message.type == "program_change":
                program, channel = message.program, message.channel
            elif message.type == "note_on" and message.velocity:
                onsets[message.note] = (now, message.velocity)
            elif message.type in {"note_on", "note_off"}:
                notes.append((*onsets.pop(message.note), now, message.note))
        if notes:
            found.append((name, program, channel, sorted(notes)))
    return file.ticks_per_beat, found


def compare_files(amount):
    dice, found = Dice(2), Counter()
    names = create_inverse_vocab(program_vocab_presets["gm_ext_plus"])
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(amount):
            notes = separate_notes(dice)
            their_notes = [TheirNote(drum, DRUMS if drum else p, on, off, n, 1) for on, off, n, p, drum in notes]
            write_model_output_as_midi(their_notes, folder, "theirs", names)
            our_notes = [Note(on, off, pitch, 100, program, drum) for on, off, pitch, program, drum in notes]
            write_midi(our_notes, Path(folder, "ours.mid"), style=YOURMT3_STYLE)
            wanted = tracks_of(Path(folder, "model_output", "theirs.mid"))
            differs = tracks_of(Path(folder, "ours.mid")) != wanted
            found.update({"files": 1, "notes in files": len(notes), "files that differ": differs})
    return found


def compare_ids():
    """How many token ids stand for another event in each of the authors' vocabularies."""
    found = Counter()
    for name in TASKS:
        codec = TaskManager(name).tokenizer.codec
        sizes = (codec.num_classes, len(VOCABULARY))
        for token in range(max(sizes)):
            event = codec.decode_event_index(token)
            mine = VOCABULARY.decode(token)
            is_same = token < 3 if mine is None else (event.type, event.value) == (mine.kind, mine.value)
            found.update({"ids": 1, "ids that differ": not is_same})
    return found


def compare_instruments():
    """How many of the 128 programs the styles of MIDI files merge or name in another way."""
    found = Counter()
    for style, preset in ((YOURMT3_STYLE, "gm_ext_plus"), (YOURMT3_FINE_STYLE, "mt3_full_plus")):
        vocabulary = program_vocab_presets[preset]
        names = {int(programs[0]): name for name, programs in vocabulary.items()}
        merged = {int(program): int(programs[0]) for programs in vocabulary.values() for program in programs}
        if style is YOURMT3_FINE_STYLE:
            merged = {}
        differ = [style.program_of(program) != merged.get(program, program) for program in range(128)]
        misnamed = [style.name_of(program) != name for program, name in names.items()]
        found.update({"programs": 128, "programs that differ": sum(differ)})
        found.update({"names": len(names), "names that differ": sum(misnamed)})
    return found


def main():
    streams, errors = compare_streams(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
    found = [streams, compare_files(300), compare_ids(), compare_instruments()]
    for counts in (*found, errors):
        sys.stdout.write(", ".join(f"{name}: {amount:g}" for name, amount in counts.items()) + "\n")
    sys.exit(any(amount for counts in found for name, amount in counts.items() if "differ" in name))


if __name__ == "__main__":
    main()
