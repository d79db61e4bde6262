"""What the GPU benchmarks share: the shapes, the routing, and the clock.

Timing replays one CUDA graph: many calls with different routings and several copies of the weights,
at least 420 MB of expert weights in all, so that no call finds its weights in the L2 cache (60 MB, H200);
with one token, successive calls hit disjoint experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

COLD_BYTES = 420e6


@dataclass(frozen=True)
class Shape:
    """The experts of one layer of a model."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int


SHAPES = {
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "olmoe-1b-7b": Shape(64, 8, 2048, 1024),
    "deepseek-v2-lite": Shape(64, 6, 2048, 1408),
    "gpt-oss-20b": Shape(32, 4, 2880, 2880),
}


def routing(shape: Shape, tokens: int, call: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int32 and weights float32 ``[tokens, top_k]`` of a call: uniform, seeded."""
    turns = shape.experts // shape.top_k
    seed = 1234 + 100003 * tokens + (call // turns if tokens == 1 else call) + 7919 * shape.experts
    generator = torch.Generator().manual_seed(seed)
    if tokens == 1:
        order = torch.randperm(shape.experts, generator=generator)
        ids = order[call % turns * shape.top_k :][None, : shape.top_k]
    else:
        ids = torch.rand(tokens, shape.experts, generator=generator).topk(shape.top_k, 1).indices
    weights = torch.rand(tokens, shape.top_k, generator=generator)
    return ids.to(torch.int32), weights / weights.sum(1, keepdim=True)


def rotation(shape: Shape, tokens: int, expert_bytes: float) -> tuple[int, int]:
    """How many calls a graph holds, and how many copies of the weights they use."""
    copies = max(1, math.ceil(COLD_BYTES / (expert_bytes * shape.experts)))
    missed = (1 - shape.top_k / shape.experts) ** tokens
    hit = shape.top_k if tokens == 1 else shape.experts * (1 - missed)
    calls = min(96, max(4, math.ceil(COLD_BYTES / (hit * expert_bytes))))
    return calls, min(copies, calls)


def copy_of(shape: Shape, tokens: int, call: int, copies: int) -> int:
    """The copy of the weights that a call uses."""
    turns = shape.experts // shape.top_k
    return (call // turns if tokens == 1 else call) % copies


def graph_us(calls: Sequence[Callable[[], object]], milliseconds: float = 8.0) -> float:
    """Microseconds a call: the median of 5 to 40 replays of a graph of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()

    def replay() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        return begin, end

    begin, end = replay()
    torch.cuda.synchronize()
    times = min(40, max(5, int(milliseconds / max(begin.elapsed_time(end), 1e-3))))
    events = [replay() for _ in range(times)]
    torch.cuda.synchronize()
    elapsed = sorted(begin.elapsed_time(end) for begin, end in events)
    return elapsed[len(elapsed) // 2] * 1e3 / len(calls)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference, relative to `expected`."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())
