"""A linear map moved to give wanted outputs for other inputs, as little as that takes: ridge regression."""

from __future__ import annotations

import torch
from torch import Tensor


def ridge_update(weight: Tensor, x: Tensor, wanted: Tensor, shares: Tensor, damping: float) -> Tensor:
    """``W + (Σ a (r - W x) xᵀ) (Σ a x xᵀ + λ I)⁻¹``, float32 [E, H].

    Args:
        weight: W [E, H].
        x: inputs [T, H].
        wanted: outputs r [T, E] (without bias).
        shares: weight a [T] of each token, not negative.
        damping: λ as a share of the mean of the diagonal of ``Σ a x xᵀ``.

    """
    scaled = x.double() * shares.double()[:, None]
    gram = scaled.T @ x.double()
    residual = wanted.double() - x.double() @ weight.double().T
    ridge = damping * gram.diagonal().mean().clamp(min=1e-12)
    gram += ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    change = torch.linalg.solve(gram, scaled.T @ residual)
    updated: Tensor = (weight.double() + change.T).float()
    return updated


def boundary_shares(logits: Tensor, top_k: int) -> Tensor:
    """Weight [T] of tokens by their router `logits` [T, E]: most where the choice of experts is close.

    ``1 + exp(-m / mean(m))``, m the gap between the last expert chosen and the first that is not.
    """
    if top_k >= logits.shape[1]:
        return torch.ones(len(logits), device=logits.device)
    top = logits.topk(top_k + 1, dim=1).values
    gap = top[:, top_k - 1] - top[:, top_k]
    return 1 + torch.exp(-gap / gap.mean().clamp(min=1e-12))
