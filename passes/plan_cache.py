"""plan-cache: operators that mix tokens -> their forms with caches and states, parameters of main."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import IRModule, relax

from moqc.errors import PipelineError
from moqc.ir import ops
from moqc.ir.annotations import CACHE, PARAMS, Key
from moqc.ir.sites import bindings
from moqc.passes.base import Pass, PassContext
from moqc.quant.kv_cache import stored_columns


@dataclass(frozen=True)
class PlanCache(Pass):
    """Give attentions key and value caches and recurrent layers states: parameters of main after the weights.

    They are written in place. `context` is the number of positions a sequence may have, `batch` the number of
    sequences, `dtype` that of keys and values (`moqc.quant.kv_cache`; empty: the target's default); states
    are float32. main returns (logits, caches...).
    """

    name: ClassVar[str] = "plan-cache"
    reads: ClassVar[tuple[Key[Any], ...]] = (PARAMS,)
    writes: ClassVar[tuple[Key[Any], ...]] = (CACHE,)

    context: int = 2048
    batch: int = 4
    dtype: str = ""

    def check(self) -> None:
        """Refuse a cache of nothing."""
        if self.context < 1 or self.batch < 1:
            raise PipelineError(
                f"plan-cache: context={self.context} batch={self.batch}; both must be at least 1"
            )

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Rewrite main. Raises PipelineError for a dtype that the kernels of the target do not have."""
        if CACHE.get(mod) is not None:
            raise PipelineError(f"plan-cache: the module has {CACHE} already")
        known = ("float32",) if ctx.target is None else ctx.target.caches
        if self.dtype not in ("", *known):
            raise PipelineError(f"plan-cache: dtype={self.dtype} is not one of {', '.join(known)}")
        dtype = self.dtype or known[0]
        builder = _CachedMain(mod, self.context, self.batch, dtype)
        result = mod.clone()
        result.update_func(mod.get_global_var("main"), builder.build())
        tensors = [[int(extent) for extent in cache.ty.shape] for cache in builder.caches]
        value = {"context": self.context, "batch": self.batch, "tensors": tensors, "dtype": dtype}
        return CACHE.put(result, {**value, "states": builder.states})


class _CachedMain:
    """Builds the new main; `caches` are its new parameters, those of each operator in turn."""

    def __init__(self, mod: IRModule, context: int, batch: int, dtype: str) -> None:
        self._main, self._context, self._batch, self._dtype = mod["main"], context, batch, dtype
        self._builder = relax.BlockBuilder()
        self.caches: list[relax.Var] = []
        self.states: list[int] = []
        self._operators = 0
        self._calls = {
            variable: self._cached(value)
            for variable, value in bindings(self._main)
            if ops.is_call(value, ops.ATTENTION, ops.RECURRENT, ops.CAUSAL_CONV)
        }

    def build(self) -> relax.Function:
        """The function (input_ids, positions, *weights, *caches) -> (logits, *caches)."""
        parameters = [*self._main.params, *self.caches]
        written: list[relax.Expr] = []
        with self._builder.function("main", parameters, dict(self._main.attrs.items())):
            with self._builder.dataflow():
                for variable, value in bindings(self._main):
                    if variable in self._calls:
                        result = self._builder.emit(self._calls[variable])
                        count = len(result.ty.fields)
                        written += [
                            self._builder.emit(relax.TupleGetItem(result, i)) for i in range(1, count)
                        ]
                        value = relax.TupleGetItem(result, 0)
                    self._builder.emit_normalized(relax.VarBinding(variable, self._builder.normalize(value)))
                outputs = self._builder.emit_output(relax.Tuple([self._main.body.body, *written]))
            self._builder.emit_func_output(outputs)
        return self._builder.finalize()["main"]

    def _cached(self, call: relax.Call) -> relax.Call:
        """The call with caches for the call without; adds the caches."""
        named, attrs = ops.operands(call), ops.attributes(call)
        self._operators += 1
        if ops.is_call(call, ops.ATTENTION):
            return self._cached_attention(named, attrs)
        fixed = [named[name] for name in ops.FIXED_ARGUMENTS[str(call.op.name)]]
        further = [named[name] for name in attrs["operands"]]
        if ops.is_call(call, ops.RECURRENT):
            _, _, heads, columns = named["v"].ty.shape
            state = self._state("state", [self._batch, heads, named["k"].ty.shape[3], columns])
            return ops.cached_recurrent(*fixed, state, *further, **attrs)
        channels, window = named["weight"].ty.shape
        state = self._state("latest", [self._batch, int(window) - 1, channels])
        return ops.cached_causal_conv(*fixed, state, *further, **attrs)

    def _cached_attention(self, named: dict[str, relax.Expr], attrs: dict[str, Any]) -> relax.Call:
        if not attrs["causal"]:
            raise PipelineError(
                f"plan-cache: attention of {attrs['site']} is not causal; it cannot have a cache"
            )
        most = int(attrs.get("most", 0))
        if 0 < most < self._context:
            raise PipelineError(
                f"plan-cache: attention of {attrs['site']} selects {most} tokens of a longer sequence, which "
                f"moqc does not model; up to {most} it sees them all: give a context of at most {most}"
            )
        heads = named["k"].ty.shape[1]
        pair = [
            self._cache(f"{name}_cache", [self._batch, heads, self._context, self._columns(named[name])])
            for name in ("k", "v")
        ]
        fixed = [named[name] for name in ("q", "k", "v", "positions")]
        further = [named[name] for name in attrs["operands"]]
        return ops.cached_attention(*fixed, *pair, *further, **attrs)

    def _columns(self, rows: relax.Expr) -> int:
        """Elements of a cache's row for keys or values [B,H,S,D]."""
        return stored_columns(self._dtype, int(rows.ty.shape[3]))

    def _state(self, name: str, shape: list[Any]) -> relax.Var:
        """A new parameter for a recurrent layer, which adds up over all tokens: float32."""
        self.states.append(len(self.caches))
        return self._cache(name, shape, "float32")

    def _cache(self, name: str, shape: list[Any], dtype: str | None = None) -> relax.Var:
        """A new parameter, numbered as its operator is."""
        ty = relax.TensorType(shape, dtype or self._dtype)
        self.caches.append(relax.Var(f"{name}_{self._operators - 1}", ty))
        return self.caches[-1]
