"""Exports that are killed, or run out of room, each in a process of its own; what they leave is printed as JSON.

usage: killed_exports.py BUNDLE WORK COUNT
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
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bundle_cases import check_all
from fast_export import FastExport
from mt3_export import bundle_folder, bundle_writer, weights_file
from mt3_runtime.errors import BundleError, Mt3Error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Export = Callable[[Path], object]

EVENTS = {"open", "os.mkdir", "os.rename", "os.scandir", "os.listdir", "shutil.rmtree", "fcntl.flock"}
TRACED = {bundle_folder.__file__, bundle_writer.__file__, weights_file.__file__}


def in_child(work: Callable[[], object]) -> int:
    """How a child that does `work` ends: its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at_event(export: Export, output: Path, number: int) -> bool:
    """Kill an export just before its `number`-th call on the file system; False if it has no so many."""
    left = number

    def hook(event: str, _: object) -> None:
        nonlocal left
        left -= event in EVENTS
        if left == 0:
            left = -1  # killing is an event too
            die()

    def work() -> None:
        sys.addaudithook(hook)
        export(output)
        os._exit(0)

    return os.WIFSIGNALED(in_child(work))


def dying_at_line(export: Export, output: Path, number: int) -> bool:
    """Kill an export before the `number`-th line of the writer that it runs."""
    left = number

    def trace(frame: object, event: str, _: object) -> object:
        nonlocal left
        if frame.f_code.co_filename not in TRACED:
            return None
        left -= event == "line"
        if left <= 0:
            die()
        return trace

    def work() -> None:
        sys.settrace(trace)
        export(output)
        os._exit(0)

    return os.WIFSIGNALED(in_child(work))


def dying_after(export: Export, output: Path, seconds: float) -> bool:
    """Kill an export from outside, wherever it is then."""
    child = os.fork()
    if child == 0:
        try:
            export(output)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def is_whole(folder: Path) -> bool:
    try:
        check_all(folder)
    except BundleError:
        return False
    return True


def is_copy(folder: Path, reference: Path) -> bool:
    contents = [{path.name: path.read_bytes() for path in place.iterdir()} for place in (folder, reference)]
    return contents[0] == contents[1] and is_whole(folder)


def outcome(work: Path, reference: Path) -> str:
    """What an export left under the name `new` beside `old`; whatever is left over is then removed as by the next."""
    new, old = work / "new", work / "old"
    leftovers = list(work.glob(".new.*.partial"))
    if new.exists():
        result = "whole" if is_copy(new, reference) and not leftovers else "broken"
        shutil.rmtree(new)
    else:
        # killed after its manifest was written, but before it was renamed, one is whole
        fine = all(is_copy(path, reference) or not is_whole(path) for path in leftovers)
        result = ("leftover" if fine else "broken") if leftovers else "nothing"
    bundle_folder.remove_leftovers(new)
    if not is_whole(old) or [path.name for path in work.iterdir()] != ["old"]:
        result = "damage"
    return result


def killed_at_events(export: Export, work: Path, reference: Path) -> Counter[str]:
    """Kill at every call on the file system."""
    left = Counter()
    number = 1
    while dying_at_event(export, work / "new", number):
        left[outcome(work, reference)] += 1
        number += 1
    left["at the end: " + outcome(work, reference)] += 1
    return left


def killed_at_lines(export: Export, work: Path, reference: Path, count: int) -> Counter[str]:
    """Kill at `count` lines picked by chance."""
    lines = 64
    while dying_at_line(export, work / "new", lines):
        outcome(work, reference)
        lines *= 2
    outcome(work, reference)
    left = Counter()
    for line in np.random.default_rng(11).integers(1, lines, count).tolist():
        dying_at_line(export, work / "new", line)
        left[outcome(work, reference)] += 1
    return left


def killed_at_moments(export: Export, work: Path, reference: Path, count: int) -> Counter[str]:
    """Kill at `count` moments picked by chance."""
    left = Counter()
    for seconds in np.random.default_rng(12).uniform(0, 0.08, count).tolist():
        dying_after(export, work / "new", seconds)
        left[outcome(work, reference)] += 1
    return left


def refused(export: Export, output: Path, prepare: Callable[[], object]) -> str:
    """The error with which an export ends in a child that was prepared so."""
    reader, writer = os.pipe()

    def work() -> None:
        prepare()
        try:
            export(output)
            message = "none"
        except Mt3Error as error:
            message = f"{type(error).__name__}: {error}"
        except BaseException as error:  # noqa: BLE001 -- that there is none of these is what is tested
            message = f"traceback: {error!r}"
        os.write(writer, message.encode())
        os._exit(0)

    in_child(work)
    os.close(writer)
    with os.fdopen(reader) as stream:
        return stream.read()


def out_of_room(export: Export, work: Path, reference: Path) -> Iterable[tuple[int, str, str]]:
    """Allow files of so many bytes only, from none to just too few for the largest."""
    sizes = sorted({path.stat().st_size for path in reference.iterdir()})
    limits = {0, 1, 4096, 100_000, *(size - 1 for size in sizes), sizes[-1] - 4096}
    for limit in sorted(limits):

        def prepare(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        yield limit, refused(export, work / "new", prepare), outcome(work, reference)


def write_protected(export: Export, work: Path, reference: Path) -> tuple[str, str]:
    """Export into a folder that may not be written, as somebody who is not root."""

    def prepare() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)

    work.chmod(0o555)
    message = refused(export, work / "new", prepare)
    work.chmod(0o755)
    return message, outcome(work, reference)


def main() -> None:
    reference, work, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    shutil.copytree(reference, work / "old")
    export = FastExport(reference)
    export(work / "new")  # imports what is imported late; and is what all others have to be
    if outcome(work, reference) != "whole":
        raise SystemExit("an export that nobody disturbs is not the bundle it was made from")
    result = {
        "events": killed_at_events(export, work, reference),
        "lines": killed_at_lines(export, work, reference, count),
        "moments": killed_at_moments(export, work, reference, count),
        # the planted fault writes where it should only rename to
        "planted": killed_at_events(lambda output: shutil.copytree(reference, output), work, reference),
        "room": list(out_of_room(export, work, reference)),
        "protected": write_protected(export, work, reference),
    }
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main()
