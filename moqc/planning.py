"""Size, memory and speed before anything is compiled, and which models can be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moqc.errors import UserError
from moqc.inputs import architecture_gate, context_length, open_workspace, require_compiler, resolve_config
from moqc.keywords import keywords
from moqc.options import PlanOptions
from moqc.targets import find_target

if TYPE_CHECKING:
    from moqc.predict.plan import Plan


@keywords(PlanOptions)
def plan(model: str | Path, options: PlanOptions) -> Plan:
    """Predict what `compile` would give, from the model's configuration alone: no weights are read.

    Give one of `bits`, `size` and `latency`, that of a decoded token with an empty cache.

    Args:
        model: a checkpoint folder, of which config.json is enough, an id of the Hugging Face hub, or a known
            shape's name, such as qwen3-30b-a3b.

    Raises:
        UserError: for a model moqc cannot read, or a budget out of reach (BudgetError, with the range).

    """
    from moqc.frontend.trace import outline
    from moqc.package import copied_bytes
    from moqc.predict.plan import Deployment, make_plan
    from moqc.predict.speed import with_bandwidth
    from moqc.quant.allocators.table import find_allocator
    from moqc.quant.formats import Format
    from moqc.schedules.kernel_times import kernel_times

    find_allocator(options.allocator)
    if options.max_batch < 1:
        raise UserError(f"max-batch {options.max_batch}: must be at least 1")
    machine = find_target(options.target)
    config, folder = resolve_config(model)
    deployment = Deployment(
        linears=None if options.linears == "none" else Format.parse(options.linears),
        uniform=options.allocator == "uniform",
        context=context_length(config, options.context),
        batch=options.max_batch,
        copied_bytes=copied_bytes(folder),
        times=with_bandwidth(kernel_times(machine), options.bandwidth),
        cache=machine.kv_cache(options.kv_cache, machine.mode(None)),
        library=machine.library_bytes,
        chunk=machine.chunk_of(options.max_batch),
    )
    return make_plan(
        outline(config, latent=machine.latent_attention),
        machine.name,
        deployment,
        bits=options.bits,
        size=options.size,
        latency=options.latency,
        calibration_tokens=options.calibration_tokens,
    )


def models(*, verify: str | None = None, cache: Path | str | None = None) -> dict[str, Any]:
    """The decoder types with experts and what the gate says about each: the shipped table, or a new one.

    Args:
        verify: a model type to run the gate on now, or "all"; None reads the table that moqc ships.
        cache: folder where passes of the gate are kept.

    Returns:
        ``transformers`` (its version) and ``rows`` of ``model_type``, ``status`` (exact or refused) and
        ``reason``.

    """
    from moqc.frontend import survey

    if verify is None:
        return survey.shipped().dump()
    require_compiler()
    types = survey.decoder_types() if verify == "all" else (verify,)
    gate = architecture_gate(open_workspace(cache), find_target("native"))
    return survey.survey(types, gate).dump()
