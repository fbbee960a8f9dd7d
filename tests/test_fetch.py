import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import numpy as np
import pytest

from hub import COMMIT, serve
from mt3_export import fetch
from mt3_export.fetch import default_directory, fetch_checkpoint
from mt3_export.published import PUBLISHED
from mt3_runtime.errors import CheckpointError, DependencyError, OutputError

CHUNK = 16_384
CONTENT = np.random.default_rng(0).bytes(1_000_000)
ROW = replace(
    PUBLISHED["mt3"],
    name="small",
    repository="someone/weights",
    revision=COMMIT,
    filename="logs/2024/run/model.ckpt",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    size=len(CONTENT),
)
TABLE = {"small": ROW}


@pytest.fixture
def hub(monkeypatch):
    with serve(CONTENT) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
        yield server


def get(folder, row=ROW):
    return fetch_checkpoint("small", folder, table={"small": row})


def partial(folder):
    return folder / f".small.ckpt.{ROW.sha256[:16]}.part"


def failure(folder, kind=CheckpointError, row=ROW):
    with pytest.raises(kind) as caught:
        get(folder, row)
    assert "\n" not in str(caught.value)
    assert not (folder / "small.ckpt").exists()
    return str(caught.value)


def test_a_file_is_fetched_once_and_then_needs_no_network(hub, tmp_path):
    folder = tmp_path / "deep" / "folder"
    path = get(folder)
    assert path == folder / "small.ckpt"
    assert path.read_bytes() == CONTENT
    assert not partial(folder).exists()
    wanted = f"/someone/weights/resolve/{COMMIT}/logs/2024/run/model.ckpt"
    assert hub.requests == [("HEAD", wanted, None), ("GET", wanted, None)]
    folder.chmod(0o500)
    assert get(folder) == path
    assert len(hub.requests) == 2


def test_a_space_is_asked_as_a_space(hub, tmp_path):
    get(tmp_path, replace(ROW, repository_type="space"))
    assert hub.requests[0][1].startswith("/spaces/someone/weights/resolve/")


def test_a_lost_revision_falls_back_to_main(hub, tmp_path):
    hub.revisions = {"main"}
    assert get(tmp_path).read_bytes() == CONTENT
    assert "/resolve/main/" in hub.requests[-1][1]


@pytest.mark.parametrize("fault", ["close", "reset"])
def test_a_broken_connection_is_resumed_where_it_broke(hub, tmp_path, fault):
    hub.faults.extend([(fault, 400_000), (fault, 300_000)])
    assert get(tmp_path).read_bytes() == CONTENT
    starts = [0 if asked is None else int(asked[len("bytes=") : -1]) for asked in hub.ranges]
    assert len(starts) == 3
    assert starts == sorted(starts)
    assert starts[0] == 0
    # What was cut off within a chunk may be asked for again; a reset may also cost what lay unread in the socket.
    assert all(start % CHUNK == 0 for start in starts[1:])
    assert fault == "reset" or starts[1] > 400_000 - CHUNK
    assert fault == "reset" or starts[2] > starts[1] + 300_000 - CHUNK


def test_a_server_without_ranges_is_read_from_the_start(hub, tmp_path):
    partial(tmp_path).write_bytes(CONTENT[:500_000])
    hub.faults.append(("whole", 0))
    assert get(tmp_path).read_bytes() == CONTENT
    assert hub.ranges == ["bytes=500000-"]


