"""quantize-linears: the linears outside the experts, and the embeddings, become packed ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from tvm import IRModule, relax

from moqc.calibrate.workspace import ParamStore
from moqc.errors import PipelineError
from moqc.ir import ops
from moqc.ir.annotations import LINEAR_BITS, LINEAR_PLAN, PARAMS, Key
from moqc.ir.packed import packed_names, packed_types
from moqc.ir.sites import LinearSite, LinearUse, bindings, find_linears, find_uses, site_of, weight_names
from moqc.log import track
from moqc.passes.base import Pass, PassContext
from moqc.passes.rewriting import Rewrite, apply_rewrite, new_parameter
from moqc.quant.formats import ROW_TILE, Format
from moqc.quant.layouts import DEFAULT, find_layout
from moqc.quant.pack import Packed
from moqc.quant.rtn import quantize_rtn

NONE = "none"
ACTIVATIONS = ("float", "int8")
SLICE = 4096
"""Rows quantized at a time, a multiple of ROW_TILE: a whole vocabulary and its candidates need gigabytes."""


@dataclass(frozen=True)
class QuantizeLinears(Pass):
    """Quantize attention, shared-expert and output projections and the embedding table, rounding to nearest.

    `linears` and `embeddings` are format names, or ``none`` to leave that kind as it is; a table that is used
    for both is an embedding. Where allocate-bits left LINEAR_PLAN, that decides instead. Left alone in any
    case: routers, matrices of fewer than 16 rows, and sites in which the regular expression `skip` is found.
    """

    name: ClassVar[str] = "quantize-linears"
    reads: ClassVar[tuple[Key[Any], ...]] = (PARAMS, LINEAR_PLAN)
    writes: ClassVar[tuple[Key[Any], ...]] = (LINEAR_BITS,)

    linears: str = "int8-g64-sym"
    embeddings: str = "int8-g64-sym"
    skip: str = ""
    activations: str = "int8"

    def required(self) -> tuple[Key[Any], ...]:
        """LINEAR_PLAN may be missing: the options then decide."""
        return (PARAMS,)

    def check(self) -> None:
        """Refuse modes of activations there are not."""
        check_activations(self.name, self.activations)

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Quantize the weights of the checkpoint of `ctx`; packed arrays go to its params."""
        chosen = self.plan(mod)
        if chosen:
            checkpoint, params = ctx.need("checkpoint", self.name), ctx.need("params", self.name)
            names = {site: name for name in PARAMS.of(mod) if (site := site_of(name)) in chosen}
            for site, format in track(chosen.items(), "quantizing linears", len(chosen)):
                put_packed(params, site, quantize_by_rows(checkpoint.load(names[site]), format, ctx.layout))
            mod = rewrite_linears(mod, chosen, self.activations, ctx.layout)
        return LINEAR_BITS.put(
            mod, {**(LINEAR_BITS.get(mod) or {}), **{s: str(f) for s, f in chosen.items()}}
        )

    def plan(self, mod: IRModule) -> dict[str, Format]:
        """Site -> the format it will get. Raises FormatError for a name that is none."""
        planned = LINEAR_PLAN.get(mod)
        if planned is not None:
            return {site: Format.parse(planned[site]) for site in self.eligible(mod) if site in planned}
        formats = {
            kind: None if text == NONE else Format.parse(text)
            for kind, text in (("linear", self.linears), ("embedding", self.embeddings))
        }
        chosen = {}
        for name, site in self.eligible(mod).items():
            format = formats["embedding" if "embedding" in site.uses else "linear"]
            if format is not None:
                chosen[name] = format
        return chosen

    def eligible(self, mod: IRModule) -> dict[str, LinearSite]:
        """Name -> the linears and tables that are not left alone."""
        return {site.site: site for site in find_linears(mod) if not self._left_alone(site)}

    def _left_alone(self, site: LinearSite) -> bool:
        try:
            skipped = bool(self.skip) and re.search(self.skip, site.site) is not None
        except re.error as error:
            raise PipelineError(
                f"{self.name}: skip={self.skip} is not a regular expression: {error}"
            ) from None
        return skipped or site.router or site.rows < ROW_TILE


