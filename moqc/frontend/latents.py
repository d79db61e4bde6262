"""Multi-head latent attention on its latents: the cache holds what keys and values are compressed to.

transformers' classes of this attention share a method, ``expand_kv(latents, rotated keys)``, that makes the
keys and values of every head by one matrix, ``kv_b_proj``. Its key half can as well be applied to the queries
and its value half to the result (arXiv 2405.04434, section 2.1.2): then all heads attend one key, of the
rotated part and the latent, and the latent is the value too. Sums are taken in another order; nothing else
changes, which the gate shows for each model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def keep(module: Any) -> None:
    """Let `module`, if it is such an attention, hand latents on as its keys and values."""
    matrix = getattr(module, "kv_b_proj", None)
    if hasattr(module, "expand_kv") and isinstance(matrix, torch.nn.Linear) and matrix.bias is None:
        module.moqc_latent = True
        object.__setattr__(module, "expand_kv", _unexpanded)


def _unexpanded(latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, 1, S, rotary] and values [B, 1, S, rank], in place of every head's."""
    return rotated, latents


def is_latent(module: Any) -> bool:
    """Whether `keep` has changed `module`."""
    return bool(getattr(module, "moqc_latent", False))


def absorb(module: Any, query: Tensor) -> Tensor:
    """Queries [B, H, S, nope + rotary] -> [B, H, S, rotary + rank], for keys that end in the latents."""
    plain, rotated = torch.split(query, [module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
    return torch.cat([rotated, plain @ _matrix(module)[:, : module.qk_nope_head_dim]], dim=-1)


def expand(module: Any, found: Tensor) -> Tensor:
    """Sums of latents [B, S, H, rank] -> sums of values [B, S, H, Dv]."""
    matrix = _matrix(module)[:, module.qk_nope_head_dim :]
    return (found.transpose(1, 2) @ matrix.transpose(1, 2)).transpose(1, 2).contiguous()


def _matrix(module: Any) -> Tensor:
    """kv_b_proj by heads: [H, nope + Dv, rank]."""
    width = module.qk_nope_head_dim + module.v_head_dim
    matrix: Tensor = module.kv_b_proj.weight.reshape(-1, width, module.kv_b_proj.in_features)
    return matrix
