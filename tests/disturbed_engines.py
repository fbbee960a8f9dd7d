"""Engine caches whose users are killed, run out of room or race, each a process; what comes of it is printed as JSON.

usage: disturbed_engines.py WORK KILLS ROUNDS
A script, because a process with one thread can fork in a millisecond, where a new one takes seconds to import torch.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np

from engine_cases import builder_of, key_of, plan_of
from mt3_runtime import engine_cache, engine_folder
from mt3_runtime.engine_cache import EngineCache
from mt3_runtime.errors import BundleError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.scandir", "os.listdir", "shutil.rmtree", "fcntl.flock"}
TRACED = {engine_cache.__file__, engine_folder.__file__}
OLD, NEW, NEXT = key_of(1), key_of(2), key_of(3)
NOBODY = 65534


def in_child(work: Callable[[], object]) -> int:
    """How a child that does `work` ends: its wait status, exit code 0 if nothing was raised."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at_event(work: Callable[[], object], number: int) -> bool:
    """Kill `work` just before its `number`-th call on the file system; False if it has no so many."""
    left = number

    def hook(event: str, _: object) -> None:
        nonlocal left
        left -= event in EVENTS
        if left == 0:
            left = -1  # killing is an event too
            die()

    def run() -> None:
        sys.addaudithook(hook)
        work()

    return os.WIFSIGNALED(in_child(run))


def dying_at_line(work: Callable[[], object], number: int) -> bool:
    """Kill `work` before the `number`-th line of the cache that it runs."""
    left = number

    def trace(frame: object, event: str, _: object) -> object:
        nonlocal left
        if frame.f_code.co_filename not in TRACED:
            return None
        left -= event == "line"
        if left <= 0:
            die()
        return trace

    def run() -> None:
        sys.settrace(trace)
        work()

    return os.WIFSIGNALED(in_child(run))


def state(folder: Path) -> dict[str, object]:
    """What a cache holds after an accident, and after the next builds."""
    cache, notes = EngineCache(folder), []
    try:
        old = cache.load(OLD).plan == plan_of(OLD)
    except BundleError:
        old = False
    try:
        new = "whole" if cache.load(NEW).plan == plan_of(NEW) else "wrong"
    except BundleError:
        new = "none"
    engine = cache.get(NEW, builder_of(NEW), notes.append)
    cache.get(NEXT, builder_of(NEXT))
    left = sorted({path.name for path in folder.iterdir()} - {key.digest for key in (OLD, NEW, NEXT)})
    return {"old": old, "new": new, "then": engine.plan == plan_of(NEW), "left": left}


def fresh(work: Path, name: str, *, damaged: bool = False) -> Path:
    """A cache with one engine, and a damaged one if asked for."""
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    cache = EngineCache(folder)
    cache.get(OLD, builder_of(OLD))
    if damaged:
        cache.get(NEW, builder_of(NEW))
        (folder / NEW.digest / engine_cache.PLAN).write_bytes(b"half")
    return folder


def kills(work: Path, count: int, *, damaged: bool) -> list[dict[str, object]]:
    """States after being killed before every call on the file system, and at `count` lines."""
    found, number = [], 0
    while True:
        number += 1
        folder = fresh(work, "killed", damaged=damaged)
        if not dying_at_event(lambda folder=folder: EngineCache(folder).get(NEW, builder_of(NEW)), number):
            break
        found.append(state(folder))
    lines = np.random.default_rng(3).permutation(np.arange(1, 150))[:count].tolist()
    for line in lines:
        folder = fresh(work, "killed", damaged=damaged)
        dying_at_line(lambda folder=folder: EngineCache(folder).get(NEW, builder_of(NEW)), line)
        found.append(state(folder))
    return found


def refused(folder: Path, before: Callable[[], object]) -> bool:
    """Whether building NEW fails as an OutputError, with OLD intact; `before` makes the trouble."""

    def run() -> None:
        before()
        cache = EngineCache(folder)
        try:
            cache.get(NEW, builder_of(NEW))
        except OutputError as error:
            if ": " not in str(error) or not str(error).isprintable():
                raise
        else:
            raise AssertionError
        if cache.load(OLD).plan != plan_of(OLD):
            raise AssertionError

    return in_child(run) == 0


def limit_files() -> None:
    """Files of at most 2000 bytes: writing more fails in the middle, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def read_only(work: Path) -> bool:
    """A cache without write permission; for the superuser, who has all of them, as another user."""
    folder = fresh(work, "read_only")
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    folder.chmod(0o500)
    try:
        return refused(folder, lambda: os.geteuid() or os.seteuid(NOBODY))
    finally:
        folder.chmod(0o700)


def race(folder: Path, rounds: int, *, locks: bool) -> dict[str, object]:
    """Eight processes that want the same engine at the same time, round after round; a build takes 200 ms."""
    log = folder.parent / "builds"
    log.unlink(missing_ok=True)

    def slowly() -> None:
        with log.open("a") as file:
            file.write("x")
        time.sleep(0.2)

    def run(key: object, start: float) -> None:
        time.sleep(max(0.0, start - time.time()))
        flock = engine_folder._flock if locks else lambda *_, **__: None
        with mock.patch.object(engine_folder, "_flock", flock):
            engine = EngineCache(folder).get(key, builder_of(key, slowly))
        if engine.plan != plan_of(key):
            raise AssertionError

    right = True
    for number in range(rounds):
        key, start = key_of(100 + number), time.time() + 0.02
        children = []
        for _ in range(8):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    run(key, start)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        right &= all(os.waitpid(child, 0)[1] == 0 for child in children)
        right &= EngineCache(folder).load(key).plan == plan_of(key)
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return {"builds": len(log.read_text()), "right": right, "left": left}


def main() -> None:
    work, count, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    report = {
        "kills": kills(work, count, damaged=False),
        "kills_of_repairs": kills(work, count, damaged=True),
        "full": refused(fresh(work, "full"), limit_files),
        "not_full": refused(fresh(work, "not_full"), lambda: None),
        "read_only": read_only(work),
        "race": race(fresh(work, "race"), rounds, locks=True),
        "race_without_locks": race(fresh(work, "unlocked"), rounds, locks=False),
    }
    with mock.patch.object(engine_cache, "sweep"):
        report["kills_unswept"] = kills(work, 0, damaged=False)
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
