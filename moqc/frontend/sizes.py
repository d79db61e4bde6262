"""Sizes of a checkpoint from its headers: weights, and stored bits of what is not quantized."""

from __future__ import annotations

import math
from collections.abc import Container

from moqc.frontend.checkpoint import Checkpoint


def model_weights(checkpoint: Checkpoint) -> int:
    """Number of weights of the model; a tied one counts once."""
    return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names if name not in checkpoint.tied)


def kept_bits(checkpoint: Checkpoint, quantized: Container[str]) -> int:
    """Stored bits of all parameters but the routed experts' matrices and those `quantized` (by name)."""
    experts = {
        layout.source(projection) for layout in checkpoint.layouts for projection in layout.projections
    }
    total = 0
    for name in checkpoint.names:
        if name not in experts and name not in checkpoint.tied and name not in quantized:
            tensor = checkpoint.load(name)
            total += 8 * tensor.element_size() * tensor.numel()
    return total
