"""Time the experts kernels of a target on the layer of a known model, beside the machine's read bandwidth."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
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
SECONDS = 1.0
"""Time spent on one row, at least."""
TURNS = 7
"""How often memory is read meanwhile."""
HOT_CALLS = 10
"""Calls in a row with hot weights."""


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
    if machine.schedules != "cpu":
        raise TargetError(
            f"{machine.name}: kernels are timed on CPUs; time a compiled model with `moqc bench`"
        )
    missing = missing_features(machine)
    if missing:
        raise TargetError(
            f"{machine.name}: this machine lacks {', '.join(missing)}; measure on one that has it"
        )
    if not tokens or min(tokens) < 1:
        raise UserError(f"tokens {', '.join(map(str, tokens)) or 'none'}: must be at least 1")
    classes = [parse_classes(text) for text in bits]
    bandwidth = read_bandwidth(machine, COLD_BYTES)
    # Layers take turns, so that each finds all of theirs between two uses of its own weights.
    size = COLD_BYTES // len(classes) if cold else 0
    layers = [Layer(machine, layer, formats, size) for formats in track(classes, "layers")]
    rows: dict[str, list[KernelTime]] = {text: [] for text in bits}
    for count in track(tokens, "kernels"):
        times, read = _measure(layers, count, bandwidth, 1 if cold else HOT_CALLS)
        for text, (seconds, hit_bytes) in zip(bits, times, strict=True):
            rows[text].append(
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
    return [row for text in dict.fromkeys(bits) for row in rows[text]]


def _measure(
    layers: Sequence[Layer], tokens: int, bandwidth: Callable[[], float], calls: int
) -> tuple[list[tuple[float, float]], float]:
    """For each layer the seconds of a call and the bytes of the experts it hits; the reads' rate. Medians.

    Layers take turns of so many `calls`, of which the first does not count if there are several; every now
    and then memory is read. A machine that others share changes its speed within seconds.
    """
    timed = [layer.timed(tokens) for layer in layers]
    found: list[list[tuple[float, float]]] = [[] for _ in layers]
    reads: list[float] = []
    for run in timed:
        run()  # starts the threads
    for turn in range(TURNS):
        reads.append(bandwidth())
        end = time.perf_counter() + SECONDS * len(layers) / TURNS
        while time.perf_counter() < end or len(found[0]) <= turn:
            for run, results in zip(timed, found, strict=True):
                results += [run() for _ in range(calls)][calls > 1 :]
    medians = [tuple(map(statistics.median, zip(*results, strict=True))) for results in found]
    return [(seconds, size) for seconds, size in medians], statistics.median(reads)
