"""Every product of every graph, fp32 beside another precision: both are given what fp32's graphs before gave."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mt3_export.lab.forcing import memory_of, states_of
from mt3_export.lab.probes import Watch
from mt3_runtime.backends.ort import without_fill
from mt3_runtime.graphs import FEATURES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_export.lab.logits import LogitsBackend
    from mt3_export.lab.material import ForcedRow, Material
    from mt3_export.lab.probes import Pair
    from mt3_export.lab.results import LayerError
    from mt3_runtime.graphs import GraphSpec

LONGEST = 48  # steps of the decoder that are looked into


def layer_errors(
    pair: Pair, reference: LogitsBackend, material: Material
) -> tuple[tuple[LayerError, ...], dict[str, float]]:
    """Compare the products of all graphs over a few rows, in the order of the data flow.

    Args:
        pair: what is compared.
        reference: fp32; makes what the graphs are given.
        material: rows, as many as `reference` has slots at most.

    Returns:
        Errors of the products, and of every graph the largest number that one of them reads or gives in fp32.
    """
    group = material.rows[: reference.slots]
    states = states_of(reference, material, group)
    memory = memory_of(group)
    manifest = pair.exact.manifest
    spec = manifest.model.memory
    sources = [np.stack(states)]
    if memory is not None:
        sources.append(reference.remember(memory))
    found: list[LayerError] = []
    largest: dict[str, float] = {}
    for contract in manifest.contracts:
        if contract.name == FEATURES:
            continue
        watch = Watch(pair, contract, reference.threads)
        if contract.name == "encoder":
            for place in sorted({row.place for row in group}):
                watch.run({"features": material.features[place : place + 1]})
        elif contract.name == "memory" and spec and memory is not None:
            for tokens in memory:
                watch.run({"tokens": without_fill(tokens, spec)[None]})
        elif contract.name == "decode_step":
            reference.admit(0, states, memory)
            _decode(watch, reference, group)
        else:
            _one_by_one(watch, contract, dict(reference.inputs_of(sources))[contract.name])
        found += watch.layers()
        largest[contract.name] = watch.largest
    return tuple(found), largest


def _one_by_one(watch: Watch, contract: GraphSpec, inputs: Sequence[np.ndarray]) -> None:
    for row in range(len(inputs[0])):
        feed = {name: array[row : row + 1] for name, array in zip(contract.input_names, inputs, strict=True)}
        watch.run(feed)


def _decode(watch: Watch, reference: LogitsBackend, group: Sequence[ForcedRow]) -> None:
    """Tell both the rows' tokens; each keeps caches of its own, so that their errors count as they do in use."""
    cross, prefix = reference.held(len(group))
    first = prefix[0].shape[2] if prefix else 0
    length = min(LONGEST, len(group[0].inputs))
    room = (*cross[0].shape[:2], first + length, cross[0].shape[3])
    own = [np.zeros(room, np.float32) for _ in cross]
    for cache, before in zip(own, prefix, strict=False):  # of most models there is none
        cache[:, :, :first] = before
    names = watch.spec.input_names
    present = watch.spec.output_names[2 : 2 + len(own)]
    feed = dict(zip(names[2:], [*cross, *own], strict=True))
    feeds = [feed, dict(feed)]
    for step in range(length):
        live = sum(len(row.inputs) > step for row in group)
        tokens = np.array([row.inputs[step] for row in group[:live]], np.int32)
        now = {"token": tokens, "position": np.full(live, first + step, np.int32)}
        outputs = watch.run(*({**_rows(feed, live), **now} for feed in feeds))
        for feed, given in zip(feeds, outputs, strict=True):
            feed.update(zip(names[2 + len(cross) :], (given[name] for name in present), strict=True))


def _rows(feed: dict[str, np.ndarray], live: int) -> dict[str, np.ndarray]:
    return {name: array[:live] for name, array in feed.items()}
