"""Clips as files that any program can read: FLAC, and MIDI of exactly what was played."""

from __future__ import annotations

import io
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from demo_model.synthesis import RATE
from mt3_export.bundle_folder import new_folder
from mt3_runtime.errors import OptionError
from mt3_runtime.files import atomic_write
from mt3_runtime.midi import write_midi
from mt3_runtime.midi_styles import MidiStyle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from demo_model.clips import Clip
    from demo_model.synthesis import Wave

    ClipsOf = Callable[[str, int], Iterable[Clip]]

STYLE = MidiStyle(5_000)  # ticks of 0.1 ms, to which mir_eval rounds too; those of MT3 last 2.27 ms
FULL_SCALE = 32_768

README = """\
Synthetic test set: {clips} clips, {seconds:.0f} s of audio, with the notes that are played in them.

{kinds}

audio/KIND/0000.flac  16 kHz, mono, 16 bits
midi/KIND/0000.mid    all notes, instrument by instrument, drums on channel 10

Made by: {command}
Random music, composed and played by a program; seeds are those of the demo model's held-out clips, which its training
never uses. The same command makes the same notes on every machine, and the same samples but for how its mathematical
functions round.

16 bits are what recordings have. Rounding to them adds noise 101 dB below full scale, at least 10 dB below the clips'
own. A note of which a model is unsure may still come out otherwise than from the unrounded sound.
Times in the MIDI files are rounded to 0.1 ms: none is off by more than 0.05 ms.

mt3-export precision BUNDLE --audio {folder}/audio --reference-midi {folder}/midi --output REPORT
"""


def write_test_set(
    output: Path,
    names: Mapping[str, str],
    count: int,
    clips_of: ClipsOf,
    told: Callable[[str], None],
    *,
    skip: int = 0,
) -> int:
    """Write clips into a new folder, whole or not at all.

    Args:
        output: The folder.
        names: What clips are of, by kind.
        count: Clips of each kind.
        clips_of: Clips by kind and their number.
        told: Takes a line for each kind that is done.
        skip: So many of each kind come before them; files are numbered as if these were there.

    Returns:
        Clips in all.

    Raises:
        OutputError: the folder exists, or cannot be written.
    """
    clips, seconds = 0, 0.0
    with new_folder(output) as folder:
        for kind, name in names.items():
            for part in ("audio", "midi"):
                (folder / part / kind).mkdir(parents=True)
            for number, clip in islice(enumerate(clips_of(kind, skip + count)), skip, None):
                atomic_write(folder / "audio" / kind / f"{number:04d}.flac", flac_bytes(clip.audio))
                write_midi(clip.notes, folder / "midi" / kind / f"{number:04d}.mid", style=STYLE)
                clips, seconds = clips + 1, seconds + len(clip.audio) / RATE
            told(f"{kind}: {count} of {name}")
        text = README.format(
            clips=clips,
            seconds=seconds,
            kinds="\n".join(f"{kind}: {count} of {name}" for kind, name in names.items()),
            command=" ".join(
                [
                    "scripts/make_test_set",
                    f"--clips {count}",
                    *([f"--skip {skip}"] if skip else []),
                    f"--kinds {','.join(names)}",
                    f"--output {output.name}",
                ]
            ),
            folder=output.name,
        )
        atomic_write(folder / "README.txt", text.encode())
    return clips


def choose(listed: str | None, known: Mapping[str, str]) -> dict[str, str]:
    """The kinds that were asked for, with commas between them; all if none were.

    Raises:
        OptionError: a kind is not known, or asked for twice.
    """
    asked = list(known) if listed is None else listed.split(",")
    wrong = [kind for place, kind in enumerate(asked) if kind not in known or kind in asked[:place]]
    if wrong:
        raise OptionError(
            f"--kinds {listed}: {wrong[0]!r} is not a kind, or there twice: give some of {','.join(known)}"
        )
    return {kind: known[kind] for kind in asked}


def flac_bytes(audio: Wave) -> bytes:
    """Audio [samples] in -1..1 at 16 kHz as a FLAC file of 16 bits, rounded without dither: clips have noise."""
    samples = np.clip(np.round(audio.astype(np.float64) * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
