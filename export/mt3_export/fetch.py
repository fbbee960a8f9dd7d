"""Fetches published checkpoints: resumed when interrupted, verified before they get their name, reused offline."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mt3_export.published import PUBLISHED, find_published
from mt3_runtime.errors import CheckpointError, DependencyError, Mt3Error, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mt3_export.published import PublishedCheckpoint

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_METADATA_TIMEOUT = 10.0  # seconds


def default_directory() -> Path:
    """`$XDG_CACHE_HOME/mt3-runtime/checkpoints`, in `~/.cache` where that variable is unset or relative."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "mt3-runtime" / "checkpoints"


def fetch_checkpoint(
    name: str, directory: Path | None = None, *, table: Mapping[str, PublishedCheckpoint] = PUBLISHED
) -> Path:
    """Path of a published checkpoint on this machine, downloaded if it is not there yet.

    A file already there is hashed and returned without any network; one with another content is refused and left as
    it is, because it may be somebody's own. The download lies beside it as a hidden `.part`, stays there when it is
    interrupted, is continued by the next call, and gets its name only when size and hash are right. Concurrent calls
    wait for each other. `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` have their usual meaning.

    Args:
        name: a row of the table.
        directory: where the file lies; `default_directory()` if None.
        table: the published checkpoints.

    Raises:
        CheckpointError: unknown name, another file in its place, no network, or not the published content.
        OutputError: it cannot be written there.
    """
    row = find_published(name, table)
    folder = directory or default_directory()
    target = folder / row.local_name
    with _as_output_errors(folder):
        if not _is_there(target, row):
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / f".{target.name}.lock"):
                # Whoever held the lock before may have fetched it.
                if not _is_there(target, row):
                    partial = folder / f".{target.name}.{row.sha256[:16]}.part"
                    _download(row, partial)
                    _install(row, partial, target)
    return target


def _is_there(target: Path, row: PublishedCheckpoint) -> bool:
    if not os.path.lexists(target):
        return False
    if not target.is_file() or (target.stat().st_size, _sha256(target)) != (row.size, row.sha256):
        raise CheckpointError(f"{target} is not the published {row.name}: move it away or choose another directory")
    return True


def _download(row: PublishedCheckpoint, partial: Path) -> None:
    with partial.open("ab") as file:
        if file.tell() > row.size:
            file.truncate(0)
            file.seek(0)
        missing, free = row.size - file.tell(), shutil.disk_usage(partial.parent).free
        if missing > free:
            raise OutputError(
                f"{partial.parent} has {free >> 20} MiB free, {row.name} needs {missing >> 20} more: "
                "free some space or choose another directory"
            )
        if missing:
            with _as_network_errors(row):
                _transfer(row, file)
        file.flush()
        os.fsync(file.fileno())


def _transfer(row: PublishedCheckpoint, file: BinaryIO) -> None:
    """Append to `file` what it lacks.

    `hf_hub_download` would start again at zero in every process, so its parts are used instead.
    """
    hub, errors = _hub("file_download"), _hub("errors")
    url = _locate(row, row.revision)
    headers = _hub("utils").build_hf_headers()
    while (start := file.tell()) < row.size:
        try:
            hub.http_get(url, file, resume_size=start, headers=headers, expected_size=row.size)
        except errors.HfHubHTTPError:
            raise
        except (OSError, _transport_error()) as error:
            # A broken connection is worth another try as long as each one brings something.
            if file.tell() == start or getattr(error, "errno", None) in _DISK_ERRORS:
                raise


def _locate(row: PublishedCheckpoint, revision: str) -> str:
    """URL of the file, once the hub has confirmed that it has one of that size."""
    hub, errors = _hub("file_download"), _hub("errors")
    # Read here, because the hub's own constant is fixed when it is imported.
    endpoint = os.environ.get("HF_ENDPOINT") or None
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise CheckpointError(f"HF_ENDPOINT is {endpoint!r}: set it to an address that starts with https://")
    url: str = hub.hf_hub_url(
        row.repository, row.filename, repo_type=row.repository_type, revision=revision, endpoint=endpoint
    )
    try:
        size = hub.get_hf_file_metadata(url, timeout=_METADATA_TIMEOUT).size
    except errors.RevisionNotFoundError:
        if revision == "main":
            raise
        # A rewritten history loses commits, not files; the hash decides in any case.
        return _locate(row, "main")
    if size not in (None, row.size):
        raise CheckpointError(
            f"{url} has {size} bytes, the published {row.name} has {row.size}: it was replaced or HF_ENDPOINT is no "
            "faithful mirror, look for a newer version of this package"
        )
    return url


def _install(row: PublishedCheckpoint, partial: Path, target: Path) -> None:
    if (found := _sha256(partial)) != row.sha256:
        partial.unlink()
        raise CheckpointError(
            f"the download of {row.name} has sha256 {found}, not {row.sha256}, and was removed: try again, and if it "
            "repeats, check proxies and HF_ENDPOINT"
        )
    partial.replace(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The empty lock file stays: removing it would let two processes hold two locks of one name.
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hub(module: str) -> Any:
    try:
        return importlib.import_module(f"huggingface_hub.{module}")
    except ImportError as error:
        raise DependencyError(
            "huggingface_hub is not installed: pip install huggingface_hub, or download the file yourself"
        ) from error


def _transport_error() -> type[Exception]:
    """Base of everything the hub's HTTP library raises; which library that is depends on the hub's version."""
    base: type[Exception] = _hub("errors").HfHubHTTPError.__bases__[0]
    return base


@contextmanager
def _as_network_errors(row: PublishedCheckpoint) -> Iterator[None]:
    errors = _hub("errors")
    try:
        yield
    except Mt3Error:
        raise
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"{row.repository} {_http_reason(error.response.status_code)}") from error
    except (OSError, _transport_error()) as error:
        if getattr(error, "errno", None) in _DISK_ERRORS:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{row.name} could not be downloaded ({reason}): check the network and run it again, it continues where it "
            "stopped"
        ) from error


def _http_reason(status: int) -> str:
    if status in (401, 403):
        return f"refused access (HTTP {status}): set HF_TOKEN or check HF_ENDPOINT"
    if status == 404:
        return "does not have the file (HTTP 404): look for a newer version of this package"
    return f"answered HTTP {status}: run it again later, it continues where it stopped"


@contextmanager
def _as_output_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except Mt3Error:
        raise
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be used ({error.strerror or error}): free some space or choose another directory"
        ) from error
