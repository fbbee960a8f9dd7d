"""What a command says: results on standard output, words for people on standard error, an error in one line."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mt3_runtime.errors import Mt3Error, OutputError
from mt3_runtime.parser import FAILED

if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = 130
UNREAD = 141  # what a shell says of a program that SIGPIPE ended


def report_errors(program: str, command: Callable[[], int]) -> int:
    """Run `command`; an error of ours becomes one line on standard error and exit code 2."""
    prepare_streams()
    try:
        code = command()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has enough, as `| head` has
        silence(sys.stdout)
        return UNREAD
    except Mt3Error as error:
        say(f"{program}: error: {error}")
        return FAILED
    except KeyboardInterrupt:
        say(f"{program}: interrupted")
        return INTERRUPTED
    return code


def prepare_streams() -> None:
    """Open what was closed (`2>&-`) to nothing, and let no character be one that cannot be printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except (
            OSError
        ):  # else a file of ours gets this number, the lowest that is free, and what libraries print with it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 -- it takes no name
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 -- stays open
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Words for people; where they cannot be written the work goes on."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def give(text: str) -> None:
    """What was asked for, on standard output.

    Raises:
        BrokenPipeError: nobody reads it any more.
        OutputError: it cannot be written.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(sys.stdout)
        raise OutputError(f"standard output cannot be written ({error.strerror}): send it elsewhere") from error


def shown(path: str | os.PathLike[str]) -> str:
    """A path as it is printed: in quotes if it would break the line or disturb a terminal."""
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)


def silence(stream: IO[str]) -> None:
    """Send what is left in a stream nowhere: Python would try it again when it ends, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
