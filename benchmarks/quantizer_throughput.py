"""Weights a second of the quantizer on layers of real shapes, and what whole models would take.

    python benchmarks/quantizer_throughput.py --shapes mixtral-8x7b,qwen3-30b-a3b

A layer's experts go in one batch, as in a compilation, with random weights and Hessians of random correlated
inputs. Projected: every expert weight once (quantization), and once in each of five formats besides (costs).
"""

from __future__ import annotations

import argparse
import time

import torch

from moqc.passes.measure_costs import FORMATS
from moqc.quant.device import compute_device
from moqc.quant.formats import Format
from moqc.quant.gptq import quantize_gptq

SHAPES = {"mixtral-8x7b": (8, 4096, 14336, 32), "qwen3-30b-a3b": (128, 2048, 768, 48)}
"""Experts of a layer, hidden and intermediate size, layers."""


def hessians(batch: int, columns: int, device: torch.device) -> torch.Tensor:
    """Second moments float32 [batch, K, K] of 2K inputs whose channels have one factor in common."""
    generator = torch.Generator(device).manual_seed(0)
    found = torch.empty(batch, columns, columns, device=device)
    for matrix in found:
        x = torch.randn(2 * columns, columns, device=device, generator=generator)
        x += torch.randn(2 * columns, 1, device=device, generator=generator)
        torch.mm(x.T, x, out=matrix)
    return found


def seconds(batch: int, rows: int, columns: int, fmt: Format, device: torch.device) -> float:
    """Of one batch of matrices."""
    weights = torch.randn(
        batch, rows, columns, device=device, generator=torch.Generator(device).manual_seed(1)
    )
    moments = hessians(batch, columns, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    quantize_gptq(weights, moments, fmt)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--formats", default="int3-g128")
    options = parser.parse_args()
    device = compute_device()
    seconds(2, 128, 256, Format.parse("int3-g128"), device)  # libraries load
    print(f"on {torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'}\n")
    print("| layer | format | gate or up, s | down, s | M weights/s | all once, min | in all formats, min |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in options.shapes.split(","):
        experts, hidden, intermediate, layers = SHAPES[name]
        for fmt in map(Format.parse, options.formats.split(",")):
            up = seconds(experts, intermediate, hidden, fmt, device)
            down = seconds(experts, hidden, intermediate, fmt, device)
            layer = 2 * up + down
            rate = 3 * experts * hidden * intermediate / layer / 1e6
            once = layer * layers / 60
            print(
                f"| {name} | {fmt} | {up:.2f} | {down:.2f} | {rate:.0f} | {once:.1f} "
                f"| {once * len(FORMATS):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
