"""Time the experts kernels of a target on the layer of a known model, beside the machine's read bandwidth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moqc.bench.layer import Layer
from moqc.bench.memory import read_bandwidth
from moqc.bench.shapes import find_shape
from moqc.errors import TargetError, UserError
from moqc.log import track
from moqc.quant.formats import Format
from moqc.targets import find_target, missing_features

COLD_BYTES = 1 << 30
"""Weights that lie between two uses of the same ones."""


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One measured row: the whole experts block, from activations to the weighted sum.

    `bits` is an entry of ``--bits``, `weights` is ``hot`` or ``cold``, `us` the median time of a call.
    `gb_per_s`: bytes of the packed matrices of the distinct experts hit, over that time, in 1e9 bytes;
    `read_gb_per_s`: what plain reads reach in the same run; `gflops`: 2 x multiply-adds over the time.
    """

    target: str
    shape: str
    bits: str
    tokens: int
    weights: str
    us: float
    gb_per_s: float
    read_gb_per_s: float
    gflops: float

    def to_dict(self) -> dict[str, Any]:
        """A row of ``--json``."""
        return dataclasses.asdict(self)


def parse_classes(text: str) -> tuple[Format, ...]:
    """The formats of one entry of ``--bits``: ``4``, or ``4/2/1`` for experts that take these in turn.

    A number stands for the compiler's default format of so many bits; a format's name may stand in its place.
    Raises UserError.
    """
    names = text.split("/")
    return tuple(Format.parse(f"int{name}-g64" if name.isdigit() else name) for name in names)


def bench_kernels(
    target: str, shape: str, bits: Sequence[str], tokens: Sequence[int], *, cold: bool = True
) -> list[KernelTime]:
    """Measure every combination. Cold: each call finds its weights out of the caches, `COLD_BYTES` later.

    Raises UserError for an unknown name or a bad number, TargetError when this machine cannot run the target.
    """
    machine, layer = find_target(target), find_shape(shape)
    missing = missing_features(machine)
    if missing:
        raise TargetError(
            f"{machine.name}: this machine lacks {', '.join(missing)}; measure on one that has it"
        )
    if not tokens or min(tokens) < 1:
        raise UserError(f"tokens {', '.join(map(str, tokens)) or 'none'}: must be at least 1")
    classes = [parse_classes(text) for text in bits]
    bandwidth = read_bandwidth(machine, COLD_BYTES)
    rows = []
    for text, formats in track(list(zip(bits, classes, strict=True)), "kernels"):
        bench = Layer(machine, layer, formats, COLD_BYTES if cold else 0)
        for count in tokens:
            seconds, hit_bytes, read = bench.measure(count, bandwidth)
            rows.append(
                KernelTime(
                    target=machine.name,
                    shape=shape,
                    bits=text,
                    tokens=count,
                    weights="cold" if cold else "hot",
                    us=seconds * 1e6,
                    gb_per_s=hit_bytes / seconds / 1e9,
                    read_gb_per_s=read / 1e9,
                    gflops=2 * count * layer.top_k * layer.weights_per_expert / seconds / 1e9,
                )
            )
    return rows
