"""legalize: R.moqc.* and other operators that TVM has no fast kernel for -> call_tir of our kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import IRModule, relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from moqc.errors import TargetError
from moqc.ir import ops
from moqc.ir.annotations import KERNELS, Key
from moqc.ir.sites import bindings
from moqc.passes.base import Pass, PassContext
from moqc.passes.fusions import Fusions
from moqc.passes.packed_kernels import Lowering, add_functions, packed_kernels
from moqc.passes.patterns import is_top, match_linear, match_rms_norm
from moqc.schedules.cpu import lower_dense as cpu_dense
from moqc.schedules.cpu.lower import lower_embedding, lower_linear, lower_mixed_experts
from moqc.schedules.cpu.lower_recurrent import lower_causal_conv, lower_recurrent
from moqc.schedules.cpu.prune import lower_prune_routing
from moqc.schedules.cuda import lower as cuda
from moqc.schedules.portable import lower as portable
from moqc.targets import Target


@dataclass(frozen=True)
class Lowerings:
    """How the targets of one folder under schedules/ lower moqc's operators and the groups of `patterns`."""

    operators: Mapping[str, Lowering]
    linear: Callable[..., relax.Expr]
    rms_norm: Callable[..., relax.Expr]
    topk: Lowering
    fuses: bool = False
    """Whether there are kernels for more than one operator: residuals, heads, routers."""


LOWERINGS: dict[str, Lowerings] = {
    "cpu": Lowerings(
        {
            ops.EXPERTS: cpu_dense.lower_experts,
            ops.MIXED_EXPERTS: lower_mixed_experts,
            ops.LINEAR: lower_linear,
            ops.EMBEDDING: lower_embedding,
            ops.ATTENTION: cpu_dense.lower_attention,
            ops.CACHED_ATTENTION: cpu_dense.lower_attention,
            ops.PRUNE_ROUTING: lower_prune_routing,
            ops.RECURRENT: lower_recurrent,
            ops.CACHED_RECURRENT: lower_recurrent,
            ops.CAUSAL_CONV: lower_causal_conv,
            ops.CACHED_CAUSAL_CONV: lower_causal_conv,
        },
        cpu_dense.lower_dense_linear,
        cpu_dense.lower_rms_norm,
        cpu_dense.lower_topk,
    ),
    "cuda": Lowerings(
        {
            ops.EXPERTS: cuda.lower_dense_experts,
            ops.MIXED_EXPERTS: cuda.lower_mixed_experts,
            ops.LINEAR: cuda.lower_linear,
            ops.EMBEDDING: cuda.lower_embedding,
            ops.ATTENTION: cuda.lower_uncached_attention,
            ops.CACHED_ATTENTION: cuda.lower_attention,
            ops.PRUNE_ROUTING: cuda.lower_prune_routing,
        },
        cuda.lower_dense_linear,
        cuda.lower_rms_norm,
        cuda.lower_topk,
        fuses=True,
    ),
    "portable": Lowerings(
        {
            ops.EXPERTS: portable.refuse("run quantize-experts before legalize"),
            ops.MIXED_EXPERTS: portable.lower_mixed_experts,
            ops.LINEAR: portable.lower_linear,
            ops.EMBEDDING: portable.lower_embedding,
            ops.ATTENTION: portable.refuse("run plan-cache before legalize"),
            ops.CACHED_ATTENTION: portable.lower_attention,
        },
        portable.lower_dense_linear,
        portable.lower_rms_norm,
        portable.lower_topk,
    ),
}
"""Folder under schedules/ -> how it lowers."""

_FILLS: dict[str, int | None] = {
    "relax.zeros_like": 0,
    "relax.ones_like": 1,
    "relax.full_like": None,
    "relax.full": None,
}
"""Operator that fills a tensor -> the value, None where it is the second argument."""