def check_activations(reader: str, activations: str) -> None:
    """Raise PipelineError naming the pass `reader` unless kernels can read their inputs so."""
    if activations not in ACTIVATIONS:
        raise PipelineError(f"{reader}: activations={activations} is not one of {', '.join(ACTIVATIONS)}")


def quantize_by_rows(weight: torch.Tensor, format: Format, layout: str = DEFAULT) -> Packed:
    """Quantize ``[N, K]`` to nearest with clip search and pack it, `SLICE` rows at a time."""
    pack = find_layout(layout).pack
    parts = [pack(quantize_rtn(rows.float(), format)) for rows in torch.split(weight, SLICE)]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Packed(
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zeros=np.concatenate(zeros) if zeros else None,
    )


def put_packed(params: ParamStore, site: str, packed: Packed) -> None:
    """Store ``<site>.codes``, ``<site>.scales`` and, if there, ``<site>.zeros``."""
    params.put(f"{site}.codes", packed.codes)
    params.put(f"{site}.scales", packed.scales)
    if packed.zeros is not None:
        params.put(f"{site}.zeros", packed.zeros)


def rewrite_linears(
    mod: IRModule, chosen: Mapping[str, Format], activations: str, layout: str = DEFAULT
) -> IRModule:
    """`mod` with the uses of the sites in `chosen` packed; a tied table is shared by all its uses."""
    rewrite, biases = Rewrite(), find_biases(mod)
    for use in find_uses(mod):
        if use.site not in chosen:
            continue
        format = chosen[use.site]
        rows, columns = (int(extent) for extent in use.weight.ty.shape)
        if use.weight not in rewrite.parameters:
            types = packed_types(format, rows, columns, layout=layout)
            rewrite.parameters[use.weight] = {
                f"{use.site}.{part}": new_parameter(f"{use.site}.{part}", ty) for part, ty in types.items()
            }
        tensors = list(rewrite.parameters[use.weight].values())
        if use.kind == "embedding":
            rewrite.values[use.output] = _embedding(use, tensors, format, columns, layout)
            continue
        build = _linear_builder(use, tensors, format, rows, activations, layout)
        rewrite.values[use.output] = build([])
        if use.output in biases:
            total, bias = biases[use.output]
            rewrite.values[total] = build([bias])  # the product without bias is then dead and goes
    return apply_rewrite(mod, rewrite)


def _embedding(
    use: LinearUse, tensors: list[relax.Var], format: Format, columns: int, layout: str
) -> relax.Call:
    return ops.embedding(
        use.source,
        *tensors,
        site=use.site,
        format=str(format),
        columns=columns,
        operands=list(packed_names(format)),
        layout=layout,
    )


def _linear_builder(
    use: LinearUse, tensors: list[relax.Var], format: Format, rows: int, activations: str, layout: str
) -> Callable[[list[relax.Var]], relax.Call]:
    def build(bias: list[relax.Var]) -> relax.Call:
        return ops.linear(
            use.source,
            *tensors,
            *bias,
            site=use.site,
            format=str(format),
            rows=rows,
            activations=activations,
            operands=[*packed_names(format), *(["bias"] if bias else [])],
            layout=layout,
        )

    return build


def find_biases(mod: IRModule) -> dict[relax.Var, tuple[relax.Var, relax.Var]]:
    """Output of a linear -> (sum, bias), where all that is done with it is to add a 1-D weight."""
    weights = weight_names(mod)
    outputs = {use.output for use in find_uses(mod) if use.kind == "linear"}
    found: dict[relax.Var, tuple[relax.Var, relax.Var]] = {}
    uses = Counter(relax.analysis.free_vars(mod["main"].body.body))
    for variable, value in bindings(mod["main"]):
        uses.update(relax.analysis.free_vars(value))
        if ops.is_call(value, "relax.add"):
            for product, bias in (value.args, reversed(value.args)):
                if product in outputs and bias in weights and bias.ty.ndim == 1:
                    found[product] = (variable, bias)
    return {product: pair for product, pair in found.items() if uses[product] == 1}
