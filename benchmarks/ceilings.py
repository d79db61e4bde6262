"""What this GPU can do at best, measured in the same run: ``python benchmarks/ceilings.py OUT.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from workload import graph_us


@triton.jit
def _read(x, y, BLOCK: tl.constexpr, TIMES: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * TIMES
    seen = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(TIMES):
        seen ^= tl.load(x + (first + i) * BLOCK + tl.arange(0, BLOCK))
    total = tl.sum(seen, 0)
    if total == 123456789:
        tl.store(y, total)


def read_ceilings() -> dict[str, float]:
    """Reading 4 GiB at once, and cold reads of less (one kernel a read, over all of the 4 GiB)."""
    words = torch.randint(-(2**31), 2**31 - 1, (2**30,), dtype=torch.int32, device="cuda")
    sink = torch.empty(1, dtype=torch.int32, device="cuda")

    def read(first: int, count: int, block: int, times: int, warps: int) -> None:
        _read[(count // (block * times),)](words[first:], sink, block, times, num_warps=warps)

    best = 0.0
    for block, times, warps in ((4096, 8, 8), (8192, 4, 8), (2048, 16, 4)):
        us = graph_us([lambda p=(block, times, warps): read(0, words.numel(), *p)], 20.0)
        best = max(best, words.numel() * 4 / us / 1e6)
    ceilings = {"read_tb_per_s": best}
    for mebibytes in (16, 45, 90, 180):
        size = mebibytes * 2**20 // 4 // 32768 * 32768
        starts = [at * size for at in range(min(words.numel() // size, 16))]
        us = graph_us([lambda at=at, n=size: read(at, n, 4096, 8, 8) for at in starts], 20.0)
        ceilings[f"cold_read_{mebibytes}_mib_us"] = us
    return ceilings


def main() -> None:
    ceilings = read_ceilings()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ceilings["bf16_matmul_8192_tflop_per_s"] = 2 * 8192**3 / graph_us([lambda: a @ b], 60.0) / 1e6
    small = torch.zeros(128, device="cuda")
    ceilings["empty_graph_node_us"] = graph_us([lambda: small.add_(1)] * 200, 5.0)
    print(ceilings)
    Path(sys.argv[1]).write_text(json.dumps(ceilings, indent=1))


if __name__ == "__main__":
    main()