@dataclass(frozen=True)
class Legalize(Pass):
    """Replace the operators that moqc has kernels for by calls of these kernels.

    Of each packed kernel there is also a function of its own, for `moqc.certificate` to run.
    """

    name: ClassVar[str] = "legalize"
    writes: ClassVar[tuple[Key[Any], ...]] = (KERNELS,)

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Lower every function for `ctx.target`. Raises TargetError when the target has no kernels."""
        target: Target = ctx.need("target", self.name)
        if target.schedules not in LOWERINGS:
            raise TargetError(f"legalize: no kernels for target {target.name} (schedules {target.schedules})")
        lowered = mod
        for variable, function in mod.functions_items():
            if isinstance(function, relax.Function):
                lowering = _Lowering(lowered.clone(), function, target)
                result = lowering.visit_expr(function)
                lowering.builder_.update_func(variable, relax.analysis.remove_all_unused(result))
                lowered = lowering.builder_.get()
        kernels = packed_kernels(mod)
        builder = relax.BlockBuilder(lowered)
        add_functions(builder, kernels, mod, LOWERINGS[target.schedules].operators, target)
        result = builder.get()
        # The builder's module starts without attributes.
        result = result if mod.attrs is None else result.with_attrs(dict(mod.attrs.items()))
        return KERNELS.put(result, kernels)


@mutator
class _Lowering(PyExprMutator):  # type: ignore[misc]  # tvm has no types
    """Rewrites the calls of one function."""

    def __init__(self, mod: IRModule, function: relax.Function, target: Target) -> None:
        super().__init__(mod)
        self._target, self._definitions = target, dict(bindings(function))
        self._lowerings = LOWERINGS[target.schedules]
        self._ready: dict[
            int, relax.Expr
        ] = {}  # by the hash of a call: what a fused kernel has computed already
        self._fusions = Fusions(self._definitions) if self._lowerings.fuses else None

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        """Lower one call, its arguments first."""
        linear, norm = match_linear(call, self._definitions), match_rms_norm(call, self._definitions)
        if linear is not None:
            x, weight = self.visit_expr(linear.x), self.visit_expr(linear.weight)
            return self._lowerings.linear(self.builder_, x, weight, self._target)
        if hash(call) in self._ready:
            return self._ready[hash(call)]
        if norm is not None:
            x = self.visit_expr(norm.x)
            weight = None if norm.weight is None else self.visit_expr(norm.weight)
            return self._lowerings.rms_norm(self.builder_, x, weight, norm.epsilon, self._target)
        fused = None if self._fusions is None else self._fused(call, self._fusions)
        if fused is not None:
            return fused
        call = self.builder_.normalize(self.visit_expr_post_order(call))
        if ops.is_call(call, "relax.take"):
            # An index out of range reads the nearest row; TVM's default mode reads out of bounds.
            return relax.op.take(call.args[0], call.args[1], call.attrs.axis, mode="clip")
        if ops.is_call(call, *_FILLS):
            # TVM 0.27 cannot legalize these where a size is symbolic: it takes the dtype for text.
            value = _FILLS[str(call.op.name)]
            scalar = call.args[1] if value is None else relax.const(value, str(call.ty.dtype))
            return relax.op.broadcast_to(scalar, relax.ShapeExpr(list(call.ty.shape)))
        if is_top(call):
            return self._lowerings.topk(self.builder_, call, self._target)
        if ops.is_call(call, *self._lowerings.operators):
            return self._lowerings.operators[str(call.op.name)](self.builder_, call, self._target)
        if ops.is_call(call, *ops.FIXED_ARGUMENTS):
            raise TargetError(f"legalize: target {self._target.name} has no kernel for {ops.describe(call)}")
        return call

    def _fused(self, call: relax.Call, fusions: Fusions) -> relax.Expr | None:
        """One kernel for `call` and what it reads; what nobody else reads then is dead."""
        router, residual, heads = fusions.router(call), fusions.residual(call), fusions.heads(call)
        if router is not None:
            types, x = list(call.ty.fields), self.visit_expr(router.x)
            normalize = router.normalized is not None
            return cuda.lower_router(self.builder_, x, types, softmax=True, normalize=normalize)
        if fusions.is_normalization(call):
            return self.visit_expr(call.args[0])  # the router's kernel has divided already
        if residual is not None:
            linear = self.builder_.normalize(self.visit_expr_post_order(residual.linear))
            return cuda.lower_linear(self.builder_, linear, self._target, self.visit_expr(residual.added))
        group = fusions.siblings(call)
        if len(group) > 1:
            calls = [self.builder_.normalize(self.visit_expr_post_order(each)) for each in group]
            results = [self.builder_.emit(each) for each in cuda.lower_linears(self.builder_, calls)]
            self._ready |= {hash(each): result for each, result in zip(group, results, strict=True)}
            return self._ready[hash(call)]
        added = fusions.added_norm(call)
        if added is not None:
            norm, whole = added
            x, more = (self.visit_expr(argument) for argument in call.args)
            weight = None if norm.weight is None else self.visit_expr(norm.weight)
            both = self.builder_.emit(cuda.lower_added_norm(self.builder_, x, more, weight, norm.epsilon))
            self._ready[hash(whole)] = self.builder_.emit(relax.TupleGetItem(both, 1))
            return relax.TupleGetItem(both, 0)
        if heads is not None:
            plain = self.builder_.normalize(self.visit_expr_post_order(call))
            inputs, norms, rotation = (
                [self.visit_expr(expr) for expr in group]
                for group in (heads.inputs, heads.norms, heads.rotation)
            )
            return cuda.lower_attention(
                self.builder_, plain, self._target, inputs, norms, heads.epsilon, rotation
            )
        return None
