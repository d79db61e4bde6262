"""Decoding speed: times of kernels where they were measured, a roofline for the rest, fixed costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moqc.errors import UserError
from moqc.frontend.trace import AttentionUse, Outline
from moqc.predict.sizes import Footprint, projections
from moqc.schedules.kernel_times import KernelTimes
from moqc.targets import Roofline

REACHED = 0.75
"""Share of a memory's bandwidth at which kernels read weights that are not in the caches: 66 to 90 % in
`moqc bench-kernels` on a Xeon and an H200."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds to decode one token of one sequence, by what limits them: they add up.

    `memory`: of what waits for bytes, `compute`: for multiplications, `fixed`: for neither.
    """

    memory: float = 0.0
    compute: float = 0.0
    fixed: float = 0.0

    def __add__(self, other: Speed) -> Speed:
        return Speed(self.memory + other.memory, self.compute + other.compute, self.fixed + other.fixed)

    @property
    def seconds(self) -> float:
        """Of one token."""
        return self.memory + self.compute + self.fixed

    @property
    def bound(self) -> str:
        """What takes longest: ``memory``, ``compute`` or ``overhead``."""
        parts = {"memory": self.memory, "compute": self.compute, "overhead": self.fixed}
        return max(parts, key=lambda name: parts[name])


def with_bandwidth(times: KernelTimes, gigabytes: float | None) -> KernelTimes:
    """`times` with the memory bandwidth a user states, in GB/s; without a roofline, memory alone limits.

    Of what plain reads reach, kernels reach `REACHED`; a target's roofline has what they were measured to.
    Times measured on another machine are left out. Raises UserError for a bandwidth that is not above 0.
    """
    if gigabytes is None:
        return times
    if not gigabytes > 0:
        raise UserError(f"bandwidth {gigabytes:g}: GB/s must be above 0")
    stated = f"memory bandwidth of {gigabytes:g} GB/s as given, of which kernels reach {REACHED:.0%}"
    reached, machine = REACHED * gigabytes * 1e9, times.machine
    if machine is None:
        source = f"{stated}; nothing else is counted"
        return KernelTimes(Roofline(reached, float("inf"), 0.0, source), {})
    source = f"{stated}; otherwise {machine.source}"
    return KernelTimes(replace(machine, bandwidth=reached, source=source), {})


def limited(machine: Roofline, bytes: float, weights: float) -> Speed:
    """Time to read `bytes` and multiply `weights`, which overlap."""
    memory, compute = bytes / machine.bandwidth, weights / machine.weight_rate
    return Speed(memory=memory) if memory >= compute else Speed(compute=compute)


def decode_speed(model: Outline, stored: Footprint, times: KernelTimes, context: int) -> Speed | None:
    """Time of one token after `context` others; None without a roofline."""
    machine = times.machine
    if machine is None:
        return None
    return _expert_speed(model, stored, times, machine) + other_speed(model, stored, machine, context)


def other_speed(model: Outline, stored: Footprint, machine: Roofline, context: int) -> Speed:
    """What `decode_speed` counts beside the routed experts."""
    elements = sum(_seen(use, context) * use.element_count for use in model.attention)
    a_token = sum(use.element_count for use in model.attention)
    cache = stored.kv_bytes_per_token * elements / a_token if a_token else 0.0
    bytes = stored.token_bytes - stored.token_expert_bytes
    weights = stored.token_weights - stored.token_expert_weights
    return (
        limited(machine, bytes, weights)
        + limited(machine, cache, elements)
        + Speed(fixed=model.layers * machine.layer_seconds)
    )


def speed_source(model: Outline, stored: Footprint, times: KernelTimes) -> str:
    """Where the numbers behind `decode_speed` are from."""
    if times.machine is None:
        return "no roofline is known for this target"
    if _measured_seconds(model, stored, times) is None:
        return times.machine.source
    return f"experts: measured, {times.source}; the rest: {times.machine.source}"


def _expert_speed(model: Outline, stored: Footprint, times: KernelTimes, machine: Roofline) -> Speed:
    roofline = limited(machine, stored.token_expert_bytes, stored.token_expert_weights)
    seconds = _measured_seconds(model, stored, times)
    if seconds is None:
        return roofline
    return Speed(memory=seconds) if roofline.memory else Speed(compute=seconds)


def _measured_seconds(model: Outline, stored: Footprint, times: KernelTimes) -> float | None:
    """Of the experts, if matrices of all their shapes were measured in formats around their bits."""
    bits, total = 8 * stored.token_expert_bytes / stored.token_expert_weights, 0.0
    for use in model.experts:
        for rows, columns in projections(use.layout):
            found = times.between(rows, columns, bits)
            if found is None:
                return None
            total += 1e-6 * use.top_k * found
    return total


def _seen(use: AttentionUse, context: int) -> int:
    """Tokens of the cache that a token reads after `context` others; a window limits them."""
    return min(context, use.window) if use.window else context
