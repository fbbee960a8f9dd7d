"""Which clips there are to hear, and what was really played in them.

Data sets that are found as they were unpacked, with audio and reference in one folder:

- Slakh2100 and BabySlakh (README of github.com/ethman/slakh-utils): `Track00001/mix.flac` (`.wav` in BabySlakh) with
  `Track00001/all_src.mid`; single instruments are in `stems/` and `MIDI/`.
- MAESTRO (`maestro-v3.0.0.csv`, columns `audio_filename` and `midi_filename`): `2004/NAME.wav` with `2004/NAME.midi`.
"""

from __future__ import annotations

import math
import os
import unicodedata
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import TYPE_CHECKING

from mt3_runtime.errors import OptionError
from mt3_runtime.midi_reading import MidiNotes, read_midi

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mt3_runtime.notes import Note

# Of the containers that `mt3_runtime.audio` reads.
AUDIO = frozenset({".wav", ".flac", ".aif", ".aiff", ".aifc", ".mp3", ".ogg", ".oga", ".opus"})
MIDI = frozenset({".mid", ".midi"})
MIX, STEMS, ALL_SOURCES = "mix", "stems", "all_src"  # Slakh's names


@dataclass(frozen=True, slots=True)
class ClipFile:
    """A clip on the disk. `name`: its path below the folder that was given, without suffix, safe as a path to write."""

    name: str
    audio: Path
    reference: Path | None


@dataclass(frozen=True, slots=True)
class _Found:
    parts: tuple[str, ...]  # of the path below the folder that was given, without suffix
    audio: Path


def find_clips(audio: Sequence[Path], reference: Path | None = None) -> tuple[ClipFile, ...]:
    """All clips of files and folders, in the order given, those of a folder sorted.

    Folders are searched for sound files by their suffix, whatever is hidden left out; links are followed, and every
    folder is searched once. Where a folder has a mix, its folder of stems is left out. Files are named from the
    deepest folder that all files given are in.

    Args:
        audio: Files and folders.
        reference: Folder with a MIDI file for every clip: of the same path and name, or, for a clip called `mix`,
            `all_src` beside it.

    Raises:
        OptionError: nothing is found or something cannot be read, two clips have one name, a clip is given twice, or
            one has no reference.
    """
    found = _find(audio)
    clips = [ClipFile(_printable(each.parts), each.audio, None) for each in found]
    _check_unique(clips)
    _check_folders(clips)
    return tuple(clips if reference is None else _with_references(clips, found, reference))


def find_sounds(audio: Sequence[Path]) -> tuple[Path, ...]:
    """The sound files that `find_clips` finds, whatever they are called.

    Raises:
        OptionError: nothing is found or something cannot be read, or a file is given twice.
    """
    return tuple(each.audio for each in _find(audio))


def _find(audio: Sequence[Path]) -> list[_Found]:
    files = [path for path in audio if not path.is_dir()]
    shared = _shared_folder(files)
    found = [
        each
        for path in audio
        for each in (_search(path) if path.is_dir() else [_Found(_parts(_absolute(path), shared), path)])
    ]
    if not found:
        given = ", ".join(repr(str(path)) for path in audio)
        suffixes = ", ".join(sorted(suffix[1:] for suffix in AUDIO))
        raise OptionError(f"no sound files in {given or 'nothing'}: give files or folders that hold some ({suffixes})")
    paths: set[Path] = set()
    for each in found:
        _check_readable(each.audio)
        path = _absolute(each.audio)
        if path in paths:
            raise OptionError(f"{str(each.audio)!r} is given twice: give it once")
        paths.add(path)
    return found


def load_reference(clip: ClipFile, seconds: float | None = None) -> tuple[Note, ...]:
    """What was played in a clip, or in its first seconds; see `read_reference`."""
    return read_reference(clip, seconds).notes


def read_reference(clip: ClipFile, seconds: float | None = None) -> MidiNotes:
    """The reference of a clip, cut by `cut_notes` where `seconds` are given, with a line for what could not be read.

    Raises:
        OptionError: the clip has no reference, or it cannot be read.
    """
    if clip.reference is None:
        raise OptionError(f"the clip {clip.name!r} has no reference: give the folder of its MIDI file")
    read = read_midi(clip.reference)
    return read if seconds is None else replace(read, notes=cut_notes(read.notes, seconds))


def cut_notes(notes: Iterable[Note], seconds: float) -> tuple[Note, ...]:
    """Notes as they are heard in audio that was cut: those that sound over the cut end there, later ones are gone.

    Raises:
        OptionError: `seconds` is not a positive number.
    """
    if not 0 < seconds < math.inf:
        raise OptionError(f"audio cannot be cut at {seconds} s: give a positive number of seconds")
    return tuple(
        note if note.offset <= seconds else replace(note, offset=seconds) for note in notes if note.onset < seconds
    )


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 -- resolve() would follow links, to files of other names


