"""Rebuild main with other values for some variables and other parameters for some weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import IRModule, relax

from moqc.ir.annotations import PARAMS
from moqc.ir.sites import input_count, weight_names


@dataclass
class Rewrite:
    """What to change: collected first, applied once.

    `values`: variable -> the expression that it is bound to from now on. `parameters`: weight -> the new
    parameters, by name, that take its place; it is itself dropped, unless something still uses it. `before`:
    variable -> bindings that come ahead of its own. `added`: new parameters, by name, after all weights.
    """

    values: dict[relax.Var, relax.Expr] = field(default_factory=dict)
    parameters: dict[relax.Var, dict[str, relax.Var]] = field(default_factory=dict)
    before: dict[relax.Var, list[relax.VarBinding]] = field(default_factory=dict)
    added: dict[str, relax.Var] = field(default_factory=dict)


def new_parameter(name: str, ty: relax.TensorType) -> relax.Var:
    """A variable for the parameter called `name` in PARAMS."""
    return relax.Var(re.sub(r"\W", "_", name), ty)


def apply_rewrite(mod: IRModule, rewrite: Rewrite) -> IRModule:
    """`mod` with main changed as `rewrite` says, dead bindings removed, PARAMS following the parameters."""
    main = mod["main"]
    body = relax.SeqExpr(
        [_block(block, rewrite) for block in main.body.blocks],
        main.body.body,
    )
    added = [variable for new in rewrite.parameters.values() for variable in new.values()]
    wide = relax.Function(
        [*main.params, *added, *rewrite.added.values()], body, main.ret_ty, main.is_pure, main.attrs
    )
    lean = relax.analysis.remove_all_unused(wide)
    parameters, names = _parameters(mod, rewrite, set(relax.analysis.free_vars(lean.body)))
    result = mod.clone()
    result.update_func(
        mod.get_global_var("main"),
        relax.Function(parameters, lean.body, lean.ret_ty, lean.is_pure, lean.attrs),
    )
    return PARAMS.put(result, names)


def bind_before(rewrite: Rewrite, variable: relax.Var, value: relax.Expr, name: str) -> relax.Var:
    """A new variable bound to `value` ahead of `variable`."""
    value = relax.BlockBuilder().normalize(value)
    bound = relax.DataflowVar(name, value.ty)
    rewrite.before.setdefault(variable, []).append(relax.VarBinding(bound, value))
    return bound


def _block(block: relax.BindingBlock, rewrite: Rewrite) -> relax.BindingBlock:
    bindings = []
    for binding in block.bindings:
        bindings += rewrite.before.get(binding.var, [])
        bindings.append(_binding(binding, rewrite.values))
    kind = relax.DataflowBlock if isinstance(block, relax.DataflowBlock) else relax.BindingBlock
    return kind(bindings)


def _binding(binding: relax.Binding, values: Mapping[relax.Var, relax.Expr]) -> relax.Binding:
    if not isinstance(binding, relax.VarBinding) or binding.var not in values:
        return binding
    value = relax.BlockBuilder().normalize(values[binding.var])
    return relax.VarBinding(binding.var, value)


def _parameters(
    mod: IRModule, rewrite: Rewrite, used: set[relax.Var]
) -> tuple[Sequence[relax.Var], list[str]]:
    """The parameters of the new main, and the names of those that are weights."""
    weights = weight_names(mod)
    old: list[Any] = list(mod["main"].params)
    inputs = input_count(mod["main"])
    parameters = old[:inputs]
    names: list[str] = []
    last = inputs + len(weights)
    for number, variable in enumerate(old[inputs:], inputs):
        if number == last:
            names += rewrite.added
            parameters += rewrite.added.values()
        kept = {weights[variable]: variable} if variable in weights else {}
        replacing = rewrite.parameters.get(variable)
        if replacing is not None:
            kept = replacing if variable not in used else {**kept, **replacing}
        names += kept
        parameters += kept.values() if variable in weights else [variable]
    if len(old) == last:
        names += rewrite.added
        parameters += rewrite.added.values()
    return parameters, names
