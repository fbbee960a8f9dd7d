"""A command line whose mistakes are told in one line."""

from __future__ import annotations

import argparse
from difflib import get_close_matches
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

FAILED = 2


class Parser(argparse.ArgumentParser):
    """Says what is wrong and where help is, without the usage; parsers of its commands are like it.

    An option that a command does not know is that command's mistake, and named with the ones that look like it.
    """

    def parse_known_args(  # type: ignore[override]  # one signature for argparse's three
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As argparse does, but with nothing left."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown[0])}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """End the program."""
        self.exit(FAILED, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")

    def _meant(self, option: str) -> str:
        near = get_close_matches(option.partition("=")[0], self._option_string_actions)
        return f": did you mean {' or '.join(near)}?" if near else ""
