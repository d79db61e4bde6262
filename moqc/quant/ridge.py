"""Ridge regressions: a linear map moved to give wanted outputs, and contributions predicted from inputs."""

from __future__ import annotations

from dataclasses import dataclass

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


DIRECTIONS = 512
"""Principal components of the inputs that a prediction uses at most."""
LEAST_PAIRS = 8
"""An expert that saw fewer tokens is predicted by the mean of all."""
FLOOR = 0.01
"""Of the mean: smaller values are as good as it, and their logarithms would decide the fit."""


@dataclass(frozen=True)
class Predictor:
    """Linear predictions of logarithms from x, in the principal components of the tokens seen."""

    mean: Tensor
    basis: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Predictor:
        """For inputs like x [T, H]."""
        mean = x.mean(0)
        _, vectors = torch.linalg.eigh(((x - mean).T @ (x - mean)).double())
        return cls(mean, vectors.flip(1)[:, :DIRECTIONS].float())

    def fit(self, x: Tensor, values: Tensor) -> tuple[float, Tensor]:
        """(a, u [H]) of ``log(value) ≈ a + u @ x``, for x [n, H] and `values` [n], not negative.

        The ridge is twice the components over the tokens, as a share of the inputs' energy: with few tokens
        little is read into them.
        """
        logs = (values + FLOOR * values.mean() + torch.finfo(values.dtype).tiny).log()
        parts = ((x - self.mean) @ self.basis).double()
        parts = parts - parts.mean(0)
        gram = parts.T @ parts
        ridge = 2 * parts.shape[1] / len(parts) * gram.diagonal().mean().clamp(min=1e-12)
        gram += ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        slope = self.basis @ torch.linalg.solve(gram, parts.T @ (logs - logs.mean()).double()).float()
        return float(logs.mean() - slope @ (x.mean(0))), slope


def boundary_shares(logits: Tensor, top_k: int) -> Tensor:
    """Weight [T] of tokens by their router `logits` [T, E]: most where the choice of experts is close.

    ``1 + exp(-m / mean(m))``, m the gap between the last expert chosen and the first that is not.
    """
    if top_k >= logits.shape[1]:
        return torch.ones(len(logits), device=logits.device)
    top = logits.topk(top_k + 1, dim=1).values
    gap = top[:, top_k - 1] - top[:, top_k]
    return 1 + torch.exp(-gap / gap.mean().clamp(min=1e-12))
