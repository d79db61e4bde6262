"""`moqc plan`: from a model's outline and one budget to sizes, memory and speed, with alternatives beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from moqc.errors import BudgetError, UserError
from moqc.frontend.trace import Outline
from moqc.passes.allocation_problem import FORMATS
from moqc.pipelines import candidate_formats, check_bits
from moqc.predict.effort import Effort, estimate_effort
from moqc.predict.sizes import (
    RUNTIME_BYTES,
    Footprint,
    Storage,
    expert_weights,
    footprint,
    uniform_bits,
    work_bytes,
)
from moqc.predict.speed import Speed, decode_speed, speed_source
from moqc.quant.formats import Format
from moqc.quant.problem import SPENT_SHARE
from moqc.schedules.kernel_times import KernelTimes

ALTERNATIVES = (2.0, 2.5, 3.0, 4.0)
"""Expert file bits shown beside the plan."""
UNIFORM = ("int4-g128", "int8-g128")
"""One format for all experts, as most peers store them, shown beside the plan."""
_STEPS = 60


@dataclass(frozen=True, slots=True)
class Deployment:
    """What does not depend on the budget.

    `linears` is a format or None, `context` and `batch` size the cache, `copied_bytes` is the size of the
    tokenizer files that go into the artifact, `times` what is known about speed, `cache` the dtype of the
    key-value cache, `library` the bytes of a compiled library with one format of experts, and with several,
    `chunk` the tokens of a prompt that are run in one call.
    """

    linears: Format | None
    uniform: bool
    context: int
    batch: int
    copied_bytes: int
    times: KernelTimes
    cache: str = "float32"
    library: tuple[int, int] = (0, 0)
    chunk: int = 512


@dataclass(frozen=True, slots=True)
class Prediction:
    """One way to store a model, and what it takes."""

    name: str
    bits: float
    stored: Footprint
    file_bytes: int
    peak_bytes: int
    speed: Speed | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; speeds are null without a roofline."""
        return {
            "name": self.name,
            "expert_file_bits_per_weight": self.bits,
            "file_bytes": self.file_bytes,
            "parameter_bytes": self.stored.parameter_bytes,
            "peak_bytes": self.peak_bytes,
            "kv_bytes_per_token": self.stored.kv_bytes_per_token,
            "bytes_per_token": self.stored.token_bytes,
            "decode_tokens_per_s": None if self.speed is None else 1 / self.speed.seconds,
            "bound": None if self.speed is None else self.speed.bound,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """The prediction for a budget, how it fares as the cache fills, alternatives, and the effort."""

    model: Outline
    target: str
    deployment: Deployment
    chosen: Prediction
    contexts: tuple[tuple[int, int, float | None], ...]
    """(tokens so far, cache bytes of one sequence, tokens a second)."""
    alternatives: tuple[Prediction, ...]
    effort: Effort

    @property
    def total_weights(self) -> int:
        """Weights of the model, tied ones once."""
        matrices = sum(matrix.rows * matrix.columns for matrix in self.model.matrices)
        return expert_weights(self.model) + matrices + self.model.other_weights

    @property
    def speed_source(self) -> str:
        """Where the numbers behind the speed are from."""
        return speed_source(self.model, self.chosen.stored, self.deployment.times)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model_type": self.model.model_type,
            "weights": self.total_weights,
            "active_weights": self.chosen.stored.token_weights,
            "target": self.target,
            "context": self.deployment.context,
            "batch": self.deployment.batch,
            **self.chosen.to_dict(),
            "speed_source": self.speed_source,
            "contexts": [
                {"tokens": tokens, "kv_bytes": cache, "decode_tokens_per_s": rate}
                for tokens, cache, rate in self.contexts
            ],
            "effort": asdict(self.effort),
            "alternatives": [row.to_dict() for row in self.alternatives],
        }


def make_plan(
    model: Outline,
    target: str,
    deployment: Deployment,
    *,
    bits: float | None = None,
    size: int | None = None,
    latency: float | None = None,
    calibration_tokens: int = 32_768,
) -> Plan:
    """Plan for one budget: `bits` per expert weight, `size` of the artifact in bytes, or `latency`.

    The latency is in seconds a decoded token, with an empty cache.

    Raises BudgetError with the reachable range, and UserError for a latency where no roofline is known.
    """
    if sum(value is not None for value in (bits, size, latency)) != 1:
        raise UserError("give one budget: --bits, --size or --latency")
    predict = _predictor(model, deployment)
    if bits is not None:
        chosen = predict(_affordable(model, deployment, bits))
    elif size is not None:
        chosen = _largest(model, predict, lambda item: item.file_bytes, size, "bytes")
    elif deployment.times.machine is None:
        raise UserError("no roofline is known for this target: give --bandwidth, or another budget")
    else:
        chosen = _largest(model, predict, _milliseconds, 1e3 * (latency or 0), "ms a token")
    return Plan(
        model,
        target,
        deployment,
        chosen,
        tuple(_at_context(model, deployment, chosen, length) for length in _contexts(deployment.context)),
        _alternatives(model, deployment, predict),
        estimate_effort(model, candidate_formats(chosen.bits), calibration_tokens),
    )


