"""Find the sites of a module: experts blocks, and the linears and embeddings whose weight is a parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tvm import IRModule, relax

from moqc.errors import VerifyError
from moqc.ir.annotations import PARAMS, PROTECTION
from moqc.ir.ops import EXPERTS, MIXED_EXPERTS, PRUNE_ROUTING, attributes, is_call, operand, operands
from moqc.quant.activations import parse_activation

INPUTS = 2
"""Leading parameters of a language model's main that are not weights: input_ids and positions."""


def input_count(main: relax.Function) -> int:
    """Leading parameters of main that are not weights: `INPUTS`, or those of an imported graph."""
    attrs = main.attrs
    return int(attrs["num_input"]) if attrs is not None and "num_input" in attrs else INPUTS


@dataclass(frozen=True, slots=True)
class ExpertSite:
    """One R.moqc.experts block. `operands` are its operand names, such as up, down and down_bias.

    `added` columns of gate and up are for protected channels.
    """

    site: str
    experts: int
    hidden: int
    intermediate: int
    activation: str
    operands: tuple[str, ...]
    added: int = 0

    @property
    def has_gate(self) -> bool:
        """Whether the experts are gated (three projections) or plain (two)."""
        return "gate" in self.operands

    @property
    def projections(self) -> tuple[str, ...]:
        """The weight matrices, in canonical order."""
        return tuple(name for name in ("gate", "up", "down") if name in self.operands)

    def shape(self, projection: str) -> tuple[int, int]:
        """(rows, columns) of one expert's stored matrix: gate, up are [intermediate, hidden + added]."""
        if projection == "down":
            return self.hidden, self.intermediate
        return self.intermediate, self.hidden + self.added


@dataclass(frozen=True, slots=True)
class LinearUse:
    """One place a 2-D weight parameter is used: as ``matmul(x, W.T)`` (linear) or ``take(W, ids)``.

    `output` is the variable bound to the matmul or take, `source` x or ids, `weight` the parameter W.
    """

    kind: str
    site: str
    output: relax.Var
    source: relax.Expr
    weight: relax.Var


@dataclass(frozen=True, slots=True)
class LinearSite:
    """One 2-D weight parameter used by linears or embeddings; a tied table is used by both.

    `uses` are "linear" or "embedding" in program order. `router` tells that an output decides which experts
    run or with what weight.
    """

    site: str
    rows: int
    columns: int
    uses: tuple[str, ...]
    router: bool


def bindings(func: relax.Function) -> Iterator[tuple[relax.Var, relax.Expr]]:
    """(variable, value) of every binding of `func`, in program order."""
    for block in func.body.blocks:
        for binding in block.bindings:
            if isinstance(binding, relax.VarBinding):
                yield binding.var, binding.value


def weight_names(mod: IRModule) -> dict[relax.Var, str]:
    """Weight parameter of main -> its name in PARAMS; caches (the parameters after them) have none.

    Raises VerifyError when PARAMS names more parameters than there are.
    """
    parameters, names = list(mod["main"].params)[input_count(mod["main"]) :], PARAMS.of(mod)
    if len(parameters) < len(names):
        raise VerifyError(f"main has {len(parameters)} weight parameters, {PARAMS} names {len(names)}")
    return dict(zip(parameters, names, strict=False))


def expert_site(call: relax.Call, mod: IRModule) -> ExpertSite:
    """The description of one experts call of `mod`."""
    experts, hidden, intermediate = (int(extent) for extent in operand(call, "down").ty.shape)
    attrs = attributes(call)
    site, added = attrs["site"], 0
    protection = (PROTECTION.get(mod) or {}).get(site)
    if protection is not None:
        added = len(protection["channels"]) * protection["copies"]
    return ExpertSite(
        site, experts, hidden, intermediate, attrs["activation"], tuple(attrs["operands"]), added
    )


def find_experts(mod: IRModule) -> list[ExpertSite]:
    """The experts blocks of main that are not yet quantized, in program order."""
    return [expert_site(value, mod) for _, value in bindings(mod["main"]) if is_call(value, EXPERTS)]


def find_uses(mod: IRModule) -> list[LinearUse]:
    """Every use of a 2-D weight parameter by a matmul or a take, in program order."""
    names = weight_names(mod)
    transposed: dict[relax.Var, relax.Var] = {}
    found = []
    for variable, value in bindings(mod["main"]):
        if is_call(value, "relax.permute_dims") and value.args[0] in names and value.args[0].ty.ndim == 2:
            transposed[variable] = value.args[0]
        elif is_call(value, "relax.matmul") and value.args[1] in transposed:
            weight = transposed[value.args[1]]
            found.append(LinearUse("linear", site_of(names[weight]), variable, value.args[0], weight))
        elif is_call(value, "relax.take") and value.args[0] in names and _takes_rows(value):
            weight = value.args[0]
            found.append(LinearUse("embedding", site_of(names[weight]), variable, value.args[1], weight))
    return found


def find_linears(mod: IRModule) -> list[LinearSite]:
    """The linears and embeddings of main that are not yet quantized, in program order."""
    uses = find_uses(mod)
    routers = router_outputs(mod, {use.output for use in uses if use.kind == "linear"})
    by_weight: dict[relax.Var, list[LinearUse]] = {}
    for use in uses:
        by_weight.setdefault(use.weight, []).append(use)
    return [
        LinearSite(
            group[0].site,
            int(weight.ty.shape[0]),
            int(weight.ty.shape[1]),
            tuple(use.kind for use in group),
            any(use.output in routers for use in group),
        )
        for weight, group in by_weight.items()
    ]


def router_outputs(mod: IRModule, linears: set[relax.Var]) -> set[relax.Var]:
    """The outputs in `linears` from which the ids or weights of an experts block are computed.

    The walk goes backward from those two operands and stops at the first linear on every path. Pruning also
    reads the block's input, which does not make what computes that a router.
    """
    values = dict(bindings(mod["main"]))
    pending = []
    for value in values.values():
        if is_call(value, EXPERTS, MIXED_EXPERTS):
            named = operands(value)
            pending.extend([named["ids"], named["weights"]])
    seen: set[relax.Var] = set()
    while pending:
        expr = pending.pop()
        if not isinstance(expr, relax.Var) or expr in seen:
            continue
        seen.add(expr)
        if expr not in linears and expr in values:
            value = values[expr]
            if is_call(value, PRUNE_ROUTING):
                pending.extend([operand(value, "ids"), operand(value, "weights")])
            else:
                pending.extend(relax.analysis.free_vars(value))
    return seen & linears


def rotates(mod: IRModule) -> bool:
    """Whether packed experts of `mod` rotate what reaches down (`moqc.quant.hadamard`)."""
    calls = (value for _, value in bindings(mod["main"]) if is_call(value, MIXED_EXPERTS))
    return any(parse_activation(attributes(call)["activation"]).rotated for call in calls)


def site_of(parameter: str) -> str:
    """``model.layers.0.self_attn.q_proj.weight`` -> ``model.layers.0.self_attn.q_proj``."""
    return parameter.removesuffix(".weight")


def _takes_rows(call: relax.Call) -> bool:
    return call.args[0].ty.ndim == 2 and call.attrs.axis is not None and int(call.attrs.axis) == 0
