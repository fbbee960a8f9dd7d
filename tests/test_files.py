"""Files that are whole or not there, whatever fails."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import tempfile
from pathlib import Path

import pytest

from mt3_runtime import files
from mt3_runtime.errors import OutputError
from mt3_runtime.files import atomic_write


def assert_intact(target, content):
    assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target]


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "folder" / "song.mid"
    path.parent.mkdir()
    path.write_bytes(b"old")
    return path


def test_a_file_is_replaced_and_keeps_its_permissions(target):
    target.chmod(0o640)
    atomic_write(target, b"new")
    assert_intact(target, b"new")
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_new_file_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "new", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640


def test_a_link_is_followed(target, tmp_path):
    (tmp_path / "link.mid").symlink_to(target)
    atomic_write(tmp_path / "link.mid", b"new")
    assert (tmp_path / "link.mid").is_symlink()
    assert_intact(target, b"new")


def test_the_data_are_on_the_disk_before_the_name_is(target, monkeypatch):
    steps = []
    real_sync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(os.fstat(fd).st_size), real_sync(fd)))

    def rename(source, destination, **kwargs):
        steps.append("rename")
        assert target.read_bytes() == b"old"
        real_rename(source, destination, **kwargs)

    monkeypatch.setattr(os, "replace", rename)
    atomic_write(target, b"n" * 3)
    assert steps[:2] == [3, "rename"]
    assert len(steps) == 3, "the folder is put on the disk too"


def test_a_write_cut_short_leaves_the_old_file(target):
    """The kernel itself stops the write: the limit on the size of files is real, nothing is replaced by a double."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="exceed the size limit: raise the limit"):
            atomic_write(target, b"n" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_intact(target, b"old")


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        (errno.ENOSPC, "disk is full: free some space"),
        (errno.EDQUOT, "quota is used up: free some space"),
        (errno.EIO, "choose another path"),
    ],
)
def test_a_failing_disk_leaves_the_old_file(target, monkeypatch, code, fix):
    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OutputError, match=fix):
        atomic_write(target, b"new")
    assert_intact(target, b"old")


def test_an_interruption_leaves_the_old_file(target, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(target, b"new")
    assert_intact(target, b"old")


def test_targets_that_cannot_be(target, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    cases = {
        tmp_path / "missing" / "x.mid": "create the folder first",
        target / "x.mid": "its folder is a file: choose another path",
        target.parent: "it is a folder: add a file name",
        tmp_path / "pipe": "a device or a pipe: choose an ordinary file",
        tmp_path / ("x" * 300): "name is too long: choose a shorter one",
        tmp_path / "nul\0": "choose another name",
        tmp_path / "loop" / "x": "choose another path",
    }
    for path, fix in cases.items():
        with pytest.raises(OutputError, match=fix) as caught:
            atomic_write(path, b"x")
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "loop", "pipe"]
    assert_intact(target, b"old")


@contextlib.contextmanager
def without_privileges():
    """Give up root's right to write everywhere, if we have it."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(mine)


@pytest.fixture
def open_folder():
    """A folder that every user can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_folder_without_write_permission(open_folder):
    (open_folder / "old").write_bytes(b"old")
    open_folder.chmod(0o555)
    with without_privileges():
        for name in ("old", "new"):
            with pytest.raises(OutputError, match="write-protected: change its permissions"):
                atomic_write(open_folder / name, b"new")
    open_folder.chmod(0o755)
    assert_intact(open_folder / "old", b"old")


def test_a_write_protected_file_is_not_replaced(open_folder):
    open_folder.chmod(0o777)
    (open_folder / "old").write_bytes(b"old")
    (open_folder / "old").chmod(0o444)
    with without_privileges():
        atomic_write(open_folder / "mine", b"new")
        with pytest.raises(OutputError, match="write-protected: change its permissions"):
            atomic_write(open_folder / "old", b"new")
    assert (open_folder / "mine").read_bytes() == b"new"
    (open_folder / "mine").unlink()
    assert_intact(open_folder / "old", b"old")
