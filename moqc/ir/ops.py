"""moqc's Relax operators: importing this module registers them, once a process.

They print as ``R.moqc.experts(...)`` and that text parses back. Every argument after the fixed ones is named
by the attribute `operands`, in order; floats in attributes are strings (`repr`), because TVM prints a float
with 17 digits.

| operator           | arguments                                               | result                |
| ------------------ | ------------------------------------------------------- | --------------------- |
| experts            | x [T,H], ids int [T,k], weights [T,k], *operands        | [T,H]                 |
| mixed_experts      | the same, operands packed                               | [T,H]                 |
| linear             | x [...,K], codes, scales, zeros?, bias?                 | [...,rows]            |
| embedding          | ids int [...], codes, scales, zeros?                    | [...,columns]         |
| attention          | q [B,H,S,D], k [B,Hk,S,D], v [B,Hk,S,Dv], positions     | [B,S,H,Dv]            |
| prune_routing      | x [T,H], ids, weights [T,k], positions, strength, limits, slopes? | (ids, weights) |
| cached_attention   | the same, k_cache [B,Hk,C,D], v_cache [B,Hk,C,Dv]       | ([B,S,H,Dv], caches)  |
| recurrent          | q, k [B,S,Hk,K], v [B,S,H,V], decay, positions          | [B,S,H,V]             |
| cached_recurrent   | the same, state [B,H,K,V]                               | ([B,S,H,V], state)    |
| causal_conv        | x [B,S,C], weight [C,W], positions                      | [B,S,C]               |
| cached_causal_conv | the same, state [B,W-1,C]                               | ([B,S,C], state)      |
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import tvm.relax.script as relax_script
import tvm.relax.script.parser as relax_parser
from tvm import relax
from tvm.ir import Op, _ffi_api, register_op_attr
from tvm_ffi import register_error

from moqc.errors import MoqcError
from moqc.ir import infer
from moqc.ir.build import (
    attention,
    cached_attention,
    cached_causal_conv,
    cached_recurrent,
    causal_conv,
    embedding,
    experts,
    linear,
    mixed_experts,
    prune_routing,
    recurrent,
)
from moqc.ir.calls import (
    ATTENTION,
    CACHED_ATTENTION,
    CACHED_CAUSAL_CONV,
    CACHED_RECURRENT,
    CAUSAL_CONV,
    EMBEDDING,
    EXPERT_OPERANDS,
    EXPERTS,
    FIXED_ARGUMENTS,
    LINEAR,
    MIXED_EXPERTS,
    PROJECTIONS,
    PRUNE_ROUTING,
    RECURRENT,
    attributes,
    bit_classes,
    describe,
    is_call,
    operand,
    operands,
    plain,
)

__all__ = [
    "ATTENTION",
    "CACHED_ATTENTION",
    "CACHED_CAUSAL_CONV",
    "CACHED_RECURRENT",
    "CAUSAL_CONV",
    "EMBEDDING",
    "EXPERTS",
    "EXPERT_OPERANDS",
    "FIXED_ARGUMENTS",
    "LINEAR",
    "MIXED_EXPERTS",
    "PROJECTIONS",
    "PRUNE_ROUTING",
    "RECURRENT",
    "attention",
    "attributes",
    "bit_classes",
    "cached_attention",
    "cached_causal_conv",
    "cached_recurrent",
    "causal_conv",
    "describe",
    "embedding",
    "experts",
    "is_call",
    "linear",
    "mixed_experts",
    "operand",
    "operands",
    "plain",
    "prune_routing",
    "recurrent",
]

_RULES: dict[str, tuple[Callable[..., relax.Call], Callable[[relax.Call, Any], Any]]] = {
    EXPERTS: (experts, infer.infer_experts),
    MIXED_EXPERTS: (mixed_experts, infer.infer_experts),
    LINEAR: (linear, infer.infer_linear),
    EMBEDDING: (embedding, infer.infer_embedding),
    ATTENTION: (attention, infer.infer_attention),
    CACHED_ATTENTION: (cached_attention, infer.infer_cached_attention),
    PRUNE_ROUTING: (prune_routing, infer.infer_prune_routing),
    RECURRENT: (recurrent, infer.infer_recurrent),
    CACHED_RECURRENT: (cached_recurrent, infer.infer_stateful),
    CAUSAL_CONV: (causal_conv, infer.infer_causal_conv),
    CACHED_CAUSAL_CONV: (cached_causal_conv, infer.infer_stateful),
}


def _register() -> None:
    """Register the operators with TVM, and with its script parser under ``R.moqc``."""
    for name, (builder, rule) in _RULES.items():
        _ffi_api.RegisterOp(name, (builder.__doc__ or "").partition("\n")[0])
        op = Op.get(name)
        for argument in FIXED_ARGUMENTS[name]:
            op.add_argument(argument, "Tensor", "")
        op.set_num_inputs(-1)  # the operands follow
        op.set_attrs_type_key("ir.DictAttrs")
        register_op_attr(name, "FInferType", rule)
        register_op_attr(name, "FPurity", True)
    namespace = types.SimpleNamespace(**{builder.__name__: builder for builder, _ in _RULES.values()})
    for module in (relax_script, relax_parser):
        module.moqc = namespace


def _register_errors(error: type[MoqcError]) -> None:
    """Let `error` and its subclasses, raised inside a rule or a pass, come back out of TVM as themselves.

    Under names of their own: TVM has an InternalError too.
    """
    register_error(f"moqc.{error.__name__}", error)
    for subclass in error.__subclasses__():
        _register_errors(subclass)


_register()
_register_errors(MoqcError)
