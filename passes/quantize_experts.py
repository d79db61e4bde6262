"""quantize-experts: R.moqc.experts -> R.moqc.mixed_experts, one packed tensor stack for each bit class."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from tvm import IRModule, relax

from moqc.calibrate.workspace import ParamStore
from moqc.errors import PipelineError, UserError
from moqc.ir import ops
from moqc.ir.annotations import BITS, PARAMS, PROTECTION, PRUNING, Key
from moqc.ir.packed import mixed_operands, packed_types
from moqc.ir.sites import ExpertSite, bindings, expert_site, weight_names
from moqc.log import track
from moqc.passes.base import Pass, PassContext
from moqc.passes.quantize_linears import check_activations
from moqc.passes.rewriting import Rewrite, apply_rewrite, bind_before, new_parameter
from moqc.quant.activations import rotated_name
from moqc.quant.formats import Format
from moqc.quant.layouts import DEFAULT, Layout, PackedTensors, find_layout
from moqc.quant.protection import Protection
from moqc.quant.quantizers import STORABLE
from moqc.quant.tensor import Quantized


class ExpertProvider(Protocol):
    """Where the quantized experts come from: the store of `moqc.calibrate.quantize`, or a test's own."""

    def get(self, site: str, projection: str, expert: int) -> Quantized:
        """One expert's matrix [rows, columns], in the format BITS gave it."""


