"""Time humming-kernels (pip, 0.1.19): ``python benchmarks/humming_experts.py OUT.json [BITS...]``.

The same layers: WnA16 experts, bf16 activations, group 128, its shipped heuristics for the exact number of
tokens; both of its ways to take the problem are timed, the better one is reported. A layer is gate_up ->
silu * up -> down -> weighted sum; the two elementwise steps are Triton kernels, tokens are sorted by expert
beforehand.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from humming.forward import humming_forward
from humming.kernel.humming import HummingKernel
from humming.schema import HummingWeightSchema
from humming.transform import prepare_layer_config, transform_humming_tensors
from humming.tune import get_heuristics_config
from workload import SHAPES, Shape, copy_of, graph_us, relative_error, rotation, routing

GROUP = 128
TOKENS = (1, 8, 16, 64, 512, 4096)
NAMES = tuple(name for name, s in SHAPES.items() if s.hidden % GROUP == s.intermediate % GROUP == 0)
"""Humming wants whole groups."""
MODES = ("indexed", "grouped_contiguous")


@triton.jit
def _silu_mul(x, y, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    gate = tl.load(x + row * 2 * columns + at, mask=inside).to(tl.float32)
    up = tl.load(x + row * 2 * columns + columns + at, mask=inside).to(tl.float32)
    tl.store(y + row * columns + at, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _weighted_sum(
    x, weights, place, y, columns, TOP: tl.constexpr, SORTED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP):
        pair = row * TOP + k
        weight = tl.load(weights + pair)
        if SORTED:
            pair = tl.load(place + pair).to(tl.int64)
        total += weight * tl.load(x + pair * columns + at, mask=inside).to(tl.float32)
    tl.store(y + row * columns + at, total.to(y.dtype.element_ty), mask=inside)


class Call:
    """One call's routing, sorted by expert and aligned to Humming's block sizes."""

    def __init__(self, shape: Shape, tokens: int, number: int) -> None:
        self.shape = shape
        ids, weights = routing(shape, tokens, number)
        flat = ids.reshape(-1).long()
        self.order = torch.argsort(flat, stable=True)
        self.counts = torch.bincount(flat, minlength=shape.experts)
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(flat))
        self.ids, self.weights, self.place = ids.cuda(), weights.cuda(), place.int().cuda()
        self.token = (self.order // shape.top_k).cuda()
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), self.counts.cumsum(0)]).cuda()
        self.hit = int((self.counts > 0).sum())
        self._aligned: dict[int, tuple[torch.Tensor, ...]] = {}

    def aligned(self, block: int) -> tuple[torch.Tensor, ...]:
        """Pairs by expert, each expert's padded to `block`; the expert of each block; the number of rows."""
        if block not in self._aligned:
            pairs, experts, start = [], [], 0
            for expert, count in enumerate(self.counts.tolist()):
                blocks = -(-count // block)
                pairs.append(self.order[start : start + count])
                pairs.append(torch.full((blocks * block - count,), len(self.order), dtype=torch.long))
                experts += [expert] * blocks
                start += count
            rows = torch.cat(pairs).int()
            listed = (
                rows,
                torch.tensor(experts, dtype=torch.int32),
                torch.tensor([len(rows)], dtype=torch.int32),
            )
            self._aligned[block] = tuple(tensor.cuda() for tensor in listed)
        return self._aligned[block]


class Layer:
    """Humming's weights and configurations of one layer at `bits`."""

    def __init__(self, shape: Shape, bits: int, copies: int) -> None:
        self.shape, self.bits = shape, bits
        self.schema = HummingWeightSchema(b_dtype=f"uint{bits}", weight_scale_group_size=GROUP)
        self.sizes = [(2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)]
        self.configs = [self.config(rows, columns) for rows, columns in self.sizes]
        self.raw = [self.random(rows, columns) for rows, columns in self.sizes] if copies else []
        first = [
            transform_humming_tensors(config, {k: v.clone() for k, v in raw.items()})
            for config, raw in zip(self.configs, self.raw, strict=False)
        ]
        self.copies = [first] + [
            [{k: v.clone() for k, v in tensors.items() if v is not None} for tensors in first]
            for _ in range(copies - 1)
        ]
        total = sum(
            v.numel() * v.element_size() for tensors in first for v in tensors.values() if v is not None
        )
        self.expert_bytes = total / shape.experts

    def config(self, rows: int, columns: int) -> Any:
        return prepare_layer_config(
            rows, columns, self.schema, None, num_experts=self.shape.experts, torch_dtype=torch.bfloat16
        )

    def random(self, rows: int, columns: int) -> dict[str, torch.Tensor]:
        experts = self.shape.experts
        words = (experts, rows, columns * self.bits // 32)
        codes = torch.randint(-(2**31), 2**31 - 1, words, dtype=torch.int32, device="cuda")
        scales = torch.rand(experts, rows, columns // GROUP, device="cuda") * 0.02 + 0.005
        return {"weight": codes, "weight_scale": scales.to(torch.bfloat16)}

    def tuning(self, tokens: int, mode: str) -> list[dict[str, Any]]:
        pairs = tokens * self.shape.top_k
        return [get_heuristics_config(config, shape_m=pairs, gemm_type=mode) for config in self.configs]


def compile_all(bits: tuple[int, ...]) -> None:
    """Compile every kernel beforehand, 16 at a time."""
    keys = {}
    for shape in map(SHAPES.__getitem__, NAMES):
        for width in bits:
            layer = Layer(shape, width, 0)
            for tokens in TOKENS:
                for mode in MODES:
                    for config, tuned in zip(layer.configs, layer.tuning(tokens, mode), strict=True):
                        keys[config.to_str(), json.dumps({"gemm_type": mode}), json.dumps(tuned)] = None

    def compile_one(key: tuple[str, ...]) -> None:
        torch.cuda.set_device(0)
        HummingKernel.prepare_kernels(*key, 0)

    begin = time.time()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, keys))
    print(f"humming: {len(keys)} kernels compiled in {time.time() - begin:.0f} s", flush=True)


def time_layer(layer: Layer, tokens: int, mode: str) -> tuple[float, float, float]:
    """(µs, experts hit, relative error; nan where not checked) of one number of tokens."""
    shape = layer.shape
    number, copies = rotation(shape, tokens, layer.expert_bytes) if tokens < 512 else (2, 1)
    calls = [Call(shape, tokens, at) for at in range(number)]
    pairs, indexed = tokens * shape.top_k, mode == "indexed"
    make = lambda *size: torch.zeros(size, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    x = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
    products = [make(pairs, 2 * shape.intermediate), make(pairs, shape.hidden)]
    hidden, y = make(pairs, shape.intermediate), make(tokens, shape.hidden)
    locks = [torch.zeros(8192, dtype=torch.int32, device="cuda") for _ in range(2)]
    tuned = layer.tuning(tokens, mode)
    compute, texts = json.dumps({"gemm_type": mode}), [json.dumps(each) for each in tuned]
    blocks = [each["block_shape"][0] for each in tuned]

    def product(at: int, call: Call, tensors: dict[str, torch.Tensor], given: torch.Tensor) -> None:
        if indexed:
            rows, experts, total = call.aligned(blocks[at])
            where = {"sorted_ids": rows, "expert_ids": experts, "num_tokens_padded": total}
            where["top_k"] = 1 if at else shape.top_k
        else:
            where = {"expert_layout": call.starts}
        names = ("weight_scale", "zero_point", "weight_scale_2")
        humming_forward(
            layer.configs[at], inputs=given, outputs=products[at], locks=locks[at], valid_shape_m=pairs,
            compute_config=compute, tuning_config=texts[at], weight=tensors["weight"],
            **where, **{name: tensors.get(name) for name in names},
        )  # fmt: skip

    def run(call: Call, weights: list[dict[str, torch.Tensor]]) -> None:
        product(0, call, weights[0], x if indexed else x[call.token])
        grid = (pairs, triton.cdiv(shape.intermediate, 1024))
        _silu_mul[grid](products[0], hidden, shape.intermediate, BLOCK=1024, num_warps=4)
        product(1, call, weights[1], hidden)
        grid = (tokens, triton.cdiv(shape.hidden, 1024))
        _weighted_sum[grid](
            products[1], call.weights, call.place, y, shape.hidden,
            TOP=shape.top_k, SORTED=not indexed, BLOCK=1024, num_warps=4,
        )  # fmt: skip

    run(calls[0], layer.copies[0])
    error = float("nan")
    if shape.experts > 8 and tokens == 8:  # a small enough matrix to dequantize whole
        error = relative_error(y, expected(layer, calls[0], x))
    chosen = [layer.copies[copy_of(shape, tokens, at, copies)] for at in range(number)]
    us = graph_us([lambda c=c, w=w: run(c, w) for c, w in zip(calls, chosen, strict=True)], 12.0)
    return us, sum(call.hit for call in calls) / number, error


def expected(layer: Layer, call: Call, x: torch.Tensor) -> torch.Tensor:
    """The layer's value from Humming's own dequantization."""
    shape, out = layer.shape, torch.zeros(x.shape, device="cuda")

    def weights(at: int, expert: int) -> torch.Tensor:
        one = {name: tensor[expert : expert + 1] for name, tensor in layer.raw[at].items()}
        return layer.schema.dequant_tensors(one)[0].float()

    for expert in sorted(set(call.ids.flatten().tolist())):
        token, chosen = torch.where(call.ids == expert)
        both = x[token].float() @ weights(0, expert).T
        gate, up = both[:, : shape.intermediate], both[:, shape.intermediate :]
        value = (torch.nn.functional.silu(gate) * up) @ weights(1, expert).T
        out.index_add_(0, token, value * call.weights[token, chosen][:, None])
    return out


def main() -> None:
    out, bits = Path(sys.argv[1]), tuple(map(int, sys.argv[2:])) or (4, 3, 2, 1)
    torch.manual_seed(0)
    compile_all(bits)
    rows = []
    for name in NAMES:
        shape = SHAPES[name]
        for width in bits:
            size = 3 * shape.hidden * shape.intermediate * (width + 0.125) / 8
            layer = Layer(
                shape, width, max(rotation(shape, tokens, size)[1] for tokens in TOKENS if tokens < 512)
            )
            for tokens in TOKENS:
                timed = {mode: time_layer(layer, tokens, mode) for mode in MODES}
                mode = min(timed, key=lambda each: timed[each][0])
                us, hit, error = timed[mode]
                rows.append(
                    {
                        "provider": "humming", "shape": name, "bits": f"w{width}", "tokens": tokens, "us": us,
                        "error": None if error != error else error, "mode": mode,
                        "hit_bytes": hit * layer.expert_bytes,
                    }
                )  # fmt: skip
                print(rows[-1], flush=True)
            del layer
            torch.cuda.empty_cache()
            out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
