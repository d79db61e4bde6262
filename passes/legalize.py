"""legalize: R.moqc.* and other operators that TVM has no fast CPU kernel for -> call_tir of our kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import IRModule, relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from moqc.errors import TargetError
from moqc.ir import ops
from moqc.ir.annotations import KERNELS, Key
from moqc.ir.sites import bindings
from moqc.passes.base import Pass, PassContext
from moqc.passes.packed_kernels import Lowering, add_functions, packed_kernels
from moqc.passes.patterns import is_top, match_linear, match_rms_norm
from moqc.schedules.cpu.lower import lower_embedding, lower_linear, lower_mixed_experts
from moqc.schedules.cpu.lower_dense import (
    lower_attention,
    lower_dense_linear,
    lower_experts,
    lower_rms_norm,
    lower_topk,
)
from moqc.schedules.cpu.prune import lower_prune_routing
from moqc.targets import Target

LOWERINGS: dict[str, dict[str, Lowering]] = {
    "cpu": {
        ops.EXPERTS: lower_experts,
        ops.MIXED_EXPERTS: lower_mixed_experts,
        ops.LINEAR: lower_linear,
        ops.EMBEDDING: lower_embedding,
        ops.ATTENTION: lower_attention,
        ops.CACHED_ATTENTION: lower_attention,
        ops.PRUNE_ROUTING: lower_prune_routing,
    }
}
"""Folder under schedules/ -> operator -> how it is lowered there."""


@dataclass(frozen=True)
class Legalize(Pass):
    """Replace the operators that moqc has kernels for by calls of these kernels.

    Of each packed kernel there is also a function of its own, for `moqc.certificate` to run.
    """

    name: ClassVar[str] = "legalize"
    writes: ClassVar[tuple[Key[Any], ...]] = (KERNELS,)

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Lower main for `ctx.target`. Raises TargetError when the target has no kernels."""
        target: Target = ctx.need("target", self.name)
        if target.schedules not in LOWERINGS:
            raise TargetError(f"legalize: no kernels for target {target.name} (schedules {target.schedules})")
        lowering = _Lowering(mod.clone(), target)
        main = lowering.visit_expr(mod["main"])
        lowering.builder_.update_func(mod.get_global_var("main"), relax.analysis.remove_all_unused(main))
        kernels = packed_kernels(mod)
        builder = relax.BlockBuilder(lowering.builder_.get())
        add_functions(builder, kernels, mod, LOWERINGS[target.schedules], target)
        result = builder.get()
        # The builder's module starts without attributes.
        result = result if mod.attrs is None else result.with_attrs(dict(mod.attrs.items()))
        return KERNELS.put(result, kernels)


@mutator
class _Lowering(PyExprMutator):  # type: ignore[misc]  # tvm has no types
    """Rewrites the calls of one function."""

    def __init__(self, mod: IRModule, target: Target) -> None:
        super().__init__(mod)
        self._target, self._definitions = target, dict(bindings(mod["main"]))

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        """Lower one call, its arguments first."""
        linear, norm = match_linear(call, self._definitions), match_rms_norm(call, self._definitions)
        if linear is not None:
            x, weight = self.visit_expr(linear.x), self.visit_expr(linear.weight)
            return lower_dense_linear(self.builder_, x, weight, self._target)
        if norm is not None:
            x = self.visit_expr(norm.x)
            weight = None if norm.weight is None else self.visit_expr(norm.weight)
            return lower_rms_norm(self.builder_, x, weight, norm.epsilon, self._target)
        call = self.builder_.normalize(self.visit_expr_post_order(call))
        if ops.is_call(call, "relax.take"):
            # An index out of range reads the nearest row; TVM's default mode reads out of bounds.
            return relax.op.take(call.args[0], call.args[1], call.attrs.axis, mode="clip")
        if is_top(call):
            return lower_topk(self.builder_, call, self._target)
        lowerings = LOWERINGS[self._target.schedules]
        if ops.is_call(call, *lowerings):
            return lowerings[str(call.op.name)](self.builder_, call, self._target)
        return call
