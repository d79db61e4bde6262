"""narrow-integers: 64-bit integers of main -> 32-bit ones, for devices that have no others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import IRModule, ir, relax
from tvm.ir import GenericConst
from tvm.relax.expr_functor import PyExprMutator, mutator

from moqc.errors import PipelineError
from moqc.passes.base import Pass, PassContext


@dataclass(frozen=True)
class NarrowIntegers(Pass):
    """Make int64 tensors of main int32: inputs, constants and what is computed from them.

    Token ids, positions and expert numbers all fit. Shapes stay as they are.
    """

    name: ClassVar[str] = "narrow-integers"

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Rewrite main. Raises PipelineError for a constant that does not fit."""
        del ctx
        main = mod["main"]
        narrowing = _Narrowing(mod)
        parameters = [narrowing.parameter(parameter) for parameter in main.params]
        body = narrowing.visit_expr(main.body)
        narrowed = relax.Function(parameters, body, None, main.is_pure, main.attrs)
        result = mod.clone()
        result.update_func(mod.get_global_var("main"), relax.analysis.remove_all_unused(narrowed))
        return result


@mutator
class _Narrowing(PyExprMutator):  # type: ignore[misc]  # tvm has no types
    def parameter(self, parameter: relax.Var) -> relax.Var:
        """The parameter, or a new one of 32 bits in its place."""
        if not isinstance(parameter.ty, relax.TensorType) or str(parameter.ty.dtype) != "int64":
            return parameter
        new = relax.Var(parameter.name, relax.TensorType(list(parameter.ty.shape), "int32"))
        self.set_var_remap(parameter, new)
        return new

    def visit_generic_const_(self, constant: GenericConst) -> relax.Expr:
        """A constant of 32 bits."""
        values = constant.value.numpy()
        if values.dtype != np.int64:
            return constant
        if values.size and (values.min() < -(1 << 31) or values.max() >= 1 << 31):
            raise PipelineError(f"narrow-integers: the model has the constant {values.max()}, over 32 bits")
        return relax.const(values.astype(np.int32), "int32")

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        """A call whose result has 32 bits where its attribute ``dtype`` said 64."""
        call = self.visit_expr_post_order(call)
        info = getattr(type(call.attrs), "__tvm_ffi_type_info__", None)
        fields = {field.name: getattr(call.attrs, field.name) for field in info.fields} if info else {}
        if info is not None and str(fields.get("dtype")) == "int64":
            attrs = ir.make_node(info.type_key, **{**fields, "dtype": "int32"})
            call = relax.Call(call.op, call.args, attrs, call.ty_args, call.span)
        return self.builder_.normalize(call)
