"""What skipped experts save on the CPU: the experts block of a known model with and without pruning.

    python benchmarks/prune_experts.py --shape qwen3-30b-a3b --bits 3

Calls with and without `R.moqc.prune_routing` take turns on the same tokens; every call finds its weights out
of the caches. `gain` is the time saved over the share of the experts' bytes that was skipped: 1 is perfect.
The last line compares hit experts that are neighbors in memory with such that are not: what a layout by
co-activation could save at most.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
import tvm
from tvm import relax, tirx

from moqc.bench.kernels import parse_classes
from moqc.bench.shapes import find_shape
from moqc.ir import ops
from moqc.ir.packed import mixed_operands, packed_types
from moqc.passes.legalize import LOWERINGS
from moqc.quant.routing import SitePruning, prune
from moqc.targets import find_target

SETS = 4


def build(shape: Any, fmt: Any, types: dict[str, Any], target: Any) -> Any:
    """Functions plain and pruned (x, ids, weights, positions, strength, limits, slopes, *operands) -> y."""
    builder = relax.BlockBuilder()
    lowerings = LOWERINGS[target.schedules].operators
    for name in ("plain", "pruned"):
        tokens = tirx.Var("t", "int64")
        inputs = [
            relax.Var("x", relax.TensorType([tokens, shape.hidden], "float32")),
            relax.Var("ids", relax.TensorType([tokens, shape.top_k], "int64")),
            relax.Var("weights", relax.TensorType([tokens, shape.top_k], "float32")),
            relax.Var("positions", relax.TensorType([tokens], "int64")),
            relax.Var("strength", relax.TensorType([shape.experts], "float32")),
            relax.Var("limits", relax.TensorType([3], "float32")),
            relax.Var("slopes", relax.TensorType([shape.experts, shape.hidden], "float16")),
        ]
        weights = [relax.Var(key.replace(".", "_"), ty) for key, ty in types.items()]
        with builder.function(name, [*inputs, *weights]):
            with builder.dataflow():
                x, ids, shares = inputs[:3]
                if name == "pruned":
                    attrs = {"rule": "mass", "exponent": "2.0", "renormalize": 0, "first": 4}
                    operands = ["strength", "limits", "slopes"]
                    call = ops.prune_routing(*inputs, site="bench", operands=operands, **attrs)
                    lowered = lowerings[ops.PRUNE_ROUTING](builder, builder.normalize(call), target)
                    both = builder.emit(lowered)
                    ids, shares = (builder.emit(relax.TupleGetItem(both, at)) for at in range(2))
                call = ops.mixed_experts(
                    x,
                    ids,
                    shares,
                    *weights,
                    site="bench",
                    activation=shape.activation,
                    activations="int8",
                    operands=mixed_operands(dict.fromkeys(ops.PROJECTIONS, (fmt,)), ()),
                    classes=[f"{projection}:{fmt}" for projection in ops.PROJECTIONS],
                    intermediate=shape.intermediate,
                )
                lower = lowerings[ops.MIXED_EXPERTS]
                result = builder.emit_output(lower(builder, builder.normalize(call), target))
            builder.emit_func_output(result)
    executable = tvm.compile(builder.get(), tvm.target.Target(target.tvm))
    return relax.VirtualMachine(executable, tvm.cpu())


def operand_types(shape: Any, fmt: Any) -> dict[str, Any]:
    types = {"table": relax.TensorType([3, shape.experts, 2], "int32")}
    for projection in ops.PROJECTIONS:
        rows, columns = (shape.hidden, shape.intermediate)[:: 1 if projection == "down" else -1]
        for part, ty in packed_types(fmt, rows, columns, (shape.experts,)).items():
            types[f"{projection}.0.{part}"] = ty
    return types


def random_operands(types: dict[str, Any], generator: np.random.Generator) -> list[Any]:
    arrays = []
    for name, ty in types.items():
        extents = [int(extent) for extent in ty.shape]
        if name == "table":
            places = np.stack([np.zeros(extents[1]), np.arange(extents[1])], axis=-1)
            array = np.broadcast_to(places, extents).astype(np.int32)
        elif str(ty.dtype) == "float16":
            array = generator.uniform(0.001, 0.02, extents).astype(np.float16)
        else:
            array = np.frombuffer(generator.bytes(int(np.prod(extents))), np.uint8).reshape(extents)
        arrays.append(tvm.runtime.tensor(np.ascontiguousarray(array)))
    return arrays


class Bench:
    """The compiled block, `SETS` sets of weights, and random tokens routed as a softmax would."""

    def __init__(self, shape: Any, fmt: Any) -> None:
        self.shape, self.generator = shape, np.random.default_rng(0)
        types = operand_types(shape, fmt)
        self.machine = build(shape, fmt, types, find_target("native"))
        self.sets = [random_operands(types, self.generator) for _ in range(SETS)]
        self.calls = 0
        slopes = self.generator.standard_normal((shape.experts, shape.hidden), np.float32)
        self.slopes = torch.from_numpy(0.5 * slopes / shape.hidden**0.5).half()

    def rule(self, limit: float) -> SitePruning:
        """The pruning, as it is compiled."""
        strength = torch.ones(self.shape.experts)
        return SitePruning("mass", limit, strength, False, 2.0, slopes=self.slopes)

    def tokens(self, count: int, *, adjacent: bool = False) -> list[torch.Tensor]:
        """x, ids, weights (adding up to 1) and positions of `count` tokens."""
        shape, draw = self.shape, self.generator
        logits = torch.from_numpy(draw.standard_normal((count, shape.experts)) * 1.5)
        top = logits.softmax(1).topk(shape.top_k, dim=1)
        ids = top.indices
        if adjacent:
            first = draw.integers(0, shape.experts - shape.top_k, (count, 1))
            ids = torch.from_numpy(first + np.arange(shape.top_k))
        weights = (top.values / top.values.sum(1, keepdim=True)).float()
        x = torch.from_numpy(draw.standard_normal((count, shape.hidden), np.float32))
        return [x, ids, weights, torch.full((count,), 100)]

    def run(self, name: str, tokens: list[torch.Tensor], limit: float) -> float:
        """Seconds of one call, on the next set of weights."""
        limits = torch.tensor([limit, float("inf"), 0.0])
        given = [*tokens, torch.ones(self.shape.experts), limits, self.slopes]
        arguments = [tvm.runtime.tensor(tensor.numpy()) for tensor in given]
        self.calls += 1
        start = time.perf_counter()
        self.machine[name](*arguments, *self.sets[self.calls % SETS])
        return time.perf_counter() - start


def limit_for(bench: Bench, share: float) -> float:
    """The limit of the mass rule that skips `share` of the pairs."""
    x, ids, weights, positions = bench.tokens(2000)
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        dropped = (prune(bench.rule(middle), x, ids, weights, positions)[0] < 0).float().mean()
        low, high = (low, middle) if dropped > share else (middle, high)
    return high


def compare(bench: Bench, count: int, share: float, seconds: float) -> str:
    """One line: time with and without pruning on the same tokens, in turns.

    Tokens skip different numbers of experts, so sums are compared, not medians; the tenth of the pairs in
    which either call was slowest is left out, for what else the machine did meanwhile.
    """
    limit = limit_for(bench, share)
    rule = bench.rule(limit)
    rows: list[tuple[float, float, int, int]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rows) < 5:
        tokens = bench.tokens(count)
        kept = prune(rule, *tokens)[0]
        work = (tokens[1], kept[kept >= 0])
        if count == 1:  # bytes; with many tokens, rows
            work = (work[0].unique(), work[1].unique())
        order = ("plain", "pruned") if len(rows) % 2 else ("pruned", "plain")
        times = {name: bench.run(name, tokens, limit) for name in order}
        rows.append((times["plain"], times["pruned"], work[0].numel(), work[1].numel()))
    measured = np.array(rows)
    slowest = measured[:, 0] / measured[:, 2] + measured[:, 1] / measured[:, 3]
    plain, pruned, whole, left = measured[slowest <= np.quantile(slowest, 0.9)].mean(0)
    skipped, saved = 1 - left / whole, 1 - pruned / plain
    return (
        f"{count:5d} tokens  {plain * 1e6:9.0f} us  {pruned * 1e6:9.0f} us  "
        f"{skipped:6.1%} of the {'bytes' if count == 1 else 'rows'} skipped  "
        f"{saved:6.1%} saved  gain {saved / skipped:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--bits", default="3")
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    bench = Bench(find_shape(options.shape), parse_classes(options.bits)[0])
    for name in ("plain", "pruned"):
        bench.run(name, bench.tokens(1), 0.9)
    for count, share in ((1, 0.15), (1, 0.2), (1, 0.3), (512, 0.2)):
        print(compare(bench, count, share, options.seconds), flush=True)
    layouts: dict[bool, list[float]] = {False: [], True: []}
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < end:
        for adjacent, times in layouts.items():
            times.append(bench.run("plain", bench.tokens(1, adjacent=adjacent), 1.0))
    apart, beside = (statistics.median(times) * 1e6 for times in layouts.values())
    change = beside / apart - 1
    print(f"1 token: experts apart {apart:.0f} us, side by side {beside:.0f} us ({change:+.1%})")


if __name__ == "__main__":
    main()
