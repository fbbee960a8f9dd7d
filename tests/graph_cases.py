"""The graphs of the tiny bundle as functions of arrays, in every form, and what they are made of."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator

from mt3_runtime.backends.ort import open_session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from mt3_runtime.backends.ort import OrtBackend
    from mt3_runtime.bundle import Bundle

LOWERINGS = ("ort", "tensorrt")
LAYERS, HEADS, WIDTH = 2, 2, 16  # of the tiny model


class Decoder:
    """A decode_step graph and the cache it has written; `fill` is what stands in the cache at first."""

    def __init__(
        self, run: Callable[..., list[np.ndarray]], cross: Sequence[np.ndarray], length: int = 64, fill: float = 0.0
    ) -> None:
        self.run, self.cross = run, list(cross)
        self.cache = [np.full((len(cross[0]), HEADS, length, WIDTH), fill, np.float32) for _ in range(2 * LAYERS)]

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Next tokens [rows], log-probabilities [rows] and logits [rows, vocab]."""
        ids = [np.array(values, np.int32) for values in (tokens, positions)]
        token, log_prob, *self.cache, logits = self.run(*ids, *self.cross, *self.cache)
        return token, log_prob, logits

    def follow(self, tokens: np.ndarray) -> np.ndarray:
        """Feed [rows, steps] from the start: logits [rows, steps, vocab]."""
        rows, steps = tokens.shape
        return np.stack([self.step(tokens[:, i], [i] * rows)[2] for i in range(steps)], axis=1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Arrays as small as these are computed slower by two threads, and far slower when others want the core too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def engine(bundle: Bundle, graph: str, lowering: str, precision: str = "fp32") -> Callable[..., list[np.ndarray]]:
    """A graph on ONNX Runtime, inputs and outputs in the order of its contract."""
    session = open_session(bundle, bundle.graph(graph, lowering, precision), threads=1)
    names = [node.name for node in session.get_inputs()]
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def evaluator(folder: Path, file: str) -> Callable[..., list[np.ndarray]]:
    """A graph on onnx's own evaluator of the standard."""
    model = onnx.load(folder / file)
    reference = ReferenceEvaluator(model)
    names = [value.name for value in model.graph.input]
    return lambda *arrays: reference.run(None, dict(zip(names, arrays, strict=True)))


def extents(folder: Path, file: str) -> dict[str, tuple[int, int]]:
    """Offset and length in the weights file of every large initializer of a graph."""
    found = {}
    for tensor in onnx.load(folder / file, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            assert place["location"] == "weights.fp32.bin"
            found[tensor.name] = (int(place["offset"]), int(place["length"]))
    return found


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def check_rows_are_alone(backend: OrtBackend, features: np.ndarray) -> None:
    """Three rows say the same beside each other and alone; only the order in which sums are added up may differ."""

    def decode(rows: list[int]) -> np.ndarray:
        states = backend.encode(features[rows])
        backend.admit(0, states[:, 0])
        tokens, scores = np.zeros(len(rows), np.int32), []
        for position in range(12):
            found, log_probs = backend.step(tokens, np.full(len(rows), position, np.int32))
            tokens = found.copy()
            scores.append(np.stack([tokens, log_probs], -1))
        return np.array(scores)  # [steps, rows, 2]

    together = decode([0, 1, 2])
    for row in range(3):
        alone = decode([row])[:, 0]
        assert np.array_equal(alone[:, 0], together[:, row, 0])
        np.testing.assert_allclose(alone[:, 1], together[:, row, 1], atol=1e-4)
