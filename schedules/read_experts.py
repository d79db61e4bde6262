"""Read a call of `R.moqc.mixed_experts`, for every family of targets."""

from __future__ import annotations

from typing import Any, TypeVar

from tvm import relax

from moqc.ir.ops import PROJECTIONS, attributes, bit_classes, operands
from moqc.quant.activations import parse_activation
from moqc.quant.hadamard import BLOCK
from moqc.schedules.experts import ExpertsLayer

L = TypeVar("L", bound=ExpertsLayer)


def read_experts(call: relax.Call, kind: type[L], **own: Any) -> L:
    """The layer of a call, with what is a family's `own`."""
    attrs, named, classes = attributes(call), operands(call), bit_classes(call)
    biases = {f"{projection}_bias" for projection in PROJECTIONS}
    return kind(
        experts=int(named["table"].ty.shape[1]),
        top_k=int(named["ids"].ty.shape[1]),
        hidden=attrs.get("hidden", int(named["x"].ty.shape[1])),
        intermediate=attrs["intermediate"],
        gate=classes.get("gate", ()),
        up=classes["up"],
        down=classes["down"],
        activation=str(parse_activation(attrs["activation"]).elementwise),
        biases=tuple(name for name in named if name in biases),
        **own,
    )


def rotated_blocks(call: relax.Call) -> int:
    """Blocks of 32 columns of down's inputs that are rotated; 0: none."""
    attrs = attributes(call)
    return attrs["intermediate"] // BLOCK if parse_activation(attrs["activation"]).rotated else 0


def class_operands(call: relax.Call, projection: str) -> list[relax.Expr]:
    """The packed tensors of a projection's classes, in the order of the operands."""
    return [value for name, value in operands(call).items() if name.startswith(f"{projection}.")]
