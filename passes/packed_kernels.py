"""The packed kernels of a module, one call of each: what the numerics certificate is measured on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import IRModule, relax, tirx

from moqc.ir import ops
from moqc.ir.sites import bindings, weight_names
from moqc.targets import Target

Lowering = Callable[[relax.BlockBuilder, relax.Call, Target], relax.Expr]

BUILDERS: dict[str, Callable[..., relax.Call]] = {
    ops.MIXED_EXPERTS: ops.mixed_experts,
    ops.LINEAR: ops.linear,
    ops.EMBEDDING: ops.embedding,
}
"""Packed operator -> the function that makes its call."""


def packed_kernels(mod: IRModule) -> list[dict[str, Any]]:
    """One call of each kind of packed operator in main, for the value of KERNELS.

    Calls are of one kind when the same code serves them: all is equal but the site and its weights.
    """
    found: dict[str, dict[str, Any]] = {}
    for _, call in bindings(mod["main"]):
        if not ops.is_call(call, *BUILDERS):
            continue
        named, attrs, names = ops.operands(call), ops.attributes(call), weight_names(mod)
        inputs = ops.FIXED_ARGUMENTS[str(call.op.name)]
        entry = {
            "function": f"certify_{len(found)}",
            "operator": str(call.op.name),
            "attributes": attrs,
            "arguments": {
                name: {
                    "shape": [_extent(e) for e in named[name].ty.shape],
                    "dtype": str(named[name].ty.dtype),
                }
                for name in inputs
            },
            "parameters": {name: names[value] for name, value in named.items() if name not in inputs},
        }
        experts = _extent(named["table"].ty.shape[1]) if "table" in named else 0
        kind = {**entry, "function": "", "attributes": {**attrs, "site": ""}, "parameters": experts}
        found.setdefault(repr(kind), entry)
    return list(found.values())


def _extent(extent: Any) -> int:
    """An extent as an integer, -1 where it is symbolic."""
    return int(extent) if isinstance(extent, tirx.IntImm) else -1


def add_functions(
    builder: relax.BlockBuilder,
    kernels: Sequence[Mapping[str, Any]],
    mod: IRModule,
    lowerings: Mapping[str, Lowering],
    target: Target,
) -> None:
    """Add the function of each entry: the arguments, then the weights -> the result of one call.

    `builder` holds the lowered main of `mod`. It makes equal kernels one, so these functions run main's own.
    """
    types = {name: variable.ty for variable, name in weight_names(mod).items()} if kernels else {}
    for entry in kernels:
        extents = [tirx.Var(f"n{axis}", "int64") for axis in range(8)]
        inputs = [
            relax.Var(name, relax.TensorType(_symbolic(spec["shape"], extents), spec["dtype"]))
            for name, spec in entry["arguments"].items()
        ]
        weights = [
            relax.Var(operand.replace(".", "_"), types[name]) for operand, name in entry["parameters"].items()
        ]
        with builder.function(entry["function"], [*inputs, *weights]):
            with builder.dataflow():
                call = builder.normalize(
                    BUILDERS[entry["operator"]](*inputs, *weights, **entry["attributes"])
                )
                result = builder.emit_output(lowerings[entry["operator"]](builder, call, target))
            builder.emit_func_output(result)


def _symbolic(shape: Sequence[int], extents: Sequence[tirx.Var]) -> list[Any]:
    return [extents[axis] if extent < 0 else extent for axis, extent in enumerate(shape)]
