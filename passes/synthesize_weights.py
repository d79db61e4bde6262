"""synthesize-weights: a packed module without weights, to measure speed at real sizes before a download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import IRModule

from moqc.errors import PipelineError
from moqc.ir.annotations import BITS, LINEAR_BITS, PARAMS, Key
from moqc.ir.sites import ExpertSite, find_experts
from moqc.passes.base import Pass, PassContext
from moqc.passes.quantize_experts import check_plan, mix_experts
from moqc.passes.quantize_linears import QuantizeLinears, check_activations, rewrite_linears
from moqc.quant.formats import Format


@dataclass(frozen=True)
class SynthesizeWeights(Pass):
    """Make every quantized matrix packed without looking at weights; who packages the module draws them.

    `experts` is a format, or several with their shares as ``int2-g64:3+int4-g64:1``: every projection of
    every block gets them in these shares, at random. `linears` is both `linears` and `embeddings` of
    quantize-linears.
    """

    name: ClassVar[str] = "synthesize-weights"
    reads: ClassVar[tuple[Key[Any], ...]] = (PARAMS,)
    writes: ClassVar[tuple[Key[Any], ...]] = (BITS, LINEAR_BITS)

    experts: tuple[str, ...] = ("int3-g64",)
    linears: str = "int8-g64-sym"
    activations: str = "int8"

    def check(self) -> None:
        """Refuse shares of formats and modes of activations that cannot be."""
        parse_mix(self.experts)
        check_activations(self.name, self.activations)

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Write the plans and rewrite main; draws with the seed of `ctx`."""
        sites = find_experts(mod)
        if not sites:
            raise PipelineError(f"{self.name}: the module has no R.moqc.experts left")
        mod = BITS.put(mod, random_plan(sites, parse_mix(self.experts), ctx.seed))
        check_plan(mod)
        mod = mix_experts(mod, self.activations, ctx.layout)
        linears = QuantizeLinears(
            linears=self.linears, embeddings=self.linears, activations=self.activations
        ).plan(mod)
        mod = rewrite_linears(mod, linears, self.activations, ctx.layout)
        return LINEAR_BITS.put(mod, {site: str(format) for site, format in linears.items()})


def parse_mix(entries: Sequence[str]) -> dict[Format, float]:
    """Format -> its share, of entries ``FORMAT`` or ``FORMAT:SHARE``; shares add up to 1.

    Raises PipelineError for a share that is no positive number, or a format given twice.
    """
    mix: dict[Format, float] = {}
    for entry in entries:
        name, _, text = entry.partition(":")
        try:
            share = float(text or 1)
        except ValueError:
            share = 0.0
        format = Format.parse(name)
        if not 0 < share < float("inf") or format in mix:
            raise PipelineError(
                f"{entry!r}: expected a format, each once, with a share such as int2-g64:3,int4-g64:1"
            )
        mix[format] = share
    if not mix:
        raise PipelineError("no format for the experts: give at least one, such as int3-g64")
    return {format: share / sum(mix.values()) for format, share in mix.items()}


def random_plan(
    sites: Sequence[ExpertSite], mix: Mapping[Format, float], seed: int
) -> dict[str, dict[str, list[str]]]:
    """BITS with the formats of `mix` in their shares, as near as whole experts allow, in random order."""
    generator = np.random.default_rng(seed)
    names, bounds = [str(format) for format in mix], np.cumsum(list(mix.values()))
    plan: dict[str, dict[str, list[str]]] = {}
    for site in sites:
        # The middle of each expert's slot in 0..1 says whose share it falls into.
        places = (np.arange(site.experts) + 0.5) / site.experts
        chosen = np.minimum(np.searchsorted(bounds, places), len(names) - 1)
        plan[site.site] = {
            projection: [names[index] for index in generator.permutation(chosen)]
            for projection in site.projections
        }
    return plan
