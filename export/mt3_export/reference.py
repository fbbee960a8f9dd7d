"""The torch network in float64, and how far from it the graphs of a bundle are when they are given the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mt3_runtime.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from mt3_runtime.specs import MemorySpec, ModelSpec

    Arrays = list[np.ndarray]
    Runner = Callable[[Sequence[np.ndarray]], Arrays]  # a graph as a function from arrays to arrays

POISON = 1e4  # fills the unwritten cache; finite, because the standard operator multiplies what it masks by 0


class Comparison:
    """Collects the worst errors and the agreement of tokens."""

    def __init__(self) -> None:
        self.largest = self.relative = 0.0
        self.counts = [0, 0, 0]

    def arrays(self, found: np.ndarray, wanted: np.ndarray) -> float:
        """Compare what a graph gave with what torch gives; returns the largest difference."""
        if found.shape != wanted.shape:
            raise BundleError(f"a graph gives {found.shape}, where torch gives {wanted.shape}: export the bundle again")
        difference = np.abs(found.astype(np.float64) - wanted)
        largest = float(difference.max())
        self._keep(largest, float(np.linalg.norm(difference)) / max(float(np.linalg.norm(wanted)), 1e-30))
        return largest

    def log_prob(self, found: np.ndarray, logits: np.ndarray) -> None:
        """Compare with the graph's own logits: a sure token's is near 0, where no error relative to torch's fits."""
        exact = logits.astype(np.float64)
        top = exact.max(-1)
        wanted = -np.log(np.exp(exact - top[:, None]).sum(-1))
        largest = float(np.abs(found - wanted).max())
        self._keep(largest, largest / float(np.abs(exact).max()))

    def step(self, tokens: np.ndarray, logits: np.ndarray, wanted: np.ndarray) -> None:
        """Compare logits [rows, vocab] with those of torch, and the tokens chosen from them."""
        error = self.arrays(logits, wanted)
        chosen = np.take_along_axis(wanted, tokens[:, None], axis=-1)[:, 0]
        equal = tokens == wanted.argmax(-1)
        tie = ~equal & (wanted.max(-1) - chosen <= 2 * error)
        for i, count in enumerate((len(tokens), equal.sum(), tie.sum())):
            self.counts[i] += int(count)

    def _keep(self, largest: float, relative: float) -> None:
        self.largest = float(np.maximum(self.largest, largest))  # unlike max(), never forgets a NaN
        self.relative = float(np.maximum(self.relative, relative))


class Reference:
    """The network on features [segments, frames, bins]; each graph's inputs come from the graphs before it.

    `memory`: none, or vectors [rows, length, d_model] of `told`, see `told_tokens`. `prefix`: what caches begin with.
    """

    def __init__(
        self, modules: Mapping[str, torch.nn.Module], features: np.ndarray, steps: int, model: ModelSpec, seed: int = 0
    ) -> None:
        self.modules, self.steps = {name: module.double() for name, module in modules.items()}, steps
        self.model = model
        self.features = torch.from_numpy(features).double()
        with torch.inference_mode():
            self.states: Tensor = modules["encoder"](self.features)
            rows = self.states.flatten(0, 1)
            self.memory: list[Tensor] = []
            self.prefix: tuple[Tensor, ...] = ()
            if model.memory:
                self.told = told_tokens(model, model.memory, len(rows), seed)
                self.memory.append(modules["memory"](self.told))
            self.sources = [rows, *(self.memory if model.extra_context else [])]
            self.cross: tuple[Tensor, ...] = modules["cross_kv"](*self.sources)
            if model.prefix_length:
                self.prefix = modules["prefix"](*self.memory, *self.cross)

    def run(self, graph: str, runner: Runner, compare: Comparison) -> None:
        """Give a graph what the network is given, and compare what comes out."""
        if graph == "decode_step":
            self._decode(runner, compare)
        elif graph == "memory":
            self._remember(runner, compare)
        else:
            inputs, wanted = {
                "encoder": ([self.features], [self.states]),
                "cross_kv": (self.sources, self.cross),
                "prefix": ([*self.memory, *self.cross], self.prefix),
            }[graph]
            for found, tensor in zip(runner([single(value) for value in inputs]), wanted, strict=True):
                compare.arrays(found, tensor.numpy())

    def _remember(self, runner: Runner, compare: Comparison) -> None:
        """With all the fill that the graph knows, and with none: torch is always given every token."""
        used = int(np.flatnonzero((self.told != self.told[0, -1]).any(0))[-1]) + 1
        [wanted] = self.memory
        for written in (max(used, wanted.shape[1]), self.told.shape[1]):
            [found] = runner([self.told[:, :written].numpy()])
            compare.arrays(found, wanted.numpy())

    @torch.inference_mode()
    def _decode(self, runner: Runner, compare: Comparison) -> None:
        rows, heads, _, width = self.cross[0].shape
        first = self.model.prefix_length
        room = (rows, heads, first + self.steps, width)
        own = [torch.full(room, POISON, dtype=torch.float64) for _ in self.cross]
        for cache, before in zip(own, self.prefix, strict=False):  # of most models there is none
            cache[:, :, :first] = before
        kept, cross = [single(tensor) for tensor in own], [single(tensor) for tensor in self.cross]
        token = torch.full((rows,), self.model.start_token, dtype=torch.int32)
        for step in range(first, first + self.steps):
            position = torch.full((rows,), step, dtype=torch.int32)
            _, _, *own, logits = self.modules["decode_step"](token, position, *self.cross, *own)
            tokens, log_prob, *kept, found = runner([token.numpy(), position.numpy(), *cross, *kept])
            compare.step(tokens, found, logits.numpy())
            compare.log_prob(log_prob, found)
            token = logits.argmax(-1).to(torch.int32)


def told_tokens(model: ModelSpec, memory: MemorySpec, rows: int, seed: int) -> Tensor:
    """What rows are told, int32 [rows, span]: the first what a first segment is, the others any tokens and fill."""
    generator = np.random.default_rng(seed)
    told = np.full((rows, memory.span), memory.fill_token, np.int32)
    told[0, : len(memory.first_tokens)] = memory.first_tokens
    for row in told[1:]:
        count = generator.integers(1, memory.span // 2 + 1)
        row[:count] = generator.integers(model.vocab_size, size=count)
    return torch.from_numpy(told)


def single(tensor: torch.Tensor) -> np.ndarray:
    """A float32 copy for the graph."""
    return tensor.float().numpy()
