"""Tensors in the making, seen head by head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from demo_model.registers import Registers, divide, turn
from mt3_export.state import expected_shapes

if TYPE_CHECKING:
    from mt3_runtime.specs import ModelSpec


@dataclass(frozen=True, slots=True, eq=False)
class Blueprint:
    """The tensors of a network by the keys of `expected_shapes`, and the division of its residual stream."""

    model: ModelSpec
    tensors: dict[str, Tensor]
    registers: Registers

    def head(self, key: str, index: int) -> Tensor:
        """The part of one head, to be written to: [d_kv, d_model], of output matrices too."""
        width = self.model.d_kv
        part = slice(index * width, (index + 1) * width)
        matrix = self.tensors[f"{key}.weight"]
        return matrix[:, part].T if key.endswith(".o") else matrix[part]

    def pick(self, places: Tensor) -> Tensor:
        """The matrix [len(places), d_model] that picks these dimensions."""
        rows = torch.zeros(len(places), self.model.d_model)
        rows[torch.arange(len(places)), places] = 1.0
        return rows

    def look_at_place(
        self, block: str, head: int, angles: Tensor, score: float, scale: float, *, slope: float = 0.0
    ) -> None:
        """Let one head of self-attention compare positions, the key's with the query's turned by `angles`.

        The last pair is left to tell kinds apart.

        Args:
            block: prefix of the head's matrices.
            head: its index.
            angles: of every pair [d_kv / 2], in radians.
            score: of positions that match.
            scale: what the norm before multiplies the sinusoid by.
            slope: weight of pairs as a power of their frequency; negative ones let the score fall steadily with the
                distance, 0 lets it fall fast.
        """
        shares = self.registers.frequencies**slope
        shares[-1] = 0.0
        spread = (score * shares / shares.sum()).sqrt() / scale
        weight = torch.diag(torch.cat((spread, spread)))
        query, key = self.head(f"{block}.q", head), self.head(f"{block}.k", head)
        query.zero_()[:, self.registers.place] = weight @ turn(angles)
        key.zero_()[:, self.registers.place] = weight


def draw(model: ModelSpec, generator: torch.Generator) -> Blueprint:
    """Independent normal values, about as T5 scales them; gains of norms are 1, positions and times are not written."""
    width, inner = model.d_model, model.num_heads * model.d_kv
    spreads = {
        "decoder_embed_tokens": 0.5, "q": (width * model.d_kv) ** -0.5, "k": width**-0.5, "v": width**-0.5,
        "o": 0.7 * inner**-0.5, "wi_0": width**-0.5, "wi_1": width**-0.5, "wo": 0.7 * model.d_ff**-0.5,
        "lm_head": width**-0.5, "proj": 0.0,
    }  # fmt: skip
    registers = divide(model)
    kept = {"encoder": (registers.place, registers.then), "decoder": (registers.place, registers.then, registers.now)}
    tensors = {}
    for key, shape in expected_shapes(model).items():
        side, name = key.split(".")[0], key.removesuffix(".weight").rpartition(".")[2]
        noise = torch.randn(shape, generator=generator)
        tensor = torch.ones(shape) if name.endswith("layer_norm") else spreads[name] * noise
        if name in {"o", "wo"}:
            tensor[torch.cat(kept[side])] = 0.0
        tensors[key] = tensor
    return Blueprint(model, tensors, registers)
