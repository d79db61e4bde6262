"""Decoding speed from a roofline: bytes over bandwidth, weights over the rate of the kernels, fixed costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moqc.errors import UserError
from moqc.frontend.trace import AttentionUse, Outline
from moqc.predict.sizes import FLOAT_BYTES, Footprint
from moqc.targets import Roofline


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds to decode one token of one sequence, by what they are spent on.

    Reading and multiplying overlap, so that the larger of them counts; fixed costs add up.
    """

    memory: float
    compute: float
    fixed: float

    @property
    def seconds(self) -> float:
        """Of one token."""
        return max(self.memory, self.compute) + self.fixed

    @property
    def bound(self) -> str:
        """What takes longest: ``memory``, ``compute`` or ``overhead``."""
        parts = {"memory": self.memory, "compute": self.compute, "overhead": self.fixed}
        return max(parts, key=lambda name: parts[name])


def with_bandwidth(machine: Roofline | None, gigabytes: float | None) -> Roofline | None:
    """`machine` with the memory bandwidth a user states, in GB/s; without one known, memory alone limits.

    Raises UserError for a bandwidth that is not above 0.
    """
    if gigabytes is None:
        return machine
    if not gigabytes > 0:
        raise UserError(f"bandwidth {gigabytes:g}: GB/s must be above 0")
    stated = f"memory bandwidth of {gigabytes:g} GB/s as given"
    if machine is None:
        return Roofline(gigabytes * 1e9, float("inf"), 0.0, f"{stated}; nothing else is counted")
    return replace(machine, bandwidth=gigabytes * 1e9, source=f"{stated}; otherwise {machine.source}")


def decode_speed(model: Outline, stored: Footprint, machine: Roofline, context: int) -> Speed:
    """Time of one token after `context` others."""
    cache = cache_bytes(model, context)
    return Speed(
        memory=(stored.token_bytes + cache) / machine.bandwidth,
        compute=(stored.token_weights + cache / FLOAT_BYTES) / machine.weight_rate,
        fixed=model.layers * machine.layer_seconds,
    )


def cache_bytes(model: Outline, context: int) -> int:
    """Bytes of the key-value cache that a token reads after `context` others; windows limit it."""
    return sum(_seen(use, context) * use.element_count * FLOAT_BYTES for use in model.attention)


def _seen(use: AttentionUse, context: int) -> int:
    return min(context, use.window) if use.window else context
