"""Hessians of a layer's output error, ``H = sum_t x_t x_t^T`` (weighted), made fit for quantizers."""

from __future__ import annotations

import torch

from moqc.errors import InternalError

_ATTEMPTS = 8


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """``H + damping * mean(diag H) * I`` for ``hessian[B, K, K]``; the identity where H is zero. Float32."""
    hessian = hessian.float()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    result = hessian.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(torch.where(mean > 0, damping * mean, 1.0).unsqueeze(-1))
    return result


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper triangular ``U[B, K, K]`` with ``U^T U = H^-1``, float32: what GPTQ's propagation reads.

    Computed in float32; if a matrix is not numerically positive definite, in float64, and then with damping
    added to those that fail, ten times more each time.

    Raises:
        InternalError: a matrix stays indefinite (it holds a NaN or an infinity).

    """
    # H with both axes reversed is L L^T, so H^-1 is U^T U with U the reversed L^-1: no explicit inverse.
    reverse = hessian.flip(-2, -1)
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).double()
    lower, failed = torch.linalg.cholesky_ex(reverse.float())
    extra = torch.zeros_like(mean)
    for _ in range(_ATTEMPTS):
        if not bool(failed.any()):
            identity = torch.eye(hessian.shape[-1], dtype=lower.dtype, device=lower.device)
            factor: torch.Tensor = torch.linalg.solve_triangular(
                lower, identity.expand_as(lower), upper=False
            )
            return factor.float().flip(-2, -1)
        attempt = reverse.double()
        attempt.diagonal(dim1=-2, dim2=-1).add_(extra * mean)
        lower, failed = torch.linalg.cholesky_ex(attempt)
        extra = torch.where(failed.unsqueeze(-1) > 0, (extra * 10).clamp(min=1e-4), extra)
    raise InternalError("a Hessian is not positive definite after damping: are the activations finite?")


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """``tr(D H D^T)`` of weight differences ``D[B, N, K]``: float64 ``[B]``."""
    return ((difference @ hessian.float()) * difference).sum((-2, -1), dtype=torch.float64)
