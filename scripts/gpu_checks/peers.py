"""The decoder of a bundle's model in plain PyTorch, to compare with: the same shapes, random weights, greedy steps.

`eager` is what most code does: a cache that grows by concatenation, one call of every operator a step. `static` is the
best that PyTorch offers without a compiler: caches of fixed size written in place, and a step in one CUDA graph.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_checks.plan import Plan
    from mt3_runtime.specs import ModelSpec


class Decoder:
    """T5's decoder without biases; `self_length` positions of a static cache, or None for one that grows."""

    def __init__(self, model: ModelSpec, frames: int, rows: int, self_length: int | None, device: str) -> None:
        import torch

        self.torch, self.model, self.rows = torch, model, rows
        self.dtype = torch.float16 if device.startswith("cuda") else torch.float32
        generator = torch.Generator().manual_seed(0)

        def make(*shape: int) -> Any:
            values = torch.randn(shape, generator=generator) / shape[0] ** 0.5
            return values.to(device, self.dtype)

        inner, width = model.num_heads * model.d_kv, model.d_model
        self.layers = [
            {
                "qkv": make(width, 3 * inner),
                "out": make(inner, width),
                "cross_query": make(width, inner),
                "cross_out": make(inner, width),
                "gates": make(width, 2 * model.d_ff),
                "down": make(model.d_ff, width),
            }
            for _ in range(model.decoder_layers)
        ]
        self.embedding, self.head = make(model.vocab_size, width), make(width, model.vocab_size)
        cross = (model.decoder_layers, 2, rows, model.num_heads, frames, model.d_kv)
        self.cross = torch.randn(cross, generator=generator).to(device, self.dtype)
        self.grows, length = self_length is None, self_length or 0
        shape = (rows, model.num_heads, length, model.d_kv)
        self.empty = [[torch.zeros(shape, device=device, dtype=self.dtype) for _ in range(2)] for _ in self.layers]
        self.cache = [list(pair) for pair in self.empty]  # keys and values of each layer
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.places = torch.arange(length, device=device)

    def reset(self) -> None:
        self.token.zero_()
        self.position.zero_()
        self.cache = [list(pair) for pair in self.empty]

    def step(self) -> None:
        """One token of every row: reads `token`, writes `token`."""
        torch, functional = self.torch, self.torch.nn.functional
        hidden = self.embedding[self.token][:, None]
        mask = None if self.grows else (self.places <= self.position)[None, None, None]
        for index, layer in enumerate(self.layers):
            query, key, value = map(self.split, (self.norm(hidden) @ layer["qkv"]).chunk(3, -1))
            cache = self.cache[index]
            for i, new in enumerate((key, value)):
                if self.grows:
                    cache[i] = torch.cat((cache[i], new), 2)
                else:
                    cache[i].index_copy_(2, self.position, new)
            attended = functional.scaled_dot_product_attention(query, *cache, attn_mask=mask, scale=1.0)
            hidden = hidden + self.merge(attended) @ layer["out"]
            query = self.split(self.norm(hidden) @ layer["cross_query"])
            attended = functional.scaled_dot_product_attention(query, *self.cross[index], scale=1.0)
            hidden = hidden + self.merge(attended) @ layer["cross_out"]
            first, second = (self.norm(hidden) @ layer["gates"]).chunk(2, -1)
            hidden = hidden + functional.gelu(first, approximate="tanh") * second @ layer["down"]
        self.token.copy_((self.norm(hidden) @ self.head)[:, 0].float().argmax(-1))
        self.position += 1

    def norm(self, x: Any) -> Any:
        wide = x.float()
        return (wide * self.torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def split(self, x: Any) -> Any:
        return x.view(self.rows, -1, self.model.num_heads, self.model.d_kv).transpose(1, 2)

    def merge(self, x: Any) -> Any:
        return x.transpose(1, 2).reshape(self.rows, -1, self.model.num_heads * self.model.d_kv)


def peers(plan: Plan, *, on_gpu: bool) -> dict[str, Any]:
    """Milliseconds of one step of each, by number of rows; the host waits only at the end."""
    import torch

    manifest, device = plan.open().manifest, f"cuda:{plan.device}" if on_gpu else "cpu"
    table: dict[str, dict[str, float]] = {"eager": {}, "static": {}}
    if not on_gpu:
        torch.set_num_threads(1)  # threads that wait for each other cost more than such small matrices
    with torch.inference_mode():
        for rows in plan.peer_rows:
            for name, length in (("eager", None), ("static", max(plan.lengths))):
                decoder = Decoder(manifest.model, manifest.features.segment_frames, rows, length, device)
                replay = capture(decoder) if on_gpu and length else decoder.step
                table[name][str(rows)] = time_peer(decoder, replay, plan, on_gpu=on_gpu)
    return {
        "passed": True,
        "ms_per_step": table,
        "torch": torch.__version__,
        "static_is_captured": on_gpu,
        "dtype": "float16" if on_gpu else "float32",
        "steps": plan.peer_steps,
    }


def capture(decoder: Decoder) -> Callable[[], None]:
    """One step as a CUDA graph, after a few by hand on another stream, as PyTorch's notes on CUDA ask."""
    cuda = decoder.torch.cuda
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        for _ in range(3):
            decoder.step()
    cuda.current_stream().wait_stream(side)
    decoder.reset()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        decoder.step()
    replay: Callable[[], None] = graph.replay
    return replay


def time_peer(decoder: Decoder, step: Callable[[], None], plan: Plan, *, on_gpu: bool) -> float:
    times = []
    for _ in range(plan.repeat + 1):
        decoder.reset()
        wait(decoder, on_gpu=on_gpu)
        started = perf_counter()
        for _ in range(plan.peer_steps):
            step()
        wait(decoder, on_gpu=on_gpu)
        times.append((perf_counter() - started) / plan.peer_steps * 1e3)
    return median(times[1:] or times)


def wait(decoder: Decoder, *, on_gpu: bool) -> None:
    if on_gpu:
        decoder.torch.cuda.synchronize()
