"""`mt3-run engines`: what is in the cache, and how it is made smaller."""

from __future__ import annotations

import json

import pytest

from engine_cases import builder_of, key_of
from mt3_runtime import engine_cache
from mt3_runtime.cli import main
from mt3_runtime.engine_cache import PLAN, EngineCache
from mt3_runtime.engine_key import read_key

KEY, OTHER = key_of(1), key_of(2)


@pytest.fixture
def cache(tmp_path):
    """A cache with two engines."""
    cache = EngineCache(tmp_path / "engines")
    for key in (KEY, OTHER):
        cache.get(key, builder_of(key))
    return cache


@pytest.fixture
def command(cache, monkeypatch, capsys):
    monkeypatch.setenv("MT3_ENGINE_CACHE", str(cache.folder))

    def run(*arguments: str) -> str:
        assert main(["engines", *arguments]) == 0
        return capsys.readouterr().out

    return run


def test_list(command, cache):
    lines = command("list").splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(min(KEY.digest, OTHER.digest)[:12])
    assert "2 engines" in lines[-1]
    listed = json.loads(command("list", "--json"))
    assert [engine["digest"] for engine in listed] == sorted([KEY.digest, OTHER.digest])
    assert read_key(listed[0]["key"], "key").digest == listed[0]["digest"]


def test_prune_removes_what_is_damaged_or_left(command, cache):
    (cache.folder / KEY.digest / PLAN).write_bytes(b"half")
    (cache.folder / f".{OTHER.digest}.0123456789ab.partial").mkdir()
    (cache.folder / f".{OTHER.digest}.lock").touch()
    (cache.folder / "mine").touch()  # nothing of ours
    assert "1 engines removed" in command("prune")
    assert {path.name for path in cache.folder.iterdir()} == {OTHER.digest, "mine"}


def test_prune_by_age_and_all(command, cache, monkeypatch):
    assert "0 engines" in command("prune", "--older-than", "1")
    now = engine_cache.time.time()
    monkeypatch.setattr(engine_cache.time, "time", lambda: now + 2 * 86_400)
    newer = key_of(3)
    cache.get(newer, builder_of(newer))
    assert "2 engines removed" in command("prune", "--older-than", "1")
    assert [entry.key for entry in cache.entries()] == [newer]
    assert "1 engines removed" in command("prune", "--all")
    assert list(cache.folder.iterdir()) == []


def test_commands_without_a_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MT3_ENGINE_CACHE", str(tmp_path / "none"))
    assert main(["engines", "list"]) == 0
    assert main(["engines", "prune", "--all"]) == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("days", ["nan", "-1", "inf", "x"])
def test_an_age_is_a_number_of_days(capsys, days):
    with pytest.raises(SystemExit):
        main(["engines", "prune", f"--older-than={days}"])
    assert capsys.readouterr().err.startswith("mt3-run engines prune: error: argument --older-than: ")


def test_a_cache_whose_name_is_too_long_is_empty(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MT3_ENGINE_CACHE", str(tmp_path / ("y" * 300)))
    assert main(["engines", "list"]) == 0
    assert "0 engines" in capsys.readouterr().out


def test_commands_on_a_foreign_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "open").mkdir(mode=0o755)
    monkeypatch.setenv("MT3_ENGINE_CACHE", str(tmp_path / "open"))
    assert main(["engines", "prune", "--all"]) == 2
    assert "MT3_ENGINE_CACHE" in capsys.readouterr().err
