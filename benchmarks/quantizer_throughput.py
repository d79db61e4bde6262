"""Weights a second of the quantizer on layers of real shapes, and what whole models would take.

    python benchmarks/quantizer_throughput.py --shapes mixtral-8x7b,qwen3-30b-a3b

A layer's experts go in one batch, as in a compilation, with random weights and Hessians of random correlated
inputs. Projected for a compilation: every expert weight once, for which the mean of the formats is taken;
and, where costs are gptq's too, in all formats together besides (the Hessians are factored once). Needs
torch only.
"""

from __future__ import annotations

import argparse
import time

import torch

from moqc.quant.device import compute_device
from moqc.quant.formats import Format
from moqc.quant.gptq import quantize_gptq_each

SHAPES = {"mixtral-8x7b": (8, 4096, 14336, 32), "qwen3-30b-a3b": (128, 2048, 768, 48)}
"""Experts of a layer, hidden and intermediate size, layers."""
FORMATS = "int1-g128-sym-s8,int2-g128-sym-s8,int3-g128-sym-s8,int4-g128-s8"
"""The default candidates of measure-costs."""


def hessians(batch: int, columns: int, device: torch.device) -> torch.Tensor:
    """Second moments float32 [batch, K, K] of 2K inputs whose channels have one factor in common."""
    generator = torch.Generator(device).manual_seed(0)
    found = torch.empty(batch, columns, columns, device=device)
    for matrix in found:
        x = torch.randn(2 * columns, columns, device=device, generator=generator)
        x += torch.randn(2 * columns, 1, device=device, generator=generator)
        torch.mm(x.T, x, out=matrix)
    return found


def seconds(weights: torch.Tensor, moments: torch.Tensor, formats: list[Format]) -> float:
    """Of one batch of matrices in all of `formats`."""
    if weights.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    quantize_gptq_each(weights, moments, formats)
    if weights.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    experts: int, rows: int, columns: int, formats: list[Format], device: torch.device
) -> list[float]:
    """Seconds of a projection in each format, and in all together. Done before once: libraries are loaded."""
    generator = torch.Generator(device).manual_seed(1)
    weights = torch.randn(experts, rows, columns, device=device, generator=generator)
    moments = hessians(experts, columns, device)
    seconds(weights[:1], moments[:1], formats)
    return [seconds(weights, moments, some) for some in (*([fmt] for fmt in formats), formats)]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--formats", default=FORMATS)
    options = parser.parse_args()
    device, formats = compute_device(), [Format.parse(name) for name in options.formats.split(",")]
    print(f"on {torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'}\n")
    print("| layer | format | gate or up, s | down, s | M weights/s | all experts once, min |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in options.shapes.split(","):
        experts, hidden, intermediate, layers = SHAPES[name]
        ups = measure(experts, intermediate, hidden, formats, device)
        downs = measure(experts, hidden, intermediate, formats, device)
        layer = [2 * up + down for up, down in zip(ups, downs, strict=True)]
        weights = 3 * experts * hidden * intermediate
        for what, up, down, total in zip([*formats, "all"], ups, downs, layer, strict=True):
            rate = weights * (len(formats) if what == "all" else 1) / total / 1e6
            print(f"| {name} | {what} | {up:.2f} | {down:.2f} | {rate:.0f} | {total * layers / 60:.1f} |")
        *single, together = layer
        once = sum(single) / len(single) * layers / 60
        both = once + together * layers / 60
        print(f"\n{name}, a compilation: {once:.1f} min; with costs of gptq {both:.1f} min\n", flush=True)


if __name__ == "__main__":
    main()
