"""A bundle is refused before an engine sees it, whatever was done to its files."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import stat
import tracemalloc
from itertools import combinations
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from bundle_cases import check_all, copied, forge, no_blocking, no_open_files_left, refusal
from mt3_runtime import bundle as bundles
from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import BundleError
from mt3_runtime.graphs import GRAPH_NAMES

MANIFEST, WEIGHTS, GRAPH = "manifest.json", "weights.fp32.bin", "decode_step.fp32.ort.onnx"
NAMES = [f"{name}.fp32.{lowering}.onnx" for name in GRAPH_NAMES for lowering in ("ort", "tensorrt")]
FILES = [MANIFEST, WEIGHTS, *NAMES]


@pytest.fixture(scope="module")
def damaged(tiny_folder, tmp_path_factory):
    """A copy whose files are damaged and repaired in place."""
    return copied(tiny_folder, tmp_path_factory.mktemp("damaged") / "tiny")


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return copied(tiny_folder, tmp_path / "tiny")


def check_file(folder: Path, name: str) -> None:
    """Open the bundle and verify one file: what a backend does before it uses it."""
    bundle = open_bundle(folder)
    if name != MANIFEST:
        bundle.verify(name)


def test_a_bundle_is_its_files(tiny_folder, tiny_bundle):
    assert sorted(path.name for path in tiny_folder.iterdir()) == sorted(FILES)
    assert sorted(tiny_bundle.manifest.files) == sorted(set(FILES) - {MANIFEST})
    assert tiny_bundle.sha256 == hashlib.sha256((tiny_folder / MANIFEST).read_bytes()).hexdigest()
    for name in tiny_bundle.manifest.files:
        assert tiny_bundle.read(name) == (tiny_folder / name).read_bytes()
        assert tiny_bundle.verify(name) == tiny_folder / name


def test_10000_flipped_bits(damaged):
    generator = np.random.default_rng(3)
    bundle = open_bundle(damaged)
    for name in FILES:
        path = damaged / name
        whole = path.read_bytes()
        check = (open_bundle, damaged) if name == MANIFEST else (bundle.verify, name)
        with path.open("r+b", buffering=0) as file:
            for bit in generator.integers(8 * len(whole), size=10_000 // len(FILES)).tolist():
                place = bit // 8
                os.pwrite(file.fileno(), bytes([whole[place] ^ 1 << bit % 8]), place)
                refusal(*check)
                os.pwrite(file.fileno(), whole[place : place + 1], place)
    check_all(damaged)


def test_200_truncated_files(damaged):
    generator = np.random.default_rng(4)
    for name in FILES:
        path = damaged / name
        whole = path.read_bytes()
        for length in (0, len(whole) - 1, *generator.integers(len(whole), size=200 // len(FILES) - 2).tolist()):
            path.write_bytes(whole[:length])
            refusal(check_file, damaged, name)
        path.write_bytes(whole)
    check_all(damaged)


@pytest.mark.parametrize("tail", [b"\0", b"\n", b" " * 4096])
def test_longer_files(damaged, tail):
    for name in FILES:
        path = damaged / name
        whole = path.read_bytes()
        path.write_bytes(whole + tail)
        refusal(check_file, damaged, name)
        path.write_bytes(whole)
    check_all(damaged)


def test_swapped_files(damaged):
    contents = {name: (damaged / name).read_bytes() for name in FILES}
    for one, other in combinations(FILES, 2):
        if contents[one] == contents[other]:  # the cross_kv graphs of both lowerings are one and the same
            assert {one, other} == {"cross_kv.fp32.ort.onnx", "cross_kv.fp32.tensorrt.onnx"}
            continue
        (damaged / one).write_bytes(contents[other])
        (damaged / other).write_bytes(contents[one])
        for name in {one, other}:
            refusal(check_file, damaged, name)
        for name in (one, other):
            (damaged / name).write_bytes(contents[name])
    check_all(damaged)


def test_missing_files(folder):
    for name in FILES:
        (folder / name).rename(folder / "aside")
        assert "No such file" in refusal(check_file, folder, name)
        (folder / "aside").rename(folder / name)


def test_files_of_another_bundle(folder):
    other = bytearray((folder / WEIGHTS).read_bytes())
    other[0] ^= 1
    (folder / WEIGHTS).write_bytes(other)
    assert "not what the manifest lists" in refusal(check_file, folder, WEIGHTS)
    check_all(forge(folder, {WEIGHTS: bytes(other)}))


def test_another_bundle_has_another_hash(folder, tiny_bundle):
    forge(folder, {WEIGHTS: b"other"})
    assert open_bundle(folder).sha256 != tiny_bundle.sha256


def test_case_is_not_folded(folder):
    for name in FILES:
        (folder / name).rename(folder / name.upper())
        refusal(check_file, folder, name)
        (folder / name.upper()).rename(folder / name)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, "encoder.fp32.ort.onnx", "cross_kv.fp32.ort.onnx", GRAPH])
def test_no_engine_sees_a_damaged_file(folder, monkeypatch, name):
    def engine(data, *_, **__):
        seen.append(hashlib.sha256(data).hexdigest())
        raise RuntimeError("an engine was started")

    seen = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", engine)
    damaged = bytearray((folder / name).read_bytes())
    damaged[len(damaged) // 2] ^= 4
    (folder / name).write_bytes(damaged)
    refusal(lambda: OrtBackend(open_bundle(folder), slots=1, threads=1))
    assert hashlib.sha256(damaged).hexdigest() not in seen
    if name in (MANIFEST, WEIGHTS, "encoder.fp32.ort.onnx"):
        assert not seen


def link(path: Path, aside: Path) -> None:
    path.symlink_to(aside)


def relative_link(path: Path, aside: Path) -> None:
    path.symlink_to(os.path.relpath(aside, path.parent))


def dangling(path: Path, aside: Path) -> None:
    path.symlink_to(aside.parent / "nowhere")


def loop(path: Path, _: Path) -> None:
    path.symlink_to(path.name)


def endless(path: Path, _: Path) -> None:
    path.symlink_to("/dev/zero")


def terminal(path: Path, _: Path) -> None:
    path.symlink_to("/dev/tty")


def fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path, _: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # the whole path may be longer than a socket's name
        server.bind(path.name)


def directory(path: Path, _: Path) -> None:
    path.mkdir()


def device(path: Path, _: Path) -> None:
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root makes devices")


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, GRAPH])
@pytest.mark.parametrize(
    "make", [link, relative_link, dangling, loop, endless, terminal, fifo, unix_socket, directory, device]
)
def test_special_files_are_refused_without_blocking(folder, tmp_path, monkeypatch, name, make):
    monkeypatch.chdir(tmp_path)
    (folder / name).rename(tmp_path / "aside")  # the right content, in the wrong place
    make(folder / name, tmp_path / "aside")
    with no_blocking(), no_open_files_left():
        message = refusal(check_file, folder, name)
    assert "cannot read" in message or "is not a plain file" in message


def test_a_pipe_that_would_deliver_the_right_bytes_is_refused(folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    descriptor = os.open(folder / WEIGHTS, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(descriptor, whole[:4096])
        with no_blocking():
            assert "is not a plain file" in refusal(check_file, folder, WEIGHTS)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, GRAPH])
@pytest.mark.parametrize(("call", "code"), [("open", errno.EACCES), ("read", errno.EIO), ("fstat", errno.ESTALE)])
def test_failing_disks_are_reported(folder, monkeypatch, name, call, code):
    real_open, broken = os.open, set()

    def opened(path, *arguments, **options):
        if Path(path).name == name and call == "open":
            raise OSError(code, os.strerror(code))
        descriptor = real_open(path, *arguments, **options)
        if Path(path).name == name:
            broken.add(descriptor)
        return descriptor

    def failing(real):
        def replacement(descriptor, *arguments):
            if descriptor in broken:
                raise OSError(code, os.strerror(code))
            return real(descriptor, *arguments)

        return replacement

    with no_open_files_left():
        monkeypatch.setattr(bundles.os, "open", opened)
        if call != "open":
            monkeypatch.setattr(bundles.os, call, failing(getattr(os, call)))
        message = refusal(check_file, folder, name)
        monkeypatch.undo()
    assert os.strerror(code) in message


def test_descriptors_left_open_are_noticed(folder):
    """The check itself, against a planted leak."""
    with pytest.raises(AssertionError, match="left open"), no_open_files_left():
        descriptor = os.open(folder / WEIGHTS, os.O_RDONLY)
    os.close(descriptor)


def test_a_hanging_pipe_is_noticed(folder):
    """The check itself, against a reader that would wait for ever."""
    os.mkfifo(folder / "pipe")
    with pytest.raises(TimeoutError), no_blocking(0.1):
        (folder / "pipe").read_bytes()


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST])
def test_enormous_files_are_not_read_to_their_end(folder, name):
    os.truncate(folder / name, 2**40)  # a hole: takes no room on the disk
    tracemalloc.start()
    try:
        with no_blocking():
            refusal(check_file, folder, name)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_large_files_are_hashed_piece_by_piece(folder):
    size = 2**26
    forge(folder, {WEIGHTS: bytes(size)})
    bundle = open_bundle(folder)
    tracemalloc.start()
    try:
        bundle.verify(WEIGHTS)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere", "does not exist: name a folder"),
        ("nowhere/deeper", "does not exist: name a folder"),
        ("file", "is not a folder: name a folder"),
        ("file/deeper", "does not exist: name a folder"),
        ("loop", "is not a folder: name a folder"),
        ("dangling", "is not a folder: name a folder"),
        ("x" * 300, "does not exist: name a folder"),
        ("x/" * 3000, "does not exist: name a folder"),
        ("a\0b", "does not exist: name a folder"),
        ("empty", "No such file or directory"),
    ],
)
def test_what_is_no_bundle(tmp_path, name, why):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=why) as caught:
        open_bundle(tmp_path / name)
    assert len(str(caught.value)) < 500


def test_a_folder_may_be_a_link_and_hold_more(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    (folder / "README").write_text("mine")
    check_all(tmp_path / "link")
    check_all(str(tmp_path / "link") + "/")


def test_hard_links_and_copies_are_files_like_any_other(folder, tmp_path):
    (tmp_path / "other").mkdir()
    for path in folder.iterdir():
        os.link(path, tmp_path / "other" / path.name)
    shutil.rmtree(folder)
    check_all(tmp_path / "other")


@pytest.mark.parametrize("form", [("encoder", "ort", "int8"), ("encoder", "onnx", "fp32"), ("vocoder", "ort", "fp32")])
def test_forms_that_a_bundle_does_not_hold_are_named(tiny_bundle, form):
    message = refusal(tiny_bundle.graph, *form)
    assert "/".join(form[1:]) in message
    assert "only ort/fp32, tensorrt/fp32" in message
