"""Products with stored matrices in a part of an ONNX graph, and how they form MLPs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moqc.frontend.onnx.flow import Array, Flow, Step

Operands = tuple[torch.Tensor, torch.Tensor | None]
_SHAPING = ("Reshape", "Unsqueeze", "Squeeze", "Expand", "Flatten", "Cast", "Identity", "Tile", "Transpose")
_PASSING = (*_SHAPING, "Gather", "GatherND")
_PRODUCTS = ("MatMul", "Gemm", "Einsum")


@dataclass(frozen=True)
class Product:
    """A product with the constant `matrix`, of two dimensions or [E, ., .], and the constant `bias`.

    `behind`: the products, by number, that its other operand comes from.
    """

    matrix: str
    bias: str
    behind: frozenset[int]


@dataclass(frozen=True)
class Mlps:
    """Matrices [E, ., .] and biases [E, .] (or None) of experts: of one or two products, and of the last.

    `stacked`: they are stored so, and thus in the order of the experts' numbers.
    """

    first: list[Operands]
    last: Operands
    stacked: bool

    @property
    def experts(self) -> int:
        """Number of experts."""
        return int(self.last[0].shape[0])


def find_products(flow: Flow, steps: list[Step]) -> list[Product]:
    """The products of `steps`, in order."""
    found: list[Product] = []
    behind: dict[str, frozenset[int]] = {}
    for step in steps:
        reached = frozenset[int]().union(*(behind.get(name, frozenset()) for name in step.inputs))
        if step.kind in _PRODUCTS:
            stored = [name for name in step.inputs[:2] if flow.rank(_constant(flow, name)) >= 2]
            if len(stored) == 1:
                found.append(Product(_constant(flow, stored[0]), _bias(flow, step), reached))
                reached |= {len(found) - 1}
        behind |= dict.fromkeys(step.outputs, reached)
    return found


def read_mlps(flow: Flow, products: list[Product]) -> Mlps | None:
    """The matrices of experts that `products` make up, in order; None where they are no MLPs of one kind."""
    ends = [index for index, product in enumerate(products) if product.behind]
    groups = [[*sorted(products[end].behind), end] for end in ends]
    if sorted(index for group in groups for index in group) != list(range(len(products))):
        return None
    members = [[products[index] for index in group] for group in groups]
    try:
        operands = [_stack(flow, alike) for alike in zip(*members, strict=True)]
    except ValueError:  # of other numbers of matrices, or of other shapes
        return None
    stacked = len(groups) == 1
    if len(operands) not in (2, 3) or any(matrix.dim() != 3 for matrix, _ in operands):
        return None
    return Mlps(operands[:-1], operands[-1], stacked)


def _stack(flow: Flow, products: tuple[Product, ...]) -> Operands:
    """One operand of all experts; of a single product whose matrix has three dimensions as it is."""
    matrices = [flow.value(product.matrix) for product in products]
    biases = [flow.value(product.bias) for product in products if product.bias]
    if biases and len(biases) != len(products):
        raise ValueError
    if len(products) == 1 and matrices[0].ndim == 3:
        matrix, bias = matrices[0], biases[0].reshape(len(matrices[0]), -1) if biases else None
    else:
        matrix, bias = np.stack(matrices), np.stack(biases) if biases else None
    return _floats(matrix), None if bias is None else _floats(bias)


def _floats(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _constant(flow: Flow, name: str) -> str:
    """The constant that a tensor is a view of, or is gathered from; "" for other tensors."""
    while name not in flow.constant:
        step = flow.makers.get(name)
        if step is None or step.kind not in _PASSING:
            return ""
        name = step.inputs[0]
    return name


def _bias(flow: Flow, product: Step) -> str:
    """The constant that is added to a product; "" where none is."""
    if len(product.inputs) > 2 and product.kind == "Gemm":
        return _constant(flow, product.inputs[2])
    name = product.outputs[0]
    while len(users := flow.users.get(name, [])) == 1 and users[0].kind in _PASSING:
        name = users[0].outputs[0]
    if len(users) != 1 or users[0].kind != "Add":
        return ""
    return next((found for n in users[0].inputs if n != name and (found := _constant(flow, n))), "")
