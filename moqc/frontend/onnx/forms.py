"""What a block of experts computes, and how its matrices lie, found by running it beside moqc's reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from moqc.frontend.onnx.flow import Array
from moqc.frontend.onnx.products import Mlps, Operands
from moqc.quant import reference

NONE_KNOWN = "no activation and layout that moqc knows"
_GATED = ("silu_glu", "gelu_glu", "gelu_tanh_glu", "relu_glu")
_UNGATED = ("silu", "gelu", "relu2")
_TOLERANCE = 1e-5

Evaluate = Callable[[Array, Array, Array], Array | None]
"""The block as a function of x [T, H], ids and weights [T, k]; None where it does not take them."""


@dataclass(frozen=True)
class Form:
    """An activation and the canonical operands, biases among them, in the order of the experts' numbers."""

    activation: str
    operands: dict[str, torch.Tensor]

    def of(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The reference's result."""
        return reference.experts(
            x,
            ids,
            weights,
            **{"gate": None, **self.operands},  # type: ignore[arg-type]
            activation=self.activation,
        )


def identify(evaluate: Evaluate, mlps: Mlps, tokens: int, top: int) -> Form | None:
    """The form of the experts `mlps` that gives what `evaluate` gives, for T = `tokens` and k = `top`.

    Rows of the input are from 0.1 to 100 in size, and half of them choose the same experts: activations that
    are cut somewhere are found out, and so are experts that take so many tokens only.
    """
    generator = np.random.default_rng(0)
    for width in dict.fromkeys(mlps.first[0][0].shape[1:]):
        x = generator.normal(size=(tokens, width)) * np.logspace(-1, 2, tokens)[:, None]
        ids = np.stack([generator.permutation(mlps.experts)[:top] for _ in range(tokens)])
        ids[: tokens // 2] = ids[0]
        values = x.astype(np.float32), ids, generator.uniform(0.1, 1, ids.shape).astype(np.float32)
        expected = evaluate(*values)
        if expected is None or expected.shape != x.shape:
            continue
        alone = None if mlps.stacked else _alone(evaluate, values[0], mlps.experts, top)
        for form in _forms(mlps, width):
            placed = form if alone is None else _placed(form, torch.from_numpy(values[0]), alone)
            if placed and _equal(placed.of(*map(torch.from_numpy, values)), torch.from_numpy(expected)).all():
                return placed
    return None


def _alone(evaluate: Evaluate, x: Array, experts: int, top: int) -> torch.Tensor:
    """What expert e alone makes of row e (of those of `x`, over and over), [E, H]."""
    rows, found = len(x), []
    weights = np.zeros((rows, top), np.float32)
    weights[:, 0] = 1
    for start in range(0, experts, rows):
        ids = (start + np.arange(rows)[:, None] + np.arange(top)) % experts
        y = evaluate(x, ids, weights)
        assert y is not None  # it took the same shapes before
        found.append(y)
    return torch.from_numpy(np.concatenate(found)[:experts])


def _placed(form: Form, x: torch.Tensor, alone: torch.Tensor) -> Form | None:
    """`form` with its experts, which come in any order, in that of their numbers."""
    experts = len(alone)
    each, ones = torch.arange(experts)[:, None], torch.ones(experts, 1)
    order = []
    for number in range(experts):
        row = x[number % len(x)].expand(experts, -1)
        same = _equal(form.of(row, each, ones), alone[number].expand(experts, -1))
        if not same.any():
            return None
        order.append(int(same.int().argmax()))
    return Form(form.activation, {name: operand[order] for name, operand in form.operands.items()})


def _equal(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Which rows agree."""
    agree: torch.Tensor = (found - expected).norm(dim=1) <= _TOLERANCE * expected.norm(dim=1)
    return agree


def _forms(mlps: Mlps, hidden: int) -> Iterator[Form]:
    """Every form that the matrices may have by their shapes."""
    for down in _turned(mlps.last, 1, hidden):
        inner = down[0].shape[2]
        turned = [[up for up in _turned(first, 2, hidden)] for first in mlps.first]
        if len(turned) == 2:
            for one, other in product(*turned):
                if one[0].shape[1] == other[0].shape[1] == inner:
                    yield from _named(_GATED, gate=one, up=other, down=down)
                    yield from _named(_GATED, gate=other, up=one, down=down)
            continue
        for up in turned[0]:
            if up[0].shape[1] == inner:
                yield from _named(_UNGATED, up=up, down=down)
            if up[0].shape[1] == 2 * inner:
                for gate_rows, up_rows in (
                    (slice(0, inner), slice(inner, None)),
                    (slice(inner, None), slice(0, inner)),
                    (slice(0, None, 2), slice(1, None, 2)),
                ):
                    yield from _named(_GATED, gate=_rows(up, gate_rows), up=_rows(up, up_rows), down=down)


def _turned(operands: Operands, dim: int, size: int) -> list[Operands]:
    """The matrices as stored, and transposed, where dimension `dim` is of this size then."""
    matrix, bias = operands
    return [(each, bias) for each in (matrix, matrix.mT) if each.shape[dim] == size]


def _rows(operands: Operands, rows: slice) -> Operands:
    matrix, bias = operands
    return matrix[:, rows], None if bias is None else bias[:, rows]


def _named(activations: tuple[str, ...], **parts: Operands) -> Iterator[Form]:
    """One form an activation; where some parts have a bias, the others get zeros."""
    operands = {name: matrix.contiguous() for name, (matrix, _) in parts.items()}
    if any(bias is not None for _, bias in parts.values()):
        for name, (matrix, bias) in parts.items():
            operands[f"{name}_bias"] = torch.zeros(matrix.shape[:2]) if bias is None else bias.contiguous()
    yield from (Form(activation, operands) for activation in activations)