def _predictor(model: Outline, deployment: Deployment) -> Callable[[float], Prediction]:
    """Expert file bits -> the prediction."""

    def predict(bits: float) -> Prediction:
        library = deployment.library[0 if deployment.uniform else 1]
        storage = Storage(bits, deployment.uniform, deployment.linears, library)
        stored = footprint(model, storage, deployment.cache)
        speed = decode_speed(model, stored, deployment.times, context=0)
        cache = deployment.batch * deployment.context * stored.kv_bytes_per_token
        work = work_bytes(model, deployment.batch * min(deployment.chunk, deployment.context))
        return Prediction(
            name=f"{'uniform' if deployment.uniform else 'mixed'} {bits:.3g}",
            bits=bits,
            stored=stored,
            file_bytes=stored.file_bytes + deployment.copied_bytes,
            peak_bytes=RUNTIME_BYTES + stored.weight_bytes + cache + work,
            speed=speed,
        )

    return predict


def _reach(model: Outline, bits: float, uniform: bool = False) -> tuple[float, float]:
    """Least and most file bits of a plan for a budget of `bits`."""
    names = FORMATS if uniform else candidate_formats(bits)
    reached = [uniform_bits(model, Format.parse(name)) for name in names]
    return min(reached), max(reached)


def _affordable(model: Outline, deployment: Deployment, bits: float) -> float:
    """File bits that a plan of at most `bits` takes. Raises BudgetError as the compilation would."""
    check_bits(bits)
    least, most = _reach(model, bits, deployment.uniform)
    if bits < least or most < SPENT_SHARE * bits:
        raise BudgetError(
            f"{bits:.4g} bits per weight are out of reach: plans take {least:.3f} to {most:.3f}; "
            f"{'raise' if bits < least else 'lower'} the bits"
        )
    if deployment.uniform:
        reached = (uniform_bits(model, Format.parse(name)) for name in FORMATS)
        return max(found for found in reached if found <= bits)
    return min(bits, most)


def _milliseconds(item: Prediction) -> float:
    return 0.0 if item.speed is None else 1e3 * item.speed.seconds


def _largest(
    model: Outline,
    predict: Callable[[float], Prediction],
    measure: Callable[[Prediction], float],
    budget: float,
    unit: str,
) -> Prediction:
    """The prediction with most bits whose `measure`, which grows with them, is within `budget`."""
    low, high = _reach(model, bits=16.0)
    least = measure(predict(low))
    if least > budget:
        wanted, needed = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (budget, least))
        raise BudgetError(
            f"{wanted} {unit} are out of reach: the smallest plan, {low:.3f} file bits per expert weight, "
            f"takes {needed}; raise the budget, or give the other matrices fewer bits (--linears)"
        )
    if measure(predict(high)) <= budget:
        return predict(high)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(predict(middle)) <= budget else (low, middle)
    return predict(low)


def _contexts(longest: int) -> list[int]:
    """A few lengths up to the longest."""
    return sorted({length for length in (512, 2048, 8192, 32_768) if length < longest} | {longest})


def _at_context(
    model: Outline, deployment: Deployment, chosen: Prediction, length: int
) -> tuple[int, int, float | None]:
    cache = length * chosen.stored.kv_bytes_per_token
    speed = decode_speed(model, chosen.stored, deployment.times, length)
    return length, cache, None if speed is None else 1 / speed.seconds


def _alternatives(
    model: Outline, deployment: Deployment, predict: Callable[[float], Prediction]
) -> tuple[Prediction, ...]:
    """Other budgets, and one format for all experts."""
    rows = [replace(predict(bits), name=f"mixed, {bits:g} bits") for bits in ALTERNATIVES]
    uniform = _predictor(model, replace(deployment, uniform=True))
    for name in UNIFORM:
        rows.append(replace(uniform(uniform_bits(model, Format.parse(name))), name=f"all {name}"))
    least, _ = _reach(model, bits=16.0)
    return tuple(row for row in rows if row.bits >= least)
