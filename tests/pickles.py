"""Malicious pickles: each makes a marker file when an ordinary unpickler reads it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import operator
import os
import pickle
import shutil
import subprocess
import tarfile
import timeit
import warnings
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

PROTOCOLS = tuple(range(pickle.HIGHEST_PROTOCOL + 1))


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


class StateSetter:
    """Pickles as `exec(code, {})`, smuggled in as the function that sets an object's state."""

    def __init__(self, code):
        self.code = code

    def __reduce_ex__(self, protocol):
        return str, (self.code,), {}, None, None, exec


def payloads(marker: Path) -> dict[str, object]:
    """Objects to pickle, by name."""
    touch, code = f"touch '{marker}'", f"import pathlib; pathlib.Path({str(marker)!r}).touch()"
    expression = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    system = Call(getattr, Call(importlib.import_module, "os"), "system")
    return {
        "posix.system": Call(os.system, touch),
        "posix.mkdir": Call(os.mkdir, str(marker)),
        "subprocess.call": Call(subprocess.call, ["touch", str(marker)]),
        "subprocess.run": Call(subprocess.run, ["touch", str(marker)]),
        "subprocess.getoutput": Call(subprocess.getoutput, touch),
        "builtins.eval": Call(eval, expression),
        "builtins.exec": Call(exec, code),
        "importlib and getattr": Call(operator.call, system, touch),
        "builtins.map": Call(list, Call(map, os.system, [touch])),
        "functools.partial": Call(operator.call, functools.partial(os.system, touch)),
        "operator.methodcaller": Call(operator.call, operator.methodcaller("touch"), marker),
        "timeit.timeit": Call(timeit.timeit, expression, "pass", timeit.default_timer, 1),
        "shutil.copyfile": Call(shutil.copyfile, os.devnull, str(marker)),
        "state setter": StateSetter(code),
        "in an OrderedDict": OrderedDict(weight=1.0, other=Call(os.system, touch)),
        "in a list of tuples": {"state_dict": [(1, (2, Call(os.system, touch)))]},
    }


def by_hand(marker: Path) -> dict[str, bytes]:
    """Pickles that no pickler writes: names as a program spells them, not as their functions say."""
    return {
        f"{module}.{name}": f"c{module}\n{name}\n(Vtouch '{marker}'\ntR.".encode()
        for module, name in (
            ("os", "system"),
            ("posix", "system"),
            ("subprocess", "getoutput"),
            ("subprocess", "getstatusoutput"),
        )
    }


def plain(payload: object, protocol: int) -> bytes:
    """A pickle and nothing else."""
    return pickle.dumps(payload, protocol)


def torch_zip(payload: object, protocol: int) -> bytes:
    """A torch file as written since 1.6."""
    buffer = io.BytesIO()
    torch.save({"proj.weight": payload}, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


def torch_legacy(payload: object, protocol: int) -> bytes:
    """A torch file as written before 1.6."""
    buffer = io.BytesIO()
    torch.save({"proj.weight": payload}, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def torch_tar(payload: object, protocol: int) -> bytes:
    """A torch file as written before 0.4."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle", "sys_info"):
            member = tarfile.TarInfo(name)
            data = plain(payload, protocol)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def run(data: bytes, container: str, path: Path) -> None:
    """Read a file the careless way, which runs whatever is in it; what it returns or raises does not matter."""
    path.write_bytes(data)
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        if container == "plain":
            pickle.loads(data)  # noqa: S301 -- the planted fault
        else:
            torch.load(path, weights_only=False)


def repacked(data: bytes, **records: bytes) -> bytes:
    """A torch archive with other content in some of its records, by name; `data_pkl` is its pickle."""
    target = io.BytesIO()
    records = {name.replace("data_pkl", "data.pkl"): content for name, content in records.items()}
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, records.get(name.partition("/")[2], source.read(name)))
    return target.getvalue()


def pickle_of(data: bytes) -> bytes:
    """The pickle of a torch archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def calling(name: str, arguments: bytes = b")", *, build: bytes = b"") -> bytes:
    """A pickle, written by hand, of {"state_dict": {}, "x": name(*arguments)}; `build` pushes a state to set."""
    module, _, attribute = name.rpartition(".")
    call = f"c{module}\n{attribute}\n".encode() + arguments + b"R" + (build + b"b" if build else b"")
    return b"\x80\x02}(X\x0a\x00\x00\x00state_dict}X\x01\x00\x00\x00x" + call + b"u."


CONTAINERS = {"plain": plain, "zip": torch_zip, "legacy": torch_legacy, "tar": torch_tar}
