"""The command `mt3-run engines`: what is in the cache of TensorRT engines, and how it is made smaller."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from mt3_runtime.engine_cache import EngineCache

if TYPE_CHECKING:
    import argparse

    from mt3_runtime.engine_cache import Entry


def engines(arguments: argparse.Namespace, cache: EngineCache | None = None) -> str:
    """Carry the command out; returns what it prints."""
    cache = cache or EngineCache()
    if arguments.action == "prune":
        removed = cache.prune(arguments.older_than, everything=arguments.all)
        return "\n".join(
            [*(f"removed {title}" for title in removed), f"{cache.folder}: {len(removed)} engines removed"]
        )
    entries = cache.entries()
    if arguments.json:
        return json.dumps([describe(entry) for entry in entries])
    total = sum(entry.size for entry in entries) / 2**20
    return "\n".join([*map(_line, entries), f"{cache.folder}: {len(entries)} engines, {total:.1f} MiB"])


def describe(entry: Entry) -> dict[str, object]:
    """An engine as plain data."""
    return {
        "digest": entry.key.digest,
        "key": entry.key.to_dict(),
        "size": entry.size,
        "built": entry.built,
        "report": entry.report,
    }


def _line(entry: Entry) -> str:
    day = time.strftime("%Y-%m-%d", time.localtime(entry.built))
    key = entry.key
    place = f" on {key.gpu}" if key.gpu else ""
    size = f"{entry.size / 2**20:7.1f} MiB"
    return f"{key.digest[:12]}  {day}  {size}  {key.title}{place}  {key.backend} {key.backend_version}"
