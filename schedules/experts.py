"""What a call of `R.moqc.mixed_experts` says about its layer, for every family of targets."""

from __future__ import annotations

from typing import TypedDict

from tvm import relax

from moqc.ir.ops import PROJECTIONS, attributes, bit_classes, operands
from moqc.quant.activations import parse_activation
from moqc.quant.formats import Format
from moqc.quant.hadamard import BLOCK


class ExpertsFacts(TypedDict):
    """What all families want to know.

    `hidden` are the rows of down, `intermediate` its columns; each projection lists the formats of its
    classes, in the order of its tensors, and an activation without a gate has none there. `biases` names
    those there are, of ``gate_bias``, ``up_bias`` and ``down_bias``.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    gate: tuple[Format, ...]
    up: tuple[Format, ...]
    down: tuple[Format, ...]
    activation: str
    biases: tuple[str, ...]


def experts_facts(call: relax.Call) -> ExpertsFacts:
    """Read a call; `activation` is the elementwise part."""
    attrs, named, classes = attributes(call), operands(call), bit_classes(call)
    biases = {f"{projection}_bias" for projection in PROJECTIONS}
    return {
        "experts": int(named["table"].ty.shape[1]),
        "top_k": int(named["ids"].ty.shape[1]),
        "hidden": attrs.get("hidden", int(named["x"].ty.shape[1])),
        "intermediate": attrs["intermediate"],
        "gate": classes.get("gate", ()),
        "up": classes["up"],
        "down": classes["down"],
        "activation": str(parse_activation(attrs["activation"]).elementwise),
        "biases": tuple(name for name in named if name in biases),
    }


def rotated_blocks(call: relax.Call) -> int:
    """Blocks of 32 columns of down's inputs that are rotated; 0: none."""
    attrs = attributes(call)
    return attrs["intermediate"] // BLOCK if parse_activation(attrs["activation"]).rotated else 0


def class_operands(call: relax.Call, projection: str) -> list[relax.Expr]:
    """The packed tensors of a projection's classes, in the order of the operands."""
    return [value for name, value in operands(call).items() if name.startswith(f"{projection}.")]
