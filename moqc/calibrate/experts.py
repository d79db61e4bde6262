"""One experts block in canonical float32 weights, and the grouping of routed tokens by expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.experts import ExpertLayout, canonical
from moqc.quant import reference
from moqc.quant.activations import apply_activation, rotated_name
from moqc.quant.hadamard import rotate
from moqc.quant.protection import Protection
from moqc.quant.reference import Activations

PROJECTIONS = ("gate", "up", "down")
OPERANDS = (*PROJECTIONS, "gate_bias", "up_bias", "down_bias")


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of one experts block, float32.

    `gate` (None for blocks without one) and `up`: [E, I, H]; `down`: [E, H, I]; biases [E, I], [E, I] and
    [E, H]. With a `protection`, gate and up have its columns too.
    """

    activation: str
    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    protection: Protection | None = None

    @classmethod
    def load(cls, checkpoint: Checkpoint, layout: ExpertLayout, device: torch.device) -> ExpertWeights:
        """Read all experts of a site from the checkpoint."""
        found: dict[str, Any] = {
            name: canonical(layout, checkpoint, name).to(device) for name in layout.operands
        }
        return cls(activation=layout.activation, **{"gate": None, **found})

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections the block has."""
        return PROJECTIONS if self.gate is not None else PROJECTIONS[1:]

    @property
    def expert_count(self) -> int:
        """E."""
        return self.up.shape[0]

    def matrices(self, projection: str) -> Tensor:
        """Weights [E, N, K] of one projection."""
        found: Tensor | None = getattr(self, projection)
        if found is None:
            raise KeyError(projection)
        return found

    def substitute(self, **operands: Tensor) -> ExpertWeights:
        """The same block with some of its operands replaced."""
        changes: dict[str, Any] = operands
        return replace(self, **changes)

    def rotated(self) -> ExpertWeights:
        """A block that computes the same with the inputs of down rotated (`moqc.quant.hadamard`)."""
        return replace(self, activation=rotated_name(self.activation), down=rotate(self.down))

    def only(self, expert: int) -> ExpertWeights:
        """A block of this one expert."""
        operands = {name: getattr(self, name) for name in OPERANDS}
        one = {name: value[expert : expert + 1] for name, value in operands.items() if value is not None}
        return self.substitute(**one)

    def apply(self, x: Tensor, ids: Tensor, weights: Tensor, activations: Activations = "float") -> Tensor:
        """Output [T, H] of the block for x [T, H], ids [T, k], weights [T, k]."""
        return reference.experts(
            self._read(x),
            ids,
            weights,
            self.gate,
            self.up,
            self.down,
            activation=self.activation,
            gate_bias=self.gate_bias,
            up_bias=self.up_bias,
            down_bias=self.down_bias,
            activations=activations,
        )

    def hidden(self, expert: int | slice, x: Tensor) -> Tensor:
        """Input [n, I] of one expert's down projection for x [n, H]; batched over a slice of experts."""
        x = self._read(x)
        gate = None if self.gate is None else _affine(x, self.gate[expert], _at(self.gate_bias, expert))
        return apply_activation(self.activation, gate, _affine(x, self.up[expert], _at(self.up_bias, expert)))

    def _read(self, x: Tensor) -> Tensor:
        """What gate and up read of the block's input."""
        return x if self.protection is None else self.protection.extend(x)

    def output(self, expert: int | slice, x: Tensor) -> Tensor:
        """Output [n, H] of one expert for x [n, H], before its routing weight; batched over a slice."""
        return _affine(self.hidden(expert, x), self.down[expert], _at(self.down_bias, expert))


def _at(bias: Tensor | None, expert: int | slice) -> Tensor | None:
    return None if bias is None else bias[expert]


def _affine(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ w.mT
    return y if bias is None else y + bias.unsqueeze(-2)


def routed(ids: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For every hit expert: its number, the tokens routed to it, and which of their choices it is.

    `ids` int64 [T, k]; yields (expert, tokens int64 [n], slots int64 [n]), tokens ascending.
    """
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts).tolist()
    start = 0
    for expert, count in enumerate(counts):
        if count:
            chosen = order[start : start + count]
            yield expert, chosen // ids.shape[1], chosen % ids.shape[1]
        start += count
