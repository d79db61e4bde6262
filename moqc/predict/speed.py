"""Decoding speed from a roofline: bytes over bandwidth, weights over the rate of the kernels, fixed costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moqc.errors import UserError
from moqc.frontend.trace import AttentionUse, Outline
from moqc.predict.sizes import Footprint
from moqc.targets import Roofline

REACHED = 0.75
"""Share of a memory's bandwidth at which kernels read weights that are not in the caches: 66 to 90 % in
`moqc bench-kernels` on a Xeon and an H200."""


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

    Of what plain reads reach, kernels reach `REACHED`; a target's roofline has what they were measured to.
    Raises UserError for a bandwidth that is not above 0.
    """
    if gigabytes is None:
        return machine
    if not gigabytes > 0:
        raise UserError(f"bandwidth {gigabytes:g}: GB/s must be above 0")
    stated = f"memory bandwidth of {gigabytes:g} GB/s as given, of which kernels reach {REACHED:.0%}"
    reached = REACHED * gigabytes * 1e9
    if machine is None:
        return Roofline(reached, float("inf"), 0.0, f"{stated}; nothing else is counted")
    return replace(machine, bandwidth=reached, source=f"{stated}; otherwise {machine.source}")


def decode_speed(model: Outline, stored: Footprint, machine: Roofline, context: int) -> Speed:
    """Time of one token after `context` others."""
    elements = sum(_seen(use, context) * use.element_count for use in model.attention)
    a_token = sum(use.element_count for use in model.attention)
    cache = stored.kv_bytes_per_token * elements / a_token if a_token else 0.0
    return Speed(
        memory=(stored.token_bytes + cache) / machine.bandwidth,
        compute=(stored.token_weights + elements) / machine.weight_rate,
        fixed=model.layers * machine.layer_seconds,
    )


def _seen(use: AttentionUse, context: int) -> int:
    """Tokens of the cache that a token reads after `context` others; a window limits them."""
    return min(context, use.window) if use.window else context
