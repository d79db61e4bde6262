"""The fallback to beat: ``python benchmarks/grouped_mm.py OUT.json``.

bf16 experts by torch's grouped matrix product, and the same after dequantizing packed 4-bit weights to bf16
(one pass over all experts, as a library without low-bit kernels would). Tokens are sorted by expert before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from workload import SHAPES, Shape, graph_us, routing

TOKENS = (64, 512, 4096)


def dequantize(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """int4-g128-sym: codes uint8 [..., K / 2], scales bf16 [..., K / 128] -> out [..., K]."""
    low, high = (codes & 15).to(torch.bfloat16) - 8, (codes >> 4).to(torch.bfloat16) - 8
    both = torch.stack([low, high], -1).flatten(-2).unflatten(-1, (-1, 128))
    torch.mul(both, scales.unsqueeze(-1), out=out.unflatten(-1, (-1, 128)))


def time_layer(shape: Shape, tokens: int) -> dict[str, float]:
    """Microseconds of a layer with bf16 weights, and of making them."""
    ids, weights = routing(shape, tokens, 0)
    order = torch.argsort(ids.flatten().long(), stable=True).cuda()
    ends = torch.bincount(ids.flatten().long(), minlength=shape.experts).cumsum(0).int().cuda()
    token, share = order // shape.top_k, weights.flatten().cuda()[order].to(torch.bfloat16)
    made = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(tokens, shape.hidden, **made)
    sizes = [(2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)]
    dense = [torch.randn(shape.experts, *size, **made) for size in sizes]
    bytes_ = {"dtype": torch.uint8, "device": "cuda"}
    codes = [torch.randint(0, 256, (shape.experts, n, k // 2), **bytes_) for n, k in sizes]
    scales = [torch.rand(shape.experts, n, k // 128, **made) for n, k in sizes]
    y = torch.zeros(tokens, shape.hidden, **made)

    def run() -> None:
        both = torch._grouped_mm(x[token], dense[0].transpose(1, 2), offs=ends)
        gate, up = both.chunk(2, -1)
        out = torch._grouped_mm(torch.nn.functional.silu(gate) * up, dense[1].transpose(1, 2), offs=ends)
        y.zero_().index_add_(0, token, out * share[:, None])

    unpack = torch.compile(dequantize, dynamic=False)
    for each in zip(codes, scales, dense, strict=True):
        unpack(*each)
    alone = graph_us([run], 12.0)
    making = graph_us([lambda: [unpack(*each) for each in zip(codes, scales, dense, strict=True)]], 12.0)
    return {"bf16-grouped-mm": alone, "dequantize-grouped-mm": alone + making}


def main() -> None:
    rows = []
    for name in ("mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b", "deepseek-v2-lite"):
        for tokens in TOKENS:
            for provider, us in time_layer(SHAPES[name], tokens).items():
                bits = "bf16" if provider.startswith("bf16") else "w4"
                rows.append({"provider": provider, "shape": name, "bits": bits, "tokens": tokens, "us": us})
                print(rows[-1], flush=True)
            Path(sys.argv[1]).write_text(json.dumps(rows, indent=1))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