@dataclass(frozen=True)
class QuantizeExperts(Pass):
    """Quantize the routed experts as moqc.bits says and group them into bit classes.

    `quantizer` is one of gptq, awq, rtn and hqq; `activations` tells whether the kernels read their inputs as
    floats or quantize them to int8 by groups of 32. With `rotate`, the inputs of down are rotated in blocks
    of 32 at run time (`moqc.quant.hadamard`), for targets whose kernels can.
    """

    name: ClassVar[str] = "quantize-experts"
    reads: ClassVar[tuple[Key[Any], ...]] = (PARAMS, BITS)

    quantizer: str = "gptq"
    activations: str = "int8"
    rotate: bool = False

    def check(self) -> None:
        """Refuse quantizers and modes of activations there are not."""
        if self.quantizer not in STORABLE:
            raise PipelineError(
                f"{self.name}: quantizer={self.quantizer} is not one of {', '.join(STORABLE)}"
            )
        check_activations(self.name, self.activations)

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Quantize with checkpoint, calibration and workspace of `ctx`; packed arrays go to its params."""
        from moqc.calibrate.quantize import quantize_experts

        checkpoint, workspace = ctx.need("checkpoint", self.name), ctx.need("workspace", self.name)
        params = ctx.need("params", self.name)
        sites = check_plan(mod)
        if not sites:
            return mod
        plan = BITS.of(mod)
        provider = quantize_experts(
            checkpoint,
            plan,
            self.quantizer,
            ctx.calibration,
            workspace,
            rotate=self.rotate,
            protections=protections(mod),
        )
        return rewrite_experts(mod, provider, params, self.activations, ctx.layout, rotate=self.rotate)


def check_plan(mod: IRModule) -> list[ExpertSite]:
    """The experts blocks of `mod`. Raises PipelineError when BITS does not fit them, before hours of work."""
    plan, names = BITS.of(mod), weight_names(mod)
    sites = []
    for _, call in _experts_calls(mod):
        site = expert_site(call, mod)
        sites.append(site)
        if site.site not in plan:
            raise PipelineError(f"{BITS} has no entry for {site.site}: allocate bits for every experts block")
        given = {projection: len(formats) for projection, formats in plan[site.site].items()}
        if given != dict.fromkeys(site.projections, site.experts):
            raise PipelineError(
                f"{BITS} of {site.site} has {given} formats; its projections "
                f"{', '.join(site.projections)} need {site.experts} each"
            )
        for name, operand in ops.operands(call).items():
            if name in ops.EXPERT_OPERANDS and operand not in names:
                raise PipelineError(f"{site.site}: {name} is computed, not a weight; it cannot be quantized")
    return sites


def rewrite_experts(
    mod: IRModule,
    provider: ExpertProvider,
    params: ParamStore,
    activations: str,
    layout: str = DEFAULT,
    *,
    rotate: bool = False,
) -> IRModule:
    """`mod` with every experts block mixed, its matrices taken from `provider` and packed into `params`."""
    plan = BITS.of(mod)
    for _, call in track(list(_experts_calls(mod)), "packing experts"):
        site = expert_site(call, mod)
        removed = removed_experts(mod, site.site)
        classes = {name: bit_classes(plan[site.site][name], removed) for name in site.projections}
        for name, array in pack_site(site, classes, provider, find_layout(layout)):
            params.put(f"{site.site}.{name}", array)
    return mix_experts(mod, activations, layout, rotate=rotate)


def mix_experts(mod: IRModule, activations: str, layout: str = DEFAULT, *, rotate: bool = False) -> IRModule:
    """`mod` with every experts block mixed as BITS says; its packed matrices are new parameters.

    With `rotate`, what reaches down is rotated first, as the matrices of down must be.
    """
    plan, rewrite = BITS.of(mod), Rewrite()
    for variable, call in _experts_calls(mod):
        site, named = expert_site(call, mod), ops.operands(call)
        removed = removed_experts(mod, site.site)
        classes = {name: bit_classes(plan[site.site][name], removed) for name in site.projections}
        packed = _packed_parameters(site, classes, layout)
        name = rotated_name(site.activation) if rotate else site.activation
        modes = {"activation": name, "activations": activations, "layout": layout}
        x = _extended_input(mod, rewrite, variable, site, named["x"])
        rewrite.values[variable] = _mixed_call(call, site, x, classes, packed, modes, removed)
        for number, projection in enumerate(site.projections):
            prefixes = (f"{projection}.", "table") if number == 0 else (f"{projection}.",)
            rewrite.parameters[named[projection]] = {
                f"{site.site}.{name}": new for name, new in packed.items() if name.startswith(prefixes)
            }
    return apply_rewrite(mod, rewrite)


def _mixed_call(
    call: relax.Call,
    site: ExpertSite,
    x: relax.Expr,
    classes: Mapping[str, Mapping[Format, list[int]]],
    packed: Mapping[str, relax.Var],
    modes: Mapping[str, str],
    removed: Sequence[int],
) -> relax.Call:
    """The mixed_experts call of `x`, with the attributes `modes`, in the place of the experts `call`."""
    named = ops.operands(call)
    biases = {name: named[name] for name in site.operands if name.endswith("_bias")}
    formats = {projection: list(members) for projection, members in classes.items()}
    return ops.mixed_experts(
        x,
        *(named[name] for name in ("ids", "weights")),
        *packed.values(),
        *biases.values(),
        site=site.site,
        operands=mixed_operands(formats, biases),
        classes=[f"{projection}:{format}" for projection, members in formats.items() for format in members],
        intermediate=site.intermediate,
        removed=removed,
        hidden=site.hidden if site.added else 0,
        **modes,
    )


def _extended_input(
    mod: IRModule, rewrite: Rewrite, variable: relax.Var, site: ExpertSite, x: relax.Expr
) -> relax.Expr:
    """What gate and up of `site` read: x, and its protected channels again."""
    if not site.added:
        return x
    added = relax.const(np.array(protections(mod)[site.site].added, np.int64))
    again = bind_before(rewrite, variable, relax.op.take(x, added, axis=1), "protected")
    return bind_before(rewrite, variable, relax.op.concat([x, again], axis=1), "extended")


def protections(mod: IRModule) -> dict[str, Protection]:
    """PROTECTION of `mod` by site; empty where protect-channels did not run."""
    return {
        site: Protection(tuple(entry["channels"]), entry["copies"])
        for site, entry in (PROTECTION.get(mod) or {}).items()
    }


def bit_classes(formats: Sequence[str], removed: Collection[int] = ()) -> dict[Format, list[int]]:
    """Format -> its experts in ascending order, formats ascending: the bit classes of one projection."""
    stored = {expert: Format.parse(name) for expert, name in enumerate(formats) if expert not in removed}
    classes: dict[Format, list[int]] = {format: [] for format in sorted(set(stored.values()))}
    for expert, format in stored.items():
        classes[format].append(expert)
    return classes


def removed_experts(mod: IRModule, site: str) -> list[int]:
    """The experts of `site` that pruning never keeps, by its policy for cold experts."""
    entry = (PRUNING.get(mod) or {}).get(site, {"policy": "keep"})
    return list(entry["cold"]) if entry["policy"] == "remove" else []


def routing_table(classes: Mapping[str, Mapping[Format, list[int]]], experts: int) -> npt.NDArray[np.int32]:
    """int32 [3, E, 2]: (class, index in class) of each expert by projection; 0 for a gate there is not."""
    table = np.zeros((len(ops.PROJECTIONS), experts, 2), np.int32)
    for projection, members in classes.items():
        for number, chosen in enumerate(members.values()):
            for index, expert in enumerate(chosen):
                table[ops.PROJECTIONS.index(projection), expert] = number, index
    return table


def pack_site(
    site: ExpertSite,
    classes: Mapping[str, Mapping[Format, list[int]]],
    provider: ExpertProvider,
    layout: Layout,
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """(operand name, array) of one site, a class at a time: the most that is in memory."""
    yield "table", routing_table(classes, site.experts)
    for projection, members in classes.items():
        for number, (format, chosen) in enumerate(members.items()):
            packed = [_pack_one(site, projection, expert, format, provider, layout) for expert in chosen]
            yield f"{projection}.{number}.codes", np.stack([one.codes for one in packed])
            yield f"{projection}.{number}.scales", np.stack([one.scales for one in packed])
            zeros = [one.zeros for one in packed if one.zeros is not None]
            if zeros:
                yield f"{projection}.{number}.zeros", np.stack(zeros)


def _pack_one(
    site: ExpertSite,
    projection: str,
    expert: int,
    format: Format,
    provider: ExpertProvider,
    layout: Layout,
) -> PackedTensors:
    matrix = provider.get(site.site, projection, expert)
    if matrix.format != format or matrix.shape != site.shape(projection):
        raise PipelineError(
            f"{site.site}: expert {expert} of {projection} was quantized to {matrix.format} {matrix.shape}, "
            f"{BITS} says {format} {site.shape(projection)}"
        )
    largest = float(matrix.scales.abs().max())
    if largest >= layout.scales_below:
        raise UserError(
            f"{site.site}: expert {expert} of {projection} has a scale of {largest:.3g} as {format}, kernels "
            f"of this target take scales below {layout.scales_below:g}: give it more bits"
        )
    return layout.pack(matrix)


def _packed_parameters(
    site: ExpertSite, classes: Mapping[str, Mapping[Format, list[int]]], layout: str
) -> dict[str, relax.Var]:
    """Operand name -> new parameter of main, in the order of the operands."""
    types = {"table": relax.TensorType([len(ops.PROJECTIONS), site.experts, 2], "int32")}
    for projection, members in classes.items():
        for number, (format, chosen) in enumerate(members.items()):
            parts = packed_types(format, *site.shape(projection), (len(chosen),), layout)
            types |= {f"{projection}.{number}.{part}": ty for part, ty in parts.items()}
    return {name: new_parameter(f"{site.site}.{name}", ty) for name, ty in types.items()}


def _experts_calls(mod: IRModule) -> Iterator[tuple[relax.Var, relax.Call]]:
    return ((variable, value) for variable, value in bindings(mod["main"]) if ops.is_call(value, ops.EXPERTS))
