"""Each graph on its own: given what fp32's graphs before it gave, how far are its outputs from fp32's?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mt3_export.lab.errors import ErrorSums
from mt3_export.lab.forcing import groups, memory_of, states_of, steps
from mt3_export.lab.results import GraphError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mt3_export.lab.logits import LogitsBackend
    from mt3_export.lab.material import ForcedRow, Material


def graph_errors(
    reference: LogitsBackend,
    other: LogitsBackend,
    material: Material,
    largest: Mapping[str, float],
    limit: float | None,
) -> tuple[GraphError, ...]:
    """Compare every graph over the rows of `material`, of the decode step the logits of every step.

    Args:
        reference: fp32.
        other: what is compared with it; of as many slots.
        material: segments and rows.
        largest: of every graph, the largest number that its products read or give.
        limit: of the type that they are rounded to; None if there is none.
    """
    sums: dict[str, ErrorSums] = {}
    for group in groups(material, reference.slots):
        _compare_group(reference, other, material, group, sums)
    return tuple(
        GraphError(
            graph, each.max, each.relative, each.cosine, each.psnr_db, largest.get(graph, 0.0), limit, each.non_finite
        )
        for graph, each in sums.items()
    )


def _compare_group(
    reference: LogitsBackend,
    other: LogitsBackend,
    material: Material,
    group: Sequence[ForcedRow],
    sums: dict[str, ErrorSums],
) -> None:
    def compare(graph: str, wanted: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> None:
        for a, b in zip(wanted, found, strict=True):
            sums.setdefault(graph, ErrorSums()).add(a, b)

    states = states_of(reference, material, group)
    compare("encoder", states, states_of(other, material, group))
    sources = [np.stack(states)]
    memory = memory_of(group)
    if memory is not None:
        sources.append(reference.remember(memory))
        compare("memory", sources[1:], [other.remember(memory)])
    for graph, inputs in reference.inputs_of(sources):
        compare(graph, reference.run(graph, inputs), other.run(graph, inputs))
    reference.admit(0, states, memory)
    other.put(*reference.held(len(group)))
    for wanted, found in zip(steps(reference, group), steps(other, group), strict=True):
        if wanted.logits is not None and found.logits is not None:
            compare("decode_step", [wanted.logits], [found.logits])
