"""The engine cache: nothing half written, changed or foreign is ever run, and nothing is built twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from engine_cases import builder_of, key_of, plan_of
from mt3_runtime import engine_cache
from mt3_runtime.engine_cache import PLAN, SIDECAR, EngineCache
from mt3_runtime.engine_folder import default_folder
from mt3_runtime.engine_key import read_key
from mt3_runtime.errors import BundleError, DeviceError, Mt3Error, OutputError

KEY, OTHER = key_of(1), key_of(2)
FLIPS, CUTS, KILLS, ROUNDS = (
    int(os.environ.get(name, default))
    for name, default in (("FLIPS", 300), ("CUTS", 100), ("KILLS", 12), ("ROUNDS", 2))
)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "engines"


@pytest.fixture
def cache(folder):
    """A cache with two engines."""
    cache = EngineCache(folder)
    for key in (KEY, OTHER):
        assert cache.get(key, builder_of(key)).origin == "built"
    return cache


def never() -> None:
    raise AssertionError("it was there")


# ---- the key --------------------------------------------------------------------------------------------------------

CHANGES = {
    "graph": "encoder",
    "graph_sha256": "c" * 64,
    "weights_sha256": "d" * 64,
    "precision": "bf16",
    "computed": "fp32",
    "profile": "throughput",
    "axes": {"rows": (1, 4, 16), "length": (256, 256, 256)},
    "backend": "tensorrt",
    "backend_version": "1.7.2",
    "targets": ("sm_89", "sm_120"),
    "gpu": "NVIDIA L4",
    "cuda": "13.0",
    "driver": "580.65.06",
    "flags": (),
    "version": "1.1",
}


def test_every_part_of_a_key_makes_another_engine():
    assert set(CHANGES) == {field.name for field in fields(KEY)}
    changed = {replace(KEY, **{name: value}).digest for name, value in CHANGES.items()}
    assert len(changed | {KEY.digest}) == len(CHANGES) + 1


def test_a_key_survives_json():
    for key in (KEY, *(replace(KEY, **{name: value}) for name, value in CHANGES.items())):
        assert read_key(json.loads(json.dumps(key.to_dict())), "key") == key


@pytest.mark.parametrize(
    "parts",
    [
        {"graph_sha256": "../../etc"},
        {"axes": {"rows": (4, 1, 8)}},
        {"axes": {"rows": (1, 8)}},
        {"targets": ()},
        {"targets": ("89",)},
        {"backend_version": ""},
    ],
)
def test_impossible_keys_are_refused(parts):
    with pytest.raises(BundleError):
        replace(KEY, **parts)


# ---- use ------------------------------------------------------------------------------------------------------------


def test_an_engine_is_built_once(folder):
    built = []
    for origin in ("built", "cache", "cache"):
        engine = EngineCache(folder).get(KEY, builder_of(KEY, lambda: built.append(1)))
        assert (engine.origin, engine.plan, engine.entry.key) == (origin, plan_of(KEY), KEY)
    assert built == [1]
    assert [path.name for path in folder.iterdir()] == [KEY.digest]


def test_modes_keep_others_out(cache):
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert (cache.folder / KEY.digest).stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in cache.folder.rglob("*.*")} == {0o600}


def test_a_failed_build_leaves_nothing_and_is_passed_on(cache):
    def fail():
        raise DeviceError("no such kernel: use another GPU")

    with pytest.raises(DeviceError, match="no such kernel"):
        cache.get(key_of(3), fail)
    assert {path.name for path in cache.folder.iterdir()} == {KEY.digest, OTHER.digest}


def test_where_engines_go(monkeypatch, tmp_path):
    monkeypatch.setenv("MT3_ENGINE_CACHE", str(tmp_path / "own"))
    assert default_folder() == tmp_path / "own"
    monkeypatch.delenv("MT3_ENGINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "mt3-runtime" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "mt3-runtime" / "engines"


def test_extras_stay_with_their_engine(cache):
    name, found = "kernels for NVIDIA L4/580", cache.extra
    cache.keep_extra(KEY, name, b"compiled")
    assert found(KEY, name) == b"compiled"
    assert found(OTHER, name) is None
    (path,) = (cache.folder / KEY.digest).glob("extra-*")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert found(KEY, name) is None
    assert cache.load(KEY).plan == plan_of(KEY)
    with pytest.raises(OutputError):
        cache.keep_extra(key_of(3), "kernels", b"of an engine that is not there")


# ---- damage ---------------------------------------------------------------------------------------------------------


def damages(folder: Path, names: tuple[str, ...] = (SIDECAR, PLAN)):
    """Yield a word on every damage done to an engine, one after the other; no byte of its description is left out."""
    draw = np.random.default_rng(11)
    for name in names:
        path = folder / name
        whole = path.read_bytes()
        flips = range(len(whole)) if name == SIDECAR else draw.permutation(len(whole))[:FLIPS].tolist()
        bits = draw.integers(8, size=len(whole)).tolist()
        changed = [(whole[:i] + bytes([whole[i] ^ 1 << bits[i]]) + whole[i + 1 :], f"flip {i}") for i in flips]
        changed += [(whole[:i], f"cut {i}") for i in draw.permutation(len(whole))[:CUTS].tolist()]
        changed += [(whole + b"\n", "longer"), (whole * 2, "twice")]
        for data, what in changed:
            path.write_bytes(data)
            yield f"{name} {what}"
        path.write_bytes(whole)


def accepted(cache: EngineCache, *names: str) -> list[str]:
    """Damages that went unnoticed."""
    found = []
    for what in damages(cache.folder / KEY.digest, names or (SIDECAR, PLAN)):
        try:
            cache.load(KEY)
            found.append(what)
        except BundleError:
            continue
    return found


def test_flips_and_cuts_are_refused(cache):
    assert accepted(cache) == []
    assert cache.load(KEY).plan == plan_of(KEY)


def test_a_cache_that_does_not_look_is_caught(cache, monkeypatch):
    expected, real = cache.load(KEY).entry.sha256, engine_cache.hashlib.sha256

    class Trusting:
        def hexdigest(self):
            return expected

    monkeypatch.setattr(engine_cache.hashlib, "sha256", lambda data: Trusting() if len(data) == 5000 else real(data))
    assert len(accepted(cache, PLAN)) == FLIPS


def test_messages_of_refusals(cache):
    (cache.folder / KEY.digest / PLAN).write_bytes(b"x" * 5000)
    with pytest.raises(BundleError) as caught:
        cache.load(KEY)
    assert check_refusal(caught.value).startswith("engine decode_step 256 fp16 latency for sm_89")


def check_refusal(error: Mt3Error) -> str:
    text = str(error)
    assert text.isprintable()
    assert text.endswith("mt3-export engines")
    return text


def test_swapped_files_are_refused(cache):
    ours, theirs = cache.folder / KEY.digest, cache.folder / OTHER.digest
    for name in (SIDECAR, PLAN):
        whole = (ours / name).read_bytes()
        shutil.copy(theirs / name, ours / name)
        with pytest.raises(BundleError):
            cache.load(KEY)
        (ours / name).write_bytes(whole)
    shutil.rmtree(ours)
    theirs.rename(ours)  # both files of another engine
    with pytest.raises(BundleError):
        cache.load(KEY)


def test_what_is_damaged_is_built_again_and_said_so(cache):
    (cache.folder / KEY.digest / PLAN).write_bytes(b"half")
    told = []
    engine = cache.get(KEY, builder_of(KEY), told.append)
    assert (engine.origin, engine.plan, len(told)) == ("rebuilt", plan_of(KEY), 1)
    assert "building it again" in told[0]
    assert cache.get(KEY, never).origin == "cache"


def test_stale_engines_are_not_found(cache):
    newer = replace(KEY, backend_version="1.7.2")
    with pytest.raises(BundleError):
        cache.load(newer)
    assert cache.get(newer, builder_of(newer)).plan == plan_of(newer) != plan_of(KEY)


# ---- what is no file of ours ----------------------------------------------------------------------------------------


def linked_folder(cache):
    (cache.folder / KEY.digest).rename(cache.folder / "away")
    (cache.folder / KEY.digest).symlink_to("away")


def linked(name):
    def work(cache):
        path = cache.folder / KEY.digest / name
        path.rename(path.with_name("away"))
        path.symlink_to("away")

    return work


def fifo(name):
    def work(cache):
        path = cache.folder / KEY.digest / name
        path.unlink()
        os.mkfifo(path)

    return work


def folder_for_file(cache):
    path = cache.folder / KEY.digest / PLAN
    path.unlink()
    path.mkdir()


def writable(cache):
    (cache.folder / KEY.digest / PLAN).chmod(0o666)


def upper_case(cache):
    (cache.folder / KEY.digest).rename(cache.folder / KEY.digest.upper())


@pytest.mark.parametrize(
    "spoil",
    [linked_folder, linked(SIDECAR), linked(PLAN), fifo(SIDECAR), fifo(PLAN), folder_for_file, writable, upper_case],
)
def test_links_pipes_and_the_like_are_refused_and_replaced(cache, spoil):
    spoil(cache)
    with pytest.raises(BundleError) as caught:
        cache.load(KEY)
    check_refusal(caught.value)
    assert cache.get(KEY, builder_of(KEY)).plan == plan_of(KEY)
    assert cache.load(KEY).plan == plan_of(KEY)
    assert not (cache.folder / KEY.digest).is_symlink()


def refuse_folder(folder):
    for call in (lambda: EngineCache(folder).get(KEY, never), lambda: EngineCache(folder).load(KEY)):
        with pytest.raises(DeviceError) as caught:
            call()
        assert str(caught.value).endswith("set MT3_ENGINE_CACHE to a folder of your own")


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o777])
def test_a_folder_open_to_others_is_refused(cache, mode):
    cache.folder.chmod(mode)
    refuse_folder(cache.folder)


def test_a_linked_cache_is_refused(cache, tmp_path):
    (tmp_path / "link").symlink_to(cache.folder)
    refuse_folder(tmp_path / "link")


def test_a_shared_temporary_folder_is_refused(cache):
    cache.folder.parent.chmod(0o1777)
    refuse_folder(cache.folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can give a folder away")
def test_a_folder_of_another_user_is_refused(cache):
    os.chown(cache.folder, 65534, 65534)
    refuse_folder(cache.folder)


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(Mt3Error):
        EngineCache(tmp_path / "file").get(KEY, never)
    with pytest.raises(OutputError):
        EngineCache(tmp_path / "file" / "below").get(KEY, never)


# ---- accidents ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disturbed():
    """What disturbed_engines.py reports; KILLS=149 and ROUNDS=50 ask for more."""
    with tempfile.TemporaryDirectory() as work:
        Path(work).chmod(0o755)
        script = Path(__file__).parent / "disturbed_engines.py"
        command = [sys.executable, script, work, str(KILLS), str(ROUNDS)]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=900).stdout)


@pytest.mark.parametrize("kind", ["kills", "kills_of_repairs"])
def test_a_killed_build_leaves_no_half_engine(disturbed, kind):
    states = disturbed[kind]
    assert len(states) >= 12 + KILLS
    assert {state["old"] for state in states} == {True}
    assert {state["new"] for state in states} == {"none", "whole"}  # killed early, and late
    assert {state["then"] for state in states} == {True}
    assert [state["left"] for state in states if state["left"]] == []


def test_a_cache_that_does_not_sweep_is_caught(disturbed):
    assert any(state["left"] for state in disturbed["kills_unswept"])


def test_a_full_disk_is_reported_and_harms_nothing(disturbed):
    assert disturbed["full"] is True
    assert disturbed["not_full"] is False, "the test must tell a full disk from one with room"


def test_a_read_only_disk_is_reported_and_what_is_there_still_works(disturbed):
    assert disturbed["read_only"] is True


def test_one_of_eight_processes_builds(disturbed):
    assert disturbed["race"] == {"builds": ROUNDS, "right": True, "left": []}


def test_without_locks_all_may_build_and_nothing_breaks(disturbed):
    report = disturbed["race_without_locks"]
    assert report["right"] is True
    assert report["left"] == []
    assert report["builds"] > ROUNDS, "the race must be one"
