"""Writes a bundle: traced graphs, shared weights and a manifest, whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import secrets
import shutil
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import metadata
from itertools import product
from typing import TYPE_CHECKING

import onnx_ir as ir

from mt3_export.features_graph import trace_features
from mt3_export.lowering import LOWERINGS, Cuda, TensorRT
from mt3_export.network import build_modules
from mt3_export.onnx_graph import PREFIX, for_cuda, trace
from mt3_export.precision import PLANS, checked_precisions
from mt3_export.state import printable
from mt3_export.weights_file import WeightsFile, stored_weights
from mt3_runtime.errors import BundleError, OptionError, OutputError
from mt3_runtime.graphs import FEATURES, graph_specs
from mt3_runtime.manifest import (
    FORMAT,
    MANIFEST_LIMIT,
    MANIFEST_NAME,
    VERSION,
    FileRecord,
    GraphFile,
    Manifest,
    Origin,
    read_manifest,
    write_manifest,
)
from mt3_runtime.specs import VocabularySpec
from mt3_runtime.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from mt3_export.checkpoint import Checkpoint
    from mt3_export.lowering import Lowering
    from mt3_runtime.graphs import GraphSpec, Precision
    from mt3_runtime.manifest import LoweringName, WeightsStorage
    from mt3_runtime.specs import FeatureSpec

# YourMT3 counts steps from the start of a segment, which is 205 steps long.
VOCABULARIES = {"mt3": VocabularySpec(), "yourmt3": VocabularySpec(max_shift_steps=205)}
HEAD_UNIT = 8  # com.microsoft.GroupQueryAttention refuses other widths when it is run
TOOLS = ("torch", "onnxscript", "onnx_ir")


def export_bundle(
    checkpoint: Checkpoint,
    output: Path,
    *,
    precisions: Sequence[Precision] = ("fp32",),
    weights_storage: WeightsStorage = "fp32",
    notice: str = "",
) -> Path:
    """Trace every graph of a checkpoint in every lowering and write the bundle `output`.

    Returns:
        The folder written.

    Raises:
        OutputError: `output` exists, or cannot be written.
        OptionError: `notice` is not one printable line, or the weights do not fit fp16.
        BundleError: a traced graph does not keep its contract, or no backend could run it.
    """
    if checkpoint.model.d_kv % HEAD_UNIT:
        raise BundleError(
            f"heads of width {checkpoint.model.d_kv} are no multiple of {HEAD_UNIT}, as ONNX Runtime asks: "
            "check the number of heads"
        )
    if not notice.isprintable():
        raise OptionError("the notice holds a line break or a control character: give one line of text")
    with _new_folder(output) as folder:
        graphs = _write_graphs(checkpoint, folder, checked_precisions(precisions), weights_storage)
        files = {path.name: _record(path) for path in sorted(folder.iterdir())}
        origin = Origin(
            checkpoint=printable(checkpoint.source),
            checkpoint_sha256=checkpoint.sha256,
            weights_storage=weights_storage,
            exporter=f"mt3-runtime {__version__}",
            tools={name: metadata.version(name) for name in TOOLS},
            notice=notice,
        )
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            model=checkpoint.model,
            features=checkpoint.features,
            vocabulary=VOCABULARIES[checkpoint.model.family],
            contracts=_contracts(checkpoint, graphs),
            graphs=graphs,
            files=files,
            origin=origin,
        )
        text = write_manifest(manifest)
        if len(text) > MANIFEST_LIMIT:
            raise BundleError(
                f"the manifest would take {len(text)} bytes, more than {MANIFEST_LIMIT}: shorten the notice"
            )
        read_manifest(text)  # what no runtime would read is not written
        (folder / MANIFEST_NAME).write_bytes(text)
    return output


def _write_graphs(
    checkpoint: Checkpoint, folder: Path, precisions: Sequence[Precision], storage: WeightsStorage
) -> tuple[GraphFile, ...]:
    tensors = stored_weights(checkpoint.tensors, storage)  # rounded before anything is folded, as `verify` does
    rounded = replace(checkpoint, tensors=tensors)
    entries: list[GraphFile] = []
    for precision in precisions:
        written = _lowerings(precision, alone=len(precisions) == 1)
        its_storage: WeightsStorage = storage if precision == "fp32" else "fp32"  # halves are stored as they are
        entries += _write_precision(rounded, folder, precision, written, its_storage)
    if len(precisions) > 1:
        entries += _write_features(checkpoint.features, folder, precisions)
    return tuple(entries)


def _contracts(checkpoint: Checkpoint, graphs: Sequence[GraphFile]) -> tuple[GraphSpec, ...]:
    takes_audio = any(entry.graph == FEATURES for entry in graphs)
    return tuple(graph_specs(checkpoint.model, checkpoint.features, takes_audio=takes_audio).values())


def _write_features(features: FeatureSpec, folder: Path, precisions: Sequence[Precision]) -> list[GraphFile]:
    """Write the graph of the features, which is one for all devices and precisions."""
    graph, weights = trace_features(features), WeightsFile(folder / f"weights.{FEATURES}.bin", "fp32")
    try:
        weights.move(graph)
    finally:
        weights.close()
    file = f"{FEATURES}.onnx"
    (folder / file).write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
    lowerings: tuple[LoweringName, ...] = ("tensorrt", "cuda")
    return [
        GraphFile(FEATURES, lowering, precision, file, weights.name)
        for lowering, precision in product(lowerings, precisions)
    ]


def _lowerings(precision: Precision, *, alone: bool) -> dict[LoweringName, Lowering]:
    """Half precision is for devices only; where there is any, CUDA gets fp32 too."""
    plan = PLANS[precision]
    cuda: dict[LoweringName, Lowering] = {"cuda": Cuda(plan)}
    if precision != "fp32":
        return {"tensorrt": TensorRT(plan), **cuda}
    return LOWERINGS if alone else {**LOWERINGS, **cuda}


def _write_precision(
    checkpoint: Checkpoint, folder: Path, precision: Precision, lowerings: Mapping[LoweringName, Lowering],
    storage: WeightsStorage,
) -> Iterator[GraphFile]:  # fmt: skip
    """Write the graphs of one precision and the file of their weights."""
    specs = graph_specs(checkpoint.model, checkpoint.features)
    weights = WeightsFile(folder / f"weights.{precision}.bin", storage)
    try:
        for lowering, ops in lowerings.items():
            modules = build_modules(checkpoint.model, checkpoint.features, checkpoint.tensors, ops, checkpoint.design)
            for name, spec in specs.items():
                graph = trace(modules[name], spec.typed(precision))
                if lowering == "cuda":
                    for_cuda(graph)
                weights.move(graph, tables=dict(modules[name].named_buffers(PREFIX)))
                file = f"{name}.{precision}.{lowering}.onnx"
                (folder / file).write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
                yield GraphFile(name, lowering, precision, file, weights.name)
    finally:
        weights.close()


def _record(path: Path) -> FileRecord:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, digest)


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder that takes the name `output` when the block ends well, and vanishes when it does not."""
    temporary = output.parent / f".{output.name}.{secrets.token_hex(6)}.partial"
    try:
        check_output(output)
        remove_leftovers(output)
        temporary.mkdir()
        with _claim(temporary):
            yield temporary
            _sync(*temporary.iterdir(), temporary)
            temporary.rename(output)
            with suppress(OSError):  # some disks refuse, and the bundle is whole either way
                _sync(output.parent)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write {output} ({error.strerror}): free some space or choose another --output"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output(output: Path) -> None:
    """Raise OutputError if a bundle cannot be created at `output`."""
    if output.exists() or output.is_symlink():
        raise OutputError(f"{output} exists already: remove it, or choose another --output")
    if not output.parent.is_dir():
        raise OutputError(f"folder {output.parent} does not exist: create it, or choose another --output")


def remove_leftovers(output: Path) -> None:
    """Remove what killed exports of the same name left behind; what is still being written stays."""
    for path in output.parent.glob(f".{glob.escape(output.name)}.{'[0-9a-f]' * 12}.partial"):
        with suppress(OSError), _claim(path) as claimed:
            if claimed:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _claim(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock, which ends with the process; False where the file system has no locks.

    Raises:
        OSError: somebody else holds it, or it is not a folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _sync(*paths: Path) -> None:
    """Have files and folders on the disk before the next name points at them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
