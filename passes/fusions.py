"""Larger groups of operators that some targets have one kernel for: residual sums, heads, routers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import relax, tirx

from moqc.ir import ops
from moqc.ir.ops import is_call
from moqc.passes.patterns import Definitions, RmsNorm, definition, is_top, match_rms_norm

MOST = 4
"""Linears in one launch."""
TRANSPOSED = [0, 2, 1, 3]
"""Axes that turn [batch, token, head, width] into what attention takes."""


@dataclass(frozen=True)
class Residual:
    """``linear + added``: a packed linear whose result is used for nothing else."""

    linear: relax.Call
    added: relax.Expr


@dataclass(frozen=True)
class Heads:
    """What becomes q, k and v of an attention: norm and rotation of heads cut from products.

    `inputs` are ``[B, S, heads * width]``; `norms` the weights of q and k or nothing; `rotation` cosines and
    sines ``[B, S, width]`` of a rotation by halves, or nothing.
    """

    inputs: tuple[relax.Expr, ...]
    norms: tuple[relax.Expr, ...]
    epsilon: float
    rotation: tuple[relax.Expr, ...]


@dataclass(frozen=True)
class Router:
    """``topk(softmax(x))``; `normalized`: what divides its values by their sum, their only use."""

    x: relax.Expr
    top: relax.Call
    normalized: relax.Call | None


class Fusions:
    """Finds the groups of one function."""

    def __init__(self, definitions: Definitions) -> None:
        self._definitions = definitions
        self._uses: Counter[relax.Var] = Counter()
        for value in definitions.values():
            self._uses.update(_variables(value))
        routers = self._routers()
        # By hash, which is the object's address: calls cannot be compared, `==` on them builds an expression.
        self._by_top = {hash(router.top): router for router in routers}
        self._siblings = self._groups()
        self._normed = self._added_norms()
        self._normalized = {hash(router.normalized) for router in routers if router.normalized is not None}

    def router(self, call: relax.Call) -> Router | None:
        """The router whose top-k `call` is, or None."""
        return self._by_top.get(hash(call))

    def is_normalization(self, call: relax.Call) -> bool:
        """Whether `call` divides the values of a router that does so itself."""
        return hash(call) in self._normalized

    def added_norm(self, call: relax.Call) -> tuple[RmsNorm, relax.Call] | None:
        """The norm of the sum that `call` is, and the norm's own call, or None."""
        return self._normed.get(hash(call))

    def siblings(self, call: relax.Call) -> list[relax.Call]:
        """The packed linears that read what `call`, one of them, reads, in program order."""
        return self._siblings.get(hash(call), [call])

    def residual(self, call: relax.Call) -> Residual | None:
        """The residual sum that `call` is, or None."""
        if not is_call(call, "relax.add"):
            return None
        for product, added in (call.args, list(reversed(call.args))):
            linear = self._definition(product)
            if is_call(linear, ops.LINEAR) and self._uses[product] == 1 and _same_shape(product.ty, added.ty):
                return Residual(linear, added)
        return None

    def heads(self, call: relax.Call) -> Heads | None:
        """The heads of the cached attention that `call` is, or None."""
        if not is_call(call, ops.CACHED_ATTENTION):
            return None
        named = ops.operands(call)
        (q, q_turn), (k, k_turn) = (self._unrotated(named[name]) for name in ("q", "k"))
        if len(q_turn) != len(k_turn) or not all(a.same_as(b) for a, b in zip(q_turn, k_turn, strict=True)):
            return None
        parts = [self._unnormed(self._untransposed(expr)) for expr in (q, k, named["v"])]
        inputs = tuple(self._uncut(part[0]) for part in parts)
        first, second, third = (part[1] for part in parts)
        if any(each is None for each in inputs) or third is not None or (first is None) != (second is None):
            return None
        if first is None:
            return Heads(inputs, (), 0.0, q_turn)
        if first.epsilon != second.epsilon:
            return None
        return Heads(inputs, (first.weight, second.weight), first.epsilon, q_turn)

    def _definition(self, expr: Any) -> Any:
        return definition(expr, self._definitions)

    def _unrotated(self, expr: relax.Expr) -> tuple[relax.Expr, tuple[relax.Expr, ...]]:
        """x, and (cosines, sines), of ``x * cos + rotated(x) * sin``; otherwise `expr` and nothing."""
        add = self._definition(expr)
        if is_call(add, "relax.add"):
            straight, turned = (self._definition(argument) for argument in add.args)
            if is_call(straight, "relax.multiply") and is_call(turned, "relax.multiply"):
                x = straight.args[0]
                angles = [self._spread(product.args[1]) for product in (straight, turned)]
                if self._is_half_turn(turned.args[0], x) and None not in angles:
                    return x, tuple(angles)
        return expr, ()

    def _spread(self, expr: relax.Expr) -> relax.Expr | None:
        """[B, S, width] of ``expand_dims(..., axis=1)``."""
        call = self._definition(expr)
        if not is_call(call, "relax.expand_dims") or [int(axis) for axis in call.attrs.axis] != [1]:
            return None
        return call.args[0] if call.args[0].ty.ndim == 3 else None

    def _is_half_turn(self, expr: relax.Expr, x: relax.Expr) -> bool:
        """Whether `expr` is ``concat(-x[..., half:], x[..., :half])``."""
        concat, width = self._definition(expr), x.ty.shape[-1]
        if not is_call(concat, "relax.concat") or not isinstance(width, tirx.IntImm):
            return False
        negative, first = (self._definition(part) for part in concat.args[0].fields)
        if not is_call(negative, "relax.negative"):
            return False
        second, half = self._definition(negative.args[0]), int(width) // 2
        return self._is_slice(second, x, half, int(width)) and self._is_slice(first, x, 0, half)

    def _is_slice(self, call: Any, x: relax.Expr, begin: int, end: int) -> bool:
        if not is_call(call, "relax.strided_slice") or not call.args[0].same_as(x):
            return False
        axes, begins, ends, *strides = ([_integer(item) for item in part.fields] for part in call.args[1:])
        last = x.ty.ndim - 1
        if axes not in ([last], [-1]) or any(stride != [1] for stride in strides):
            return False
        return begins == [begin] and len(ends) == 1 and min(ends[0], int(x.ty.shape[-1])) == end

    def _untransposed(self, expr: relax.Expr) -> relax.Expr | None:
        call = self._definition(expr)
        if not is_call(call, "relax.permute_dims") or call.attrs.axes is None:
            return None
        return call.args[0] if [int(axis) for axis in call.attrs.axes] == TRANSPOSED else None

    def _unnormed(self, expr: relax.Expr | None) -> tuple[relax.Expr | None, Any]:
        """(x, RmsNorm) of a weighted norm, (expr, None) of anything else."""
        call = self._definition(expr)
        norm = match_rms_norm(call, self._definitions) if isinstance(call, relax.Call) else None
        return (expr, None) if norm is None or norm.weight is None else (norm.x, norm)

    def _uncut(self, expr: relax.Expr | None) -> relax.Expr | None:
        """[B, S, heads * width] of ``reshape(..., [B, S, heads, width])``."""
        call = self._definition(expr)
        if not is_call(call, "relax.reshape") or call.args[0].ty.ndim != 3 or call.ty.ndim != 4:
            return None
        old, new = list(call.args[0].ty.shape), list(call.ty.shape)
        return call.args[0] if _equal(old[:2], new[:2]) else None

    def _routers(self) -> list[Router]:
        found = []
        for variable, call in self._definitions.items():
            if not isinstance(call, relax.Call) or not is_top(call):
                continue
            softmax = self._definition(call.args[0])
            if is_call(softmax, "relax.nn.softmax") and int(softmax.attrs.axis) in (-1, softmax.ty.ndim - 1):
                found.append(Router(softmax.args[0], call, self._division(variable)))
        return found

    def _groups(self) -> dict[int, list[relax.Call]]:
        """By the hash of each packed linear: those with the same input, but for residual sums' own."""
        sums = [self.residual(call) for call in self._definitions.values() if isinstance(call, relax.Call)]
        alone = {hash(found.linear) for found in sums if found is not None}
        groups: dict[int, list[relax.Call]] = {}
        for call in self._definitions.values():
            if is_call(call, ops.LINEAR) and hash(call) not in alone:
                groups.setdefault(hash(call.args[0]), []).append(call)
        together = [group[at : at + MOST] for group in groups.values() for at in range(0, len(group), MOST)]
        return {hash(call): group for group in together for call in group}

    def _added_norms(self) -> dict[int, tuple[RmsNorm, relax.Call]]:
        """By the hash of a sum of equal shapes: the norm of it."""
        found = {}
        for call in self._definitions.values():
            norm = match_rms_norm(call, self._definitions) if isinstance(call, relax.Call) else None
            if norm is None:
                continue
            total = self._definition(norm.x)
            if is_call(total, "relax.add") and _same_shape(*(x.ty for x in total.args)):
                # Of x * root and its product with the weight, the later one is the whole norm.
                found[hash(total)] = norm, call
        return found

    def _division(self, top: relax.Var) -> relax.Call | None:
        """``values / sum(values)`` of the top-k bound to `top`, if nothing else reads the values."""
        for values, item in self._definitions.items():
            if (
                not isinstance(item, relax.TupleGetItem)
                or not item.tuple_value.same_as(top)
                or item.index != 0
            ):
                continue
            for call in self._definitions.values():
                if is_call(call, "relax.divide") and call.args[0].same_as(values) and self._uses[values] == 2:
                    total = self._definition(call.args[1])
                    last = (
                        is_call(total, "relax.sum") and total.args[0].same_as(values) and total.attrs.keepdims
                    )
                    if last and [int(axis) for axis in total.attrs.axis] in ([-1], [values.ty.ndim - 1]):
                        return call
        return None


def _variables(value: Any) -> list[relax.Var]:
    """Variables that an expression of one binding reads, each as often as it does."""
    if isinstance(value, relax.Var):
        return [value]
    if isinstance(value, relax.Tuple):
        return [variable for field in value.fields for variable in _variables(field)]
    if isinstance(value, relax.TupleGetItem):
        return _variables(value.tuple_value)
    if isinstance(value, relax.Call):
        return [variable for argument in value.args for variable in _variables(argument)]
    return []


def _integer(item: Any) -> int:
    return int(getattr(item, "value", item))


def _same_shape(a: Any, b: Any) -> bool:
    floats = isinstance(b, relax.TensorType) and b.shape is not None and str(b.dtype) == "float32"
    return floats and _equal(list(a.shape), list(b.shape))


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether extents are the same; `==` on symbolic ones builds an expression."""
    return len(a) == len(b) and all(map(tvm_ffi.structural_equal, a, b))
