"""last-logits: a second function of the module, which computes the logits of the last token alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tvm import IRModule, relax, te
from tvm.relax.expr_functor import PyExprMutator, mutator

from moqc.ir import ops
from moqc.ir.sites import bindings
from moqc.passes.base import Pass, PassContext
from moqc.passes.patterns import Definitions, definition, match_linear

LAST = "last"
"""Name of the function."""
_POINTWISE = ("relax.multiply", "relax.divide", "relax.add", "relax.subtract", "relax.tanh", "relax.astype")


@dataclass(frozen=True)
class LastLogits(Pass):
    """Add ``last``, which is main but for the logits: [B, 1, V], of the last token of each row.

    A prompt needs no others, and the output matrix is one of the largest. Where the logits are not a matrix
    product of [B, S, hidden], perhaps scaled afterwards, there is no such function.
    """

    name: ClassVar[str] = "last-logits"

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Copy main with a slice before its last matrix product."""
        del ctx
        main = relax.utils.copy_with_new_vars(mod["main"])
        definitions = dict(bindings(main))
        outputs = definition(main.body.body, definitions)
        logits = outputs.fields[0] if isinstance(outputs, relax.Tuple) else outputs
        product = _product(logits, definitions)
        if product is None:
            return mod
        result = mod.clone()
        slicing = _Slicing(result, product)
        body = slicing.visit_expr(main.body)
        function = relax.Function(list(main.params), body, None, main.is_pure, main.attrs)
        variable = slicing.builder_.add_func(function.with_attr("global_symbol", LAST), LAST)
        assert variable.name_hint == LAST, "a pass before this one made a function of that name"
        added = slicing.builder_.get()
        return added if mod.attrs is None else added.with_attrs(dict(mod.attrs.items()))


def _product(logits: relax.Expr, definitions: Definitions) -> relax.Call | None:
    """The matrix product that gives `logits`, before what is done to each of them, or None."""
    call = definition(logits, definitions)
    while ops.is_call(call, *_POINTWISE):
        others = [value for value in call.args[1:] if value.ty.ndim]
        if others:
            return None
        call = definition(call.args[0], definitions)
    linear = ops.is_call(call, ops.LINEAR) or (
        isinstance(call, relax.Call) and match_linear(call, definitions) is not None
    )
    return call if linear and call.args[0].ty.ndim == 3 else None


@mutator
class _Slicing(PyExprMutator):  # type: ignore[misc]  # tvm has no types
    """Gives one call the last token of its first argument."""

    def __init__(self, mod: IRModule, product: relax.Call) -> None:
        super().__init__(mod)
        self._product = hash(product)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        """The call, or that of the last token."""
        wanted = hash(call) == self._product
        call = self.visit_expr_post_order(call)
        if not wanted:
            return call
        x, *others = call.args
        last = self.builder_.emit(self.builder_.call_te(_last_token, x, primfunc_name_hint="last_token"))
        return relax.Call(call.op, [last, *others], call.attrs)


def _last_token(x: te.Tensor) -> te.Tensor:
    batch, tokens, columns = x.shape
    return te.compute((batch, 1, columns), lambda row, _, column: x[row, tokens - 1, column], name="last")
