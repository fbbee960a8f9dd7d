"""Clips and their references are found in the layouts of the data sets; what is missing or ambiguous is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mt3_export.lab.dataset import ClipFile, cut_notes, find_clips, find_sounds, load_reference, read_reference
from mt3_runtime.errors import OptionError
from mt3_runtime.midi import write_midi
from mt3_runtime.notes import Note


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def names(clips):
    return [clip.name for clip in clips]


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


# Layouts


@pytest.mark.parametrize("suffix", ["flac", "wav"])
def test_slakh(tmp_path, suffix):
    for track in ("Track00002", "Track00001"):
        make(tmp_path / track, f"mix.{suffix}", "all_src.mid", "metadata.yaml")
        make(tmp_path / track, *(f"stems/S0{i}.{suffix}" for i in range(3)), *(f"MIDI/S0{i}.mid" for i in range(3)))
    clips = find_clips([tmp_path], tmp_path)
    assert clips == tuple(
        ClipFile(f"{track}/mix", tmp_path / track / f"mix.{suffix}", tmp_path / track / "all_src.mid")
        for track in ("Track00001", "Track00002")
    )
    # The same by a glob of the shell, and of one track alone.
    assert find_clips(sorted(tmp_path.glob(f"*/mix.{suffix}")), tmp_path) == clips
    track = tmp_path / "Track00002"
    assert find_clips([track], track) == (ClipFile("mix", clips[1].audio, clips[1].reference),)
    assert find_clips([clips[1].audio], track) == (ClipFile("mix", clips[1].audio, clips[1].reference),)


def test_stems_are_clips_where_there_is_no_mix_or_where_they_are_asked_for(tmp_path):
    make(tmp_path, "song/stems/S00.wav", "song/stems/S01.wav", "song/other.wav")
    assert names(find_clips([tmp_path])) == ["song/other", "song/stems/S00", "song/stems/S01"]
    make(tmp_path, "song/mix.wav")
    assert names(find_clips([tmp_path])) == ["song/mix", "song/other"]
    assert names(find_clips([tmp_path / "song" / "stems"])) == ["S00", "S01"]


def test_a_reference_called_mix_comes_before_all_sources(tmp_path):
    make(tmp_path, "mix.wav", "all_src.mid", "mix.mid")
    assert find_clips([tmp_path], tmp_path)[0].reference == tmp_path / "mix.mid"
    # Only a mix is what all sources make.
    make(tmp_path / "other", "song.wav", "all_src.mid")
    with pytest.raises(OptionError, match=r"1 of 1 clips have no reference MIDI.*song\.wav.*add .*song\.mid"):
        find_clips([tmp_path / "other"], tmp_path / "other")


def test_maestro(tmp_path):
    stem = "MIDI-Unprocessed_SMF_02_R1_2004_01-05_ORIG_MID--AUDIO_02_R1_2004_05_Track05_wav"
    make(tmp_path, "maestro-v3.0.0.csv", "LICENSE", f"2004/{stem}.wav", f"2004/{stem}.midi")
    make(tmp_path, "2018/MIDI-Unprocessed_Chamber1_MID--AUDIO_07_R3_2018_wav--2.wav")
    make(tmp_path, "2018/MIDI-Unprocessed_Chamber1_MID--AUDIO_07_R3_2018_wav--2.midi")
    clips = find_clips([tmp_path], tmp_path)
    assert [(clip.name, clip.audio.name, clip.reference.name) for clip in clips] == [
        (f"2004/{stem}", f"{stem}.wav", f"{stem}.midi"),
        *[
            (f"2018/{name}", f"{name}.wav", f"{name}.midi")
            for name in ["MIDI-Unprocessed_Chamber1_MID--AUDIO_07_R3_2018_wav--2"]
        ],
    ]


def test_references_in_a_folder_of_their_own_upper_case_suffixes_and_dots(tmp_path):
    make(tmp_path / "audio", "a.b.WAV", "x/y/c.Mp3", "x/d.aiff", "x/e.opus", "x/f.txt", "x/g.mid")
    make(tmp_path / "midi", "a.b.MID", "x/y/c.Midi", "x/d.mid", "x/e.MIDI", "a.mid")
    clips = find_clips([tmp_path / "audio"], tmp_path / "midi")
    assert [(clip.name, str(clip.reference.relative_to(tmp_path / "midi"))) for clip in clips] == [
        ("a.b", "a.b.MID"), ("x/d", "x/d.mid"), ("x/e", "x/e.MIDI"), ("x/y/c", "x/y/c.Midi"),
    ]  # fmt: skip
    assert [clip.reference for clip in find_clips([tmp_path / "audio"])] == [None] * 4


def test_files_are_named_from_the_folder_they_share(tmp_path, monkeypatch):
    make(tmp_path, "a/x.wav", "a/b/x.wav", "c/y.sound")
    assert names(find_clips([tmp_path / "a" / "x.wav"])) == ["x"]
    assert names(find_clips([tmp_path / "a" / "x.wav", tmp_path / "a" / "b" / "x.wav"])) == ["x", "b/x"]
    # A file that is named is taken whatever its suffix; the bytes decide.
    assert names(find_clips([tmp_path / "c" / "y.sound", tmp_path / "a" / "b"])) == ["y", "x"]
    monkeypatch.chdir(tmp_path / "a")
    assert names(find_clips([Path("x.wav"), Path("b/../../c/y.sound")])) == ["a/x", "c/y"]
    assert names(find_clips([Path()])) == ["b/x", "x"]
    assert names(find_clips([Path("..")])) == ["a/b/x", "a/x"]


# What is left out


def test_hidden_files_and_folders_are_left_out(tmp_path):
    make(tmp_path, "x.wav", "._x.wav", ".cache/y.wav", "z/._mix.flac", "z/.DS_Store", "z/stems/s.wav")
    assert names(find_clips([tmp_path])) == ["x", "z/stems/s"]


def test_links_are_followed_once(tmp_path):
    make(tmp_path / "set", "a/x.wav", "a/deep/y.wav")
    make(tmp_path / "elsewhere", "z.wav")
    (tmp_path / "set" / "a" / "up").symlink_to("..")
    (tmp_path / "set" / "a" / "here").symlink_to(".")
    (tmp_path / "set" / "0-link").symlink_to("a")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "self").symlink_to("self")
    assert names(find_clips([tmp_path / "set"])) == ["a/deep/y", "a/x", "more/z"]
    assert names(find_clips([tmp_path / "set" / "0-link"])) == ["deep/y", "up/more/z", "x"]


# Names


def test_names_can_be_printed_and_never_lead_out_of_a_folder(tmp_path):
    odd = ["a\nb.wav", "tab\t\x1b[1m.wav", "\u202ereversed.wav", os.fsdecode(b"latin\xe9.wav")]
    make(tmp_path, *odd, "ümläut 1.wav", "back\\slash.wav")
    clips = find_clips([tmp_path])
    assert sorted(names(clips)) == sorted(["a_b", "tab__[1m", "_reversed", "latin_", "ümläut 1", "back\\slash"])
    assert {clip.audio.name for clip in clips} == {path.name for path in tmp_path.iterdir()}
    make(tmp_path / "dots", "..wav", "...wav", ".hidden.wav")
    clips = find_clips([tmp_path / "dots" / name for name in ("..wav", "...wav", ".hidden.wav")])
    assert names(clips) == ["_", "_.", "_hidden"]
    for clip in clips:
        assert (tmp_path / clip.name).resolve().parent == tmp_path.resolve()


def test_a_reference_is_found_by_the_name_on_the_disk(tmp_path):
    make(tmp_path, "a\nb.wav", "a\nb.mid")
    clip = find_clips([tmp_path], tmp_path)[0]
    assert (clip.name, clip.reference) == ("a_b", tmp_path / "a\nb.mid")


@pytest.mark.parametrize(
    ("first", "second"),
    [("x.wav", "x.flac"), ("x.wav", "X.wav"), ("\u00fc.wav", "u\u0308.wav"), ("a\n.wav", "a\r.wav")],
)
def test_two_clips_of_one_name_are_refused(tmp_path, first, second):
    make(tmp_path, first, second)
    with pytest.raises(OptionError, match=r"would have one name, .*: rename one, or give the folder above") as caught:
        find_clips([tmp_path])
    assert all(repr(str(tmp_path / name)) in one_line(caught) for name in (first, second))


def test_two_folders_with_one_name_in_both_are_refused(tmp_path):
    make(tmp_path, "a/x.wav", "b/x.wav")
    with pytest.raises(OptionError, match="give the folder above them"):
        find_clips([tmp_path / "a", tmp_path / "b"])
    assert names(find_clips([tmp_path])) == ["a/x", "b/x"]


def test_sounds_that_are_not_named_may_have_one_name(tmp_path):
    make(tmp_path, "a/x.wav", "b/x.wav", "x.wav", "x.flac")
    found = find_sounds([tmp_path / "a", tmp_path / "b", tmp_path / "x.wav", tmp_path / "x.flac"])
    assert found == tuple(tmp_path / name for name in ("a/x.wav", "b/x.wav", "x.wav", "x.flac"))
    with pytest.raises(OptionError, match="is given twice"):
        find_sounds([tmp_path / "a", tmp_path / "a" / "x.wav"])


def test_a_clip_is_given_once(tmp_path, monkeypatch):
    make(tmp_path, "a/x.wav")
    monkeypatch.chdir(tmp_path)
    for other in (tmp_path / "a" / "x.wav", tmp_path / "a", Path("a/../a/x.wav")):
        with pytest.raises(OptionError, match=r"x\.wav' is given twice: give it once"):
            find_clips([Path("a"), other])


# Errors


def test_nothing_found(tmp_path):
    make(tmp_path, "x.txt", "y.mid", ".z.wav")
    with pytest.raises(OptionError, match=r"no sound files in .*: give files or folders .*flac") as caught:
        find_clips([tmp_path])
    assert repr(str(tmp_path)) in one_line(caught)
    with pytest.raises(OptionError, match="no sound files in nothing: give"):
        find_clips([])


def test_missing_and_unreadable_paths(tmp_path, monkeypatch):
    for path in (tmp_path / "none.wav", tmp_path / "no\nfolder", Path("nul\0.wav")):
        with pytest.raises(OptionError, match=r"cannot be read \(.*\): check the path") as caught:
            find_clips([path])
        assert repr(str(path)) in one_line(caught)
    (tmp_path / "dangling.wav").symlink_to("nowhere")
    with pytest.raises(OptionError, match=r"dangling\.wav' cannot be read \(No such file"):
        find_clips([tmp_path])
    (tmp_path / "dangling.wav").unlink()
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(OptionError, match=r"pipe\.wav' is no file: give files"):
        find_clips([tmp_path])


def test_what_permissions_forbid_is_told(tmp_path, monkeypatch):
    make(tmp_path, "a/locked/x.wav", "a/y.wav", "a/y.mid")
    real = Path.iterdir, Path.open

    def iterdir(self):
        if self.name == "locked":
            raise PermissionError(13, "Permission denied", str(self))
        return real[0](self)

    def opened(self, *args, **kwargs):
        if self.name == "y.wav":
            raise PermissionError(13, "Permission denied", str(self))
        return real[1](self, *args, **kwargs)

    monkeypatch.setattr(Path, "iterdir", iterdir)  # root may read everything, so that modes would not do
    with pytest.raises(OptionError, match=r"locked' cannot be read \(Permission denied\): check .* permissions"):
        find_clips([tmp_path])
    monkeypatch.setattr(Path, "iterdir", real[0])
    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OptionError, match=r"y\.wav' cannot be read \(Permission denied\)"):
        find_clips([tmp_path])


def test_references_are_all_there_or_told(tmp_path):
    make(tmp_path / "audio", "a.wav", "b/c.wav", "b/d.wav")
    make(tmp_path / "midi", "a.mid", "c.mid", "b/D.mid")
    with pytest.raises(OptionError, match="2 of 3 clips have no reference MIDI, the first is") as caught:
        find_clips([tmp_path / "audio"], tmp_path / "midi")
    told = one_line(caught)
    assert repr(str(tmp_path / "audio" / "b" / "c.wav")) in told
    assert repr(str(tmp_path / "midi" / "b" / "c.mid")) in told
    assert told.endswith("or leave those clips out")
    for wrong in (tmp_path / "none", tmp_path / "midi" / "a.mid"):
        with pytest.raises(OptionError, match="is no folder: give the folder of the reference MIDI files"):
            find_clips([tmp_path / "audio"], wrong)


def test_a_reference_is_a_file_that_can_be_read(tmp_path):
    make(tmp_path, "a.wav")
    (tmp_path / "a.mid").symlink_to("nowhere")
    with pytest.raises(OptionError, match=r"a\.mid' cannot be read \(No such file.*\): check the path"):
        find_clips([tmp_path], tmp_path)
    (tmp_path / "a.mid").unlink()
    (tmp_path / "a.mid").mkdir()
    with pytest.raises(OptionError, match=r"a\.mid' is no file: give files"):
        find_clips([tmp_path], tmp_path)


def test_two_references_of_one_clip_are_refused(tmp_path):
    make(tmp_path, "a.wav", "a.mid", "a.midi")
    with pytest.raises(OptionError, match=r"a\.mid' and .*a\.midi' are both references of one clip: remove one"):
        find_clips([tmp_path], tmp_path)


# Notes


def note(onset, offset, pitch=60):
    return Note(onset, offset, pitch, 100, 0, is_drum=False)


def test_a_reference_is_read_and_cut(tmp_path):
    make(tmp_path, "x.wav")
    notes = [note(0.5, 1.0), note(1.5, 2.5, 61), note(2.0, 3.0, 62), note(2.5, 4.0, 63)]
    write_midi(notes, tmp_path / "x.mid")
    clip = find_clips([tmp_path], tmp_path)[0]
    times = [(0.5, 1.0, 60), (1.5, 2.5, 61), (2.0, 3.0, 62), (2.5, 4.0, 63)]
    assert [(n.onset, n.offset, n.pitch) for n in load_reference(clip)] == times
    assert [(n.onset, n.offset, n.pitch) for n in load_reference(clip, 2.0)] == [(0.5, 1.0, 60), (1.5, 2.0, 61)]
    assert read_reference(clip, 2.0).warnings == ()


def test_a_reference_may_have_no_notes(tmp_path):
    make(tmp_path, "x.wav")
    write_midi([], tmp_path / "x.mid")
    assert load_reference(find_clips([tmp_path], tmp_path)[0]) == ()


def test_a_reference_that_cannot_be_read_is_told(tmp_path):
    make(tmp_path, "x.wav", "x.mid")
    with pytest.raises(OptionError, match="give a MIDI file"):
        load_reference(find_clips([tmp_path], tmp_path)[0])
    with pytest.raises(OptionError, match="the clip 'x' has no reference: give"):
        load_reference(find_clips([tmp_path])[0])


def test_what_sounds_over_the_cut_ends_there():
    notes = [note(0.0, 1.0), note(0.5, 2.0), note(1.999, 9.0), note(2.0, 2.5), note(3.0, 4.0)]
    assert cut_notes(notes, 2.0) == (notes[0], notes[1], note(1.999, 2.0))
    assert cut_notes(notes, 100) == tuple(notes)
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="give a positive number of seconds"):
            cut_notes(notes, wrong)
