"""Feed-forward networks of which every token goes through some only (YourMT3 `model/ff_layer.py`).

The router's softmax is over all experts; the largest weights are kept and divided by their sum. Of equal weights
the lower expert's wins, in every form, so that no result hangs on how an engine sorts.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name every torch user knows
from torch.onnx.ops import symbolic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_export.lowering import Lowering
    from mt3_export.weights import Weights

Matrices = tuple[Tensor, Tensor, Tensor]  # w1, gate and w2 of one expert
CONTRIB, OWN = "com.microsoft", "mt3_export"


class Experts(nn.Module):
    """Sum over the chosen experts of weight * down(silu(w1 x) * gate x): [tokens, d] -> [tokens, d]."""

    def __init__(self, weights: Weights, chosen: int, ops: Lowering) -> None:
        super().__init__()
        self.ops, self.chosen = ops, chosen
        self.router = weights.matrix("gate")
        experts = [weights.below(f"experts.{i}") for i in range(weights.count("experts"))]
        self.up, self.gate, self.down = (
            nn.ParameterList(expert.matrix(name) for expert in experts) for name in ("w1", "gate", "w2")
        )

    def forward(self, tokens: Tensor) -> Tensor:
        probabilities = (tokens @ self.router).softmax(-1)  # [tokens, experts]
        matrices = list(zip(self.up, self.gate, self.down, strict=True))
        return self.ops.experts(tokens, probabilities, matrices, self.chosen)


def kept(probabilities: Tensor, chosen: int) -> Tensor:
    """The largest of every row divided by their sum, zero for the others: [tokens, experts], without sorting."""
    mine, other = probabilities[:, :, None], probabilities[:, None, :]
    lower = torch.ones(probabilities.shape[1], probabilities.shape[1], dtype=torch.bool).tril(-1)
    before = (other > mine) | ((other == mine) & lower)  # [tokens, experts, experts]
    weights = torch.where(before.sum(-1) < chosen, probabilities, 0.0)
    return weights / weights.sum(-1, keepdim=True)


def expert(tokens: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    """One expert on all tokens."""
    return (F.silu(tokens @ up) * (tokens @ gate)) @ down


def dense_experts(tokens: Tensor, weights: Tensor, experts: Sequence[Matrices], ops: Lowering) -> Tensor:
    """All experts on all tokens in three products, for engines that want fixed shapes."""
    up, gate, down = (tuple(ops.stored(matrix) for matrix in kind) for kind in zip(*experts, strict=True))
    tokens = ops.narrow(tokens)
    active = F.silu(ops.linear(tokens, torch.cat(up, 1))) * ops.linear(tokens, torch.cat(gate, 1))
    shared = active.reshape(-1, len(experts), down[0].shape[0]) * weights[:, :, None]  # [tokens, experts, inner]
    return ops.balanced(shared.reshape(active.shape), torch.cat(down, 0))


def grouped_experts(tokens: Tensor, probabilities: Tensor, experts: Sequence[Matrices], chosen: int) -> Tensor:
    """Every expert on its own tokens only; the results stand in one matrix, by expert, then by token.

    For tracing; `expand_experts` finishes the graph.
    """
    top, index = probabilities.topk(chosen, -1)  # [tokens, chosen]; ONNX: of equals the lower index comes first
    weights = top / top.sum(-1, keepdim=True)
    taken = F.one_hot(index, len(experts)).sum(1)  # [tokens, experts]
    sizes = taken.sum(0)
    before = taken.cumsum(0) - taken + sizes.cumsum(0) - sizes
    place = before.gather(1, index)  # [tokens, chosen]: row of the result
    source = torch.arange(tokens.shape[0])[:, None].expand(-1, chosen).reshape(-1)
    order = torch.zeros_like(source).scatter(0, place.reshape(-1), source)  # token of every row
    shape = (order.shape[0], tokens.shape[1])
    matrices = [matrix for expert in experts for matrix in expert]
    results = symbolic(f"{OWN}::Experts", (tokens, order, sizes, *matrices), dtype=tokens.dtype, shape=shape)
    parts = (F.embedding(place[:, i], results) * weights[:, i, None] for i in range(chosen))
    return functools.reduce(torch.add, parts)


def expand_experts(model: ir.Model) -> None:
    """Write out the experts of `grouped_experts`: how many rows each has is known only when the graph runs."""
    graph = model.graph
    for node in [node for node in graph if node.domain == OWN]:
        tokens, order, sizes, *matrices = node.inputs
        split = ir.node("Split", [order, sizes], {"axis": 0}, num_outputs=len(matrices) // 3)
        nodes, results = [split], []
        for rows, *expert in zip(split.outputs, *(matrices[i::3] for i in range(3)), strict=True):
            nodes += _expert_nodes(tokens, rows, *expert)
            results.append(nodes[-1].outputs[0])
        nodes.append(ir.node("Concat", results, {"axis": 0}))
        for i, new in enumerate(nodes):
            new.name = f"{node.name}.{i}"
            for j, output in enumerate(new.outputs):
                output.name = f"{new.name}.{j}"
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, nodes[-1].outputs)
    model.opset_imports.pop(OWN, None)


def _expert_nodes(
    tokens: ir.Value | None, order: ir.Value, up: ir.Value | None, gate: ir.Value | None, down: ir.Value | None
) -> list[ir.Node]:
    """The nodes of `expert` in ONNX Runtime."""
    rows = ir.node("Gather", [tokens, order], {"axis": 0})
    risen, gated = (ir.node("MatMul", [rows.outputs[0], matrix]) for matrix in (up, gate))
    active = ir.node("QuickGelu", risen.outputs, {"alpha": 1.0}, domain=CONTRIB)
    product = ir.node("Mul", [active.outputs[0], gated.outputs[0]])
    return [rows, risen, gated, active, product, ir.node("MatMul", [product.outputs[0], down])]
