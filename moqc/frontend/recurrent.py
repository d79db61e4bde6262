"""Recurrent mixers of hybrid models: their kernels' functions are rebound to two custom operators.

transformers marks the functions for which fast kernels exist with the kernel's name
(``@use_kernel_func_from_hub_with_fallback("chunk_kda", ...)``). Those names and their signatures are a small
vocabulary that all architectures share, so moqc knows kernels, not architectures: a causal convolution, and
four scans that are all cases of one linear recurrence (`moqc.quant.recurrence`). Which tensors belong
together and where they come from stays in the model's code, which is traced as ever.
"""

from __future__ import annotations

import ast
import inspect
import sys
import types
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from moqc.errors import ModelError
from moqc.quant import recurrence

_DECORATOR = "use_kernel_func_from_hub_with_fallback"
_NORM_EPSILON = 1e-6  # of the delta rules' kernels
# Arguments that have no bearing on the result of a whole sequence from its start.
_IRRELEVANT = frozenset(
    {
        "chunk_size",
        "use_mambapy",
        "use_associative_scan",
        "output_final_state",
        "return_final_states",
        "return_last_state",
    }
)


@torch.library.custom_op("moqc::recurrent", mutates_args=())
def recurrent_operator(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, rate: Tensor | None, site: str
) -> Tensor:
    """Q and k [B,S,Hk,K], v [B,S,H,V], decay [B,S,H] or [B,S,H,K], beta [B,S,H], rate [H,K] -> [B,S,H,V].

    Token i sits at position i: padding and states are the compiled operator's matter.
    """
    return recurrence.recurrent(q, k, v, decay, _in_order(v), beta=beta, rate=rate)[0]


@recurrent_operator.register_fake
def _(_q: Tensor, _k: Tensor, v: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@torch.library.custom_op("moqc::causal_conv", mutates_args=())
def causal_conv_operator(x: Tensor, weight: Tensor, bias: Tensor | None, site: str) -> Tensor:
    """X [B,S,C], weight [C,W], bias [C] -> [B,S,C]: each channel over its W latest tokens."""
    return recurrence.causal_conv(x, weight, _in_order(x), bias=bias)[0]


@causal_conv_operator.register_fake
def _(x: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _in_order(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device).expand(like.shape[0], -1)


def _causal_conv1d(
    site: str,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    x = hidden_states.transpose(1, 2).to(weight.dtype)
    out: Tensor = torch.ops.moqc.causal_conv(x, weight, bias, site).transpose(1, 2)
    out = out if activation is None else ACT2FN[activation](out)
    return out.to(hidden_states.dtype)


def _delta_rule(
    site: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, None]:
    """Gated delta net, with one factor a head, and Kimi delta attention, with one a key."""
    q, k, v, decay, share = (tensor.float() for tensor in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = _normalized(q), _normalized(k)
    out = torch.ops.moqc.recurrent(q * q.shape[-1] ** -0.5, k, v, decay, share, None, site)
    return out.to(query.dtype), None


def _normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _NORM_EPSILON)


def _mamba2(
    site: str,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """hidden_states [B,S,H,V], dt [B,S,H], A [H], B and C [B,S,Hk,K], D [H]."""
    step = _step(dt, dt_bias, dt_softplus).clamp(min=dt_limit[0], max=dt_limit[1]).float()
    x = hidden_states.float()
    value = x * step.unsqueeze(-1)
    out: Tensor = torch.ops.moqc.recurrent(C.float(), B.float(), value, A.float() * step, None, None, site)
    return out if D is None else out + D.unsqueeze(-1) * x


def _selective_scan(
    site: str,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """hidden_states, dt and z [B,D,S], A [D,K], B and C [B,K,S], D [D]: a channel is a head of one column."""
    x = hidden_states.transpose(1, 2).float()
    step = _step(dt.transpose(1, 2), delta_bias, delta_softplus).float()
    q, k = (tensor.transpose(1, 2).unsqueeze(2).float() for tensor in (C, B))
    value = (step * x).unsqueeze(-1)
    out: Tensor = torch.ops.moqc.recurrent(q, k, value, step, None, A.float(), site).squeeze(-1)
    out = out if D is None else out + x * D
    out = out.transpose(1, 2)
    return out if z is None else out * F.silu(z)


def _step(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


_KERNELS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _causal_conv1d,
    "chunk_gated_delta_rule": _delta_rule,
    "chunk_kda": _delta_rule,
    "mamba_chunk_scan_combined": _mamba2,
    "selective_scan_fn": _selective_scan,
}
"""Name of a hub kernel -> what it computes, in moqc's operators; the first argument is the caller's site."""


def rebind(module: torch.nn.Module, site: str) -> None:
    """Make the methods of `module` that call known kernels call moqc's operators, in this instance only.

    A method is rebuilt on a copy of its globals in which the kernels are replaced; transformers' own module
    stays as it is, and so do other models of the same class.
    """
    source = sys.modules[type(module).__module__]
    found = _kernel_functions(source.__name__)
    if not found:
        return
    replaced = {
        name: partial(_call, kernel, getattr(source, name), site, type(module).__name__)
        for name, kernel in found.items()
    }
    for name, method in vars(type(module)).items():
        function = inspect.unwrap(method) if inspect.isfunction(method) else None
        if function is None or not replaced.keys() & set(function.__code__.co_names):
            continue
        rebuilt = types.FunctionType(
            function.__code__,
            {**function.__globals__, **replaced},
            name,
            function.__defaults__,
            function.__closure__,
        )
        rebuilt.__kwdefaults__ = function.__kwdefaults__
        object.__setattr__(module, name, types.MethodType(rebuilt, module))


@lru_cache
def _kernel_functions(module_name: str) -> dict[str, str]:
    """Function of a modeling module -> name of the hub kernel that it stands for, of those in `_KERNELS`."""
    if not module_name.startswith("transformers.models."):
        return {}
    found = {}
    for node in ast.parse(inspect.getsource(sys.modules[module_name])).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == _DECORATOR:
                kernel = ast.literal_eval(decorator.args[0])
                if kernel in _KERNELS:
                    found[node.name] = kernel
    return found


def _call(kernel: str, original: Callable[..., Any], site: str, owner: str, *args: Any, **kwargs: Any) -> Any:
    """Moqc's form of `kernel` on the arguments of `original`.

    Raises ModelError for an argument that moqc's form does not have.
    """
    signature = inspect.signature(inspect.unwrap(original))
    known = {name for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
    bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name in known})
    given = {name: value for name, value in bound.arguments.items() if name in known}
    mine = set(inspect.signature(_KERNELS[kernel]).parameters)
    others = {
        **{n: v for n, v in kwargs.items() if n not in known},
        **{n: given.pop(n) for n in known - mine if n in given},
    }
    unknown = sorted(n for n, v in others.items() if isinstance(v, Tensor) and n not in _IRRELEVANT)
    if unknown:
        raise ModelError(f"{site}: {owner} gives {kernel} {', '.join(unknown)}, which moqc does not model")
    return _KERNELS[kernel](site, **given)
