"""Activations on their way through a model's layers, and what computes the experts blocks they meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from moqc.calibrate.experts import ExpertWeights
from moqc.quant.device import compute_device
from moqc.quant.reference import Activations

BATCH_TOKENS = 4096
"""Tokens a batch: bounds the memory of attention scores and logits."""
GPU_BATCH_TOKENS = 16_384
"""The same on a GPU, which needs more to be busy."""


@dataclass(frozen=True)
class ExpertsCall:
    """One experts block on one batch: `x` [T, H] float32, `ids` int64 [T, k], `weights` float32 [T, k]."""

    site: str
    batch: int
    x: Tensor
    ids: Tensor
    weights: Tensor


ExpertsFunction: TypeAlias = Callable[[ExpertsCall], Tensor]
"""Computes the block's output [T, H] float32."""


@dataclass
class Stream:
    """Activations on their way through the layers.

    `tokens`: int64 [n, window] a batch. `hidden`: float32 [n, window, H] a batch, input of the next layer.
    `arguments`: what the model passes to each layer beside the hidden states, [batch][layer].
    """

    tokens: list[Tensor]
    hidden: list[Tensor]
    arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]

    def fork(self) -> Stream:
        """A second stream from the same point; what is shared is never written in place."""
        return Stream(self.tokens, list(self.hidden), self.arguments)


def computed(blocks: Mapping[str, ExpertWeights], activations: Activations = "float") -> ExpertsFunction:
    """The experts function of the given weights, site -> block."""
    return lambda call: blocks[call.site].apply(call.x, call.ids, call.weights, activations)


def batch_tokens() -> int:
    """Most tokens of a batch on `compute_device()`."""
    return BATCH_TOKENS if compute_device().type == "cpu" else GPU_BATCH_TOKENS


def split_batches(windows: Tensor, tokens: int | None = None) -> list[Tensor]:
    """Batches of at most `tokens` (None: `batch_tokens()`), at least a window, of `windows` [n, window]."""
    rows = max(1, (tokens or batch_tokens()) // windows.shape[1])
    return [windows[at : at + rows] for at in range(0, len(windows), rows)]
