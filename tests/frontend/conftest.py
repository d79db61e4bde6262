"""Tiny random models of five architectures, and a stand-in for moqc's own lowering.

The front end sits below the passes that lower R.moqc operators to kernels, so here they become calls of
Python functions that run the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import tvm
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from tvm import IRModule, relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from moqc.ir import ops
from moqc.quant import reference

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
_SPECIFIC: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "num_key_value_heads": 4},
    "mixtral": {"num_local_experts": 8, "sliding_window": 4},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {"num_local_experts": 8, "head_dim": 8, "sliding_window": 4},
}


def make_config(model_type: str, **changes: Any) -> transformers.PretrainedConfig:
    fields = {**_COMMON, **_SPECIFIC.get(model_type, {}), **changes}
    return CONFIG_MAPPING[model_type](**fields)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., transformers.PretrainedConfig]:
    """``tiny_config(model_type, **changes)``: a tiny configuration."""
    return make_config


@mutator
class _ToPacked(PyExprMutator):
    """R.moqc.experts and attention -> packed calls of the functions below; attributes travel by number."""

    def __init__(self, mod: IRModule) -> None:
        super().__init__(mod)
        self.attributes: list[dict[str, Any]] = []

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        if not ops.is_call(call, ops.EXPERTS, ops.ATTENTION):
            return call
        self.attributes.append({"name": str(call.op.name), **ops.attributes(call)})
        number = tvm.ir.StringImm(str(len(self.attributes) - 1))
        return relax.call_dps_packed("moqc.test", relax.Tuple([*call.args, number]), call.ty)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    attrs: dict[str, Any],
    *sinks: Any,
) -> torch.Tensor:
    """The contract of R.moqc.attention, by positions, written plainly."""
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("bhsd,bhtd->bhst", q, k.repeat_interleave(groups, 1)) * float(attrs["scale"])
    at, to = positions[:, :, None], positions[:, None, :]
    allowed = (to >= 0) & ((to <= at) if attrs["causal"] else torch.ones_like(to <= at))
    if attrs["window"]:
        allowed = allowed & (to > at - attrs["window"])
    scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    if sinks:
        scores = torch.cat([scores, sinks[0].reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    shares = scores.softmax(-1)[..., : k.shape[2]]
    return torch.einsum("bhst,bhtd->bshd", shares, v.repeat_interleave(groups, 1))


def compile_with_reference(mod: IRModule, weights: list[Any]) -> Callable[[Any, Any], Any]:
    """A `moqc.frontend.gate.CompileAndRun` that runs moqc's operators in torch and the rest through TVM."""
    lowering = _ToPacked(mod)
    lowering.builder_.update_func(mod.get_global_var("main"), lowering.visit_expr(mod["main"]))

    def packed(*arguments: Any) -> None:
        *tensors, number, output = arguments
        attrs = lowering.attributes[int(str(number))]
        operands = [torch.from_dlpack(tensor) for tensor in tensors]
        if attrs["name"] == ops.EXPERTS:
            given = dict(zip(attrs["operands"], operands[3:], strict=True))
            made = reference.experts(*operands[:3], **{"gate": None, **given}, activation=attrs["activation"])
        else:
            made = attend(*operands[:4], attrs, *operands[4:])
        torch.from_dlpack(output).copy_(made)

    tvm.register_global_func("moqc.test", packed, override=True)
    executable = tvm.compile(lowering.builder_.get(), target=tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    constants = [tvm.runtime.tensor(np.ascontiguousarray(weight)) for weight in weights]

    def run(ids: Any, positions: Any) -> Any:
        inputs = (tvm.runtime.tensor(ids), tvm.runtime.tensor(positions))
        return machine["main"](*inputs, *constants).numpy()

    return run


@pytest.fixture(scope="session")
def compile_and_run() -> Callable[..., Any]:
    """The stand-in for moqc's own lowering."""
    return compile_with_reference