def test_a_killed_download_is_continued_by_the_next_run(hub, tmp_path):
    hub.faults.append(("hold", 600_000))
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import huggingface_hub.constants
        huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}
        import test_fetch
        from pathlib import Path
        test_fetch.get(Path({str(tmp_path)!r}))
    """
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.DEVNULL, env=environment
    )
    limit = time.monotonic() + 20
    while not partial(tmp_path).exists() or partial(tmp_path).stat().st_size < 500_000:
        assert time.monotonic() < limit
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "small.ckpt").exists()
    kept = partial(tmp_path).stat().st_size
    assert get(tmp_path).read_bytes() == CONTENT
    assert hub.ranges == [None, f"bytes={kept}-"]


def test_a_partial_file_that_is_complete_or_too_long_is_handled(hub, tmp_path):
    partial(tmp_path).write_bytes(CONTENT)
    assert get(tmp_path).read_bytes() == CONTENT
    assert hub.requests == []
    (tmp_path / "small.ckpt").unlink()
    partial(tmp_path).write_bytes(CONTENT + b"more")
    assert get(tmp_path).read_bytes() == CONTENT
    assert hub.ranges == [None]


def test_a_wrong_hash_never_gets_the_name_and_is_removed(hub, tmp_path):
    hub.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    assert f"not {ROW.sha256}, and was removed: try again" in failure(tmp_path)
    assert not partial(tmp_path).exists()
    hub.content = CONTENT
    assert get(tmp_path).read_bytes() == CONTENT


def test_a_damaged_partial_file_is_found_out(hub, tmp_path):
    partial(tmp_path).write_bytes(bytes(300_000))
    assert "was removed" in failure(tmp_path)
    assert get(tmp_path).read_bytes() == CONTENT


def test_another_size_is_refused_before_anything_is_downloaded(hub, tmp_path):
    hub.announced_size = 5
    assert f"has 5 bytes, the published small has {len(CONTENT)}" in failure(tmp_path)
    assert hub.ranges == []


def test_another_file_in_its_place_is_refused_and_left_alone(hub, tmp_path):
    for other in (CONTENT[:-1] + b"\0", b"mine"):
        (tmp_path / "small.ckpt").write_bytes(other)
        with pytest.raises(CheckpointError, match="is not the published small: move it away"):
            get(tmp_path)
        assert (tmp_path / "small.ckpt").read_bytes() == other
    (tmp_path / "small.ckpt").unlink()
    (tmp_path / "small.ckpt").mkdir()
    with pytest.raises(CheckpointError, match="move it away"):
        get(tmp_path)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "EntryNotFound", "someone/weights does not have the file (HTTP 404)"),
        (404, "RepoNotFound", "someone/weights does not have the file (HTTP 404)"),
        (401, "RepoNotFound", "refused access (HTTP 401): set HF_TOKEN"),
        (401, "", "refused access (HTTP 401): set HF_TOKEN"),
        (403, "GatedRepo", "refused access (HTTP 403): set HF_TOKEN"),
        (500, "", "answered HTTP 500: run it again later"),
    ],
)
def test_refusals_of_the_server_are_plain(hub, tmp_path, status, code, words):
    hub.status, hub.error_code = status, code
    assert words in failure(tmp_path)


def test_a_revision_that_is_nowhere_is_plain(hub, tmp_path):
    hub.revisions = set()
    assert "does not have the file (HTTP 404)" in failure(tmp_path)


def test_no_network_is_plain_and_quick(hub, tmp_path, monkeypatch):
    with serve(b"") as gone:
        address = gone.address
    monkeypatch.setenv("HF_ENDPOINT", address)
    start = time.monotonic()
    assert "check the network and run it again" in failure(tmp_path)
    assert time.monotonic() - start < 5
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    assert "set it to an address that starts with https://" in failure(tmp_path)


def test_a_network_that_stays_away_keeps_what_was_fetched(hub, tmp_path, monkeypatch):
    def broken(url, file, *, resume_size, **rest):
        if resume_size == 0:
            file.write(CONTENT[:200_000])
        message = "no route\nto host"
        raise ConnectionError(message) if resume_size else fetch._transport_error()(message)

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.file_download, "http_get", broken)
        assert "(no route to host): check the network" in failure(tmp_path)
    assert partial(tmp_path).read_bytes() == CONTENT[:200_000]
    assert get(tmp_path).read_bytes() == CONTENT
    assert hub.ranges == ["bytes=200000-"]


def test_too_little_space_is_said_before_anything_is_downloaded(hub, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "has 0 MiB free" in failure(tmp_path, OutputError)
    assert hub.requests == []


def test_a_disk_that_fills_up_keeps_what_was_written(hub, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
        assert "free some space or choose another directory" in failure(tmp_path, OutputError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert partial(tmp_path).read_bytes() == CONTENT[:400_000]
    assert get(tmp_path).read_bytes() == CONTENT
    assert hub.ranges == [None, "bytes=400000-"]


def test_a_folder_that_cannot_be_made_is_plain(hub, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be used (Not a directory)" in failure(tmp_path / "file" / "folder", OutputError)


def test_concurrent_fetches_download_once(hub, tmp_path):
    hub.faults.append(("hold", 500_000))
    found = []
    threads = [threading.Thread(target=lambda: found.append(get(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert len(hub.ranges) == 1
    hub.release.set()
    for thread in threads:
        thread.join(20)
    assert found == [tmp_path / "small.ckpt"] * 4
    assert (tmp_path / "small.ckpt").read_bytes() == CONTENT
    # The held connection breaks when it is released, so one download is two requests.
    assert len(hub.ranges) == 2


def test_a_missing_hub_library_is_plain(hub, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub.file_download", None)
    assert "pip install huggingface_hub, or" in failure(tmp_path, DependencyError)


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(CheckpointError, match="no published checkpoint is called 'x': use one of small"):
        fetch_checkpoint("x", tmp_path, table=TABLE)


def test_the_default_directory_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in (None, "", "relative/cache"):
        os.environ.pop("XDG_CACHE_HOME", None)
        if value is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_directory() == tmp_path / ".cache" / "mt3-runtime" / "checkpoints"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_directory() == tmp_path / "x" / "mt3-runtime" / "checkpoints"


@pytest.mark.parametrize(
    ("name", "size", "start", "path"),
    [
        ("ymt3plus", 542_707_465, "76673d42", "notask_all_cross_v6_xk2_amp0811_gm_ext_plus_nops_b72 model.ckpt"),
        (
            "yptf-single", 361_050_039, "507ff129",
            "ptf_all_cross_rebal5_mirst_xk2_edr005_attend_c_full_plus_b100 model.ckpt",
        ),
        (
            "yptf-multi", 541_553_263, "f7ed46a7",
            "ptf_mc13_256_all_cross_v6_xk5_amp0811_edr005_attend_c_full_plus_2psn_nl26_sb_b26r_800k model.ckpt",
        ),
        (
            "yptf-moe-multi", 561_544_628, "ae38e415",
            "mc13_256_g4_all_v7_mt3f_sqr_rms_moe_wf4_n8k2_silu_rope_rp_b36_nops last.ckpt",
        ),
        (
            "yptf-moe-multi-ps", 758_957_292, "7427055b",
            "mc13_256_g4_all_v7_mt3f_sqr_rms_moe_wf4_n8k2_silu_rope_rp_b80_ps2 model.ckpt",
        ),
    ],
)  # fmt: skip
def test_the_files_of_yourmt3_are_asked_for_where_they_lie(hub, tmp_path, name, size, start, path):
    row = PUBLISHED[name]
    assert (row.size, row.sha256[:8], row.local_name, row.model) == (size, start, f"{name}.ckpt", name)
    directory, file = path.split(" ")
    hub.announced_size = size + 1
    hub.revisions = {row.revision}
    with pytest.raises(CheckpointError, match=f"the published {name} has {size}"):
        fetch_checkpoint(name, tmp_path)
    address = f"/spaces/mimbres/YourMT3/resolve/{row.revision}/amt/logs/2024/{directory}/checkpoints/{file}"
    assert hub.requests == [("HEAD", address, None)]