def _shared_folder(files: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([_absolute(path).parent for path in files])) if files else Path()


def _parts(path: Path, folder: Path) -> tuple[str, ...]:
    return (*path.relative_to(folder).parent.parts, path.stem)


def _search(folder: Path) -> list[_Found]:
    seen: set[tuple[int, int]] = set()
    found = [_Found(_parts(path, folder), path) for path in _sound_files(folder, seen)]
    return sorted(found, key=lambda each: (each.parts, each.audio.name))


def _sound_files(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Of a folder and those in it; `seen`: device and number of the folders that were searched."""
    try:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        entries = [path for path in sorted(folder.iterdir(), key=_links_last) if not path.name.startswith(".")]
    except OSError as error:
        raise _unreadable(folder, error) from None
    folders = [path for path in entries if path.is_dir()]
    sounds = [path for path in entries if path.suffix.lower() in AUDIO and not path.is_dir()]
    yield from sounds
    mixed = any(path.stem == MIX for path in sounds)
    for path in folders:
        if not (mixed and path.name == STEMS):
            yield from _sound_files(path, seen)


def _links_last(path: Path) -> tuple[bool, str]:
    """So that a folder has its own name, and not that of a link beside it."""
    return path.is_symlink(), path.name


def _check_readable(path: Path) -> None:
    """Before hours of work, of which this would end a part."""
    try:
        is_file = S_ISREG(path.stat().st_mode)  # a pipe would be waited for when it is opened
        if is_file:
            path.open("rb").close()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if not is_file:
        raise OptionError(f"{str(path)!r} is no file: give files or folders of them")


def _unreadable(path: Path, error: Exception) -> OptionError:
    reason = getattr(error, "strerror", None) or error
    return OptionError(f"{str(path)!r} cannot be read ({reason}): check the path and its permissions")


def _printable(parts: Sequence[str]) -> str:
    """A name to show and to write files by: what cannot be shown, or would hide a file, becomes an underscore."""
    shown = ["".join(sign if sign.isprintable() else "_" for sign in part) for part in parts]
    return "/".join(f"_{part[1:]}" if part.startswith(".") else part for part in shown)


def _check_unique(clips: Sequence[ClipFile]) -> None:
    names: dict[str, ClipFile] = {}
    for clip in clips:
        # Disks that do not tell case or composed letters apart would keep one file for both.
        same = names.setdefault(unicodedata.normalize("NFC", clip.name).casefold(), clip)
        if same is not clip:
            both = f"{str(same.audio)!r} and {str(clip.audio)!r}"
            raise OptionError(f"{both} would have one name, {clip.name!r}: rename one, or give the folder above them")


def _check_folders(clips: Sequence[ClipFile]) -> None:
    """What is written for a clip must not be a folder of another one's."""
    files = {f"{clip.name}{suffix}".casefold(): clip for clip in clips for suffix in MIDI}
    for clip in clips:
        for parent in PurePosixPath(clip.name).parents:
            other = files.get(str(parent).casefold())
            if other is not None:
                both = f"{str(other.audio)!r} and {str(clip.audio)!r}"
                raise OptionError(f"{both} would take one name, as file and as folder: rename one")


def _with_references(clips: Sequence[ClipFile], found: Sequence[_Found], folder: Path) -> list[ClipFile]:
    """All clips with their references, or an error: scores of some would be taken for scores of all."""
    if not folder.is_dir():
        raise OptionError(f"{str(folder)!r} is no folder: give the folder of the reference MIDI files")
    midi_files = cache(_midi_files)  # of a folder, once for all clips in it
    references = [_reference(each.parts[-1], midi_files(folder.joinpath(*each.parts[:-1]))) for each in found]
    missing = [each for each, path in zip(found, references, strict=True) if path is None]
    if missing:
        wanted = folder.joinpath(*missing[0].parts[:-1], f"{missing[0].parts[-1]}.mid")
        many = f"{len(missing)} of {len(clips)} clips have no reference MIDI, the first is {str(missing[0].audio)!r}"
        raise OptionError(f"{many}: add {str(wanted)!r} and so on, or leave those clips out")
    for path in filter(None, references):
        _check_readable(path)
    return [replace(clip, reference=path) for clip, path in zip(clips, references, strict=True)]


def _reference(stem: str, files: dict[str, list[Path]]) -> Path | None:
    """The MIDI file of one clip. `files`: of the folder it should be in, by stem."""
    candidates = files.get(stem) or (files.get(ALL_SOURCES) if stem == MIX else None) or []
    if len(candidates) > 1:
        both = " and ".join(repr(str(path)) for path in candidates)
        raise OptionError(f"{both} are both references of one clip: remove one")
    return candidates[0] if candidates else None


def _midi_files(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    try:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix.lower() in MIDI:
                files.setdefault(path.stem, []).append(path)
    except OSError as error:
        raise _unreadable(folder, error) from None
    return files
