"""moqc's own ONNX operator for experts, ``ai.moqc::Experts``: its schema, and nodes of it with their weights.

Inputs x [T, H], ids and weights [T, k], then the canonical gate, up, down, gate_bias, up_bias and down_bias,
of which those that a block has not are left out; attributes ``site``, its name, and ``activation``.
"""

from __future__ import annotations

import onnx
import torch
from onnx import helper
from onnx.defs import OpSchema

from moqc.errors import ModelError, UserError
from moqc.frontend.onnx.experts import OnnxExperts
from moqc.frontend.onnx.reader import MOQC, OnnxModel
from moqc.ir.calls import EXPERT_OPERANDS, PROJECTIONS
from moqc.quant.activations import parse_activation
from moqc.quant.tensor import Quantized

EXPERTS = "Experts"


def register() -> None:
    """Let onnx know the operator, once a process: torch asks for a schema of whatever it writes."""
    if onnx.defs.has(EXPERTS, 1, MOQC):
        return
    given, optional = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    operands = [given(name, "T", param_option=optional) for name in EXPERT_OPERANDS]
    onnx.defs.register_schema(
        OpSchema(
            EXPERTS,
            MOQC,
            1,
            inputs=[given("x", "T"), given("ids", "I"), given("weights", "T"), *operands],
            outputs=[given("y", "T")],
            type_constraints=[("T", ["tensor(float)"], ""), ("I", ["tensor(int64)"], "")],
            attributes=[
                OpSchema.Attribute("site", OpSchema.AttrType.STRING),
                OpSchema.Attribute("activation", OpSchema.AttrType.STRING),
                OpSchema.Attribute("k", OpSchema.AttrType.INT, required=False),
            ],
        )
    )


def is_operator(node: onnx.NodeProto) -> bool:
    """Whether `node` is one."""
    return (node.domain, node.op_type) == (MOQC, EXPERTS)


def read_operator(node: onnx.NodeProto, model: OnnxModel) -> OnnxExperts:
    """The block of a node. Raises ModelError where operands are missing, or do not fit."""
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    site = attributes.get("site", b"").decode() or node.name or node.output[0]
    where = f"{model.path}: {EXPERTS} node {site}"
    names = {name: stored for name, stored in zip(EXPERT_OPERANDS, node.input[3:], strict=False) if stored}
    operands = {
        name: torch.from_numpy(model.array(stored).astype("float32")) for name, stored in names.items()
    }
    try:
        activation = parse_activation(attributes.get("activation", b"").decode())
    except UserError as error:
        raise ModelError(f"{where}: {error}") from error
    expected = {"up", "down", *(["gate"] if activation.has_gate else [])}
    matrices: dict[str, torch.Tensor | Quantized] = {
        name: operands[name] for name in PROJECTIONS if name in operands
    }
    if set(matrices) != expected:
        raise ModelError(
            f"{where}: has {', '.join(matrices) or 'no matrices'}; {activation} needs {expected}"
        )
    _check_shapes(operands, where)
    biases = {name: operands[name] for name in EXPERT_OPERANDS[len(PROJECTIONS) :] if name in operands}
    return OnnxExperts(site, tuple(node.input[:3]), str(activation), None, matrices, biases)


def _check_shapes(operands: dict[str, torch.Tensor], where: str) -> None:
    shape = tuple(operands["up"].shape)
    if len(shape) != 3:
        raise ModelError(f"{where}: up has the shape {list(shape)}, expected [experts, rows, columns]")
    experts, inner, hidden = shape
    shapes: dict[str, tuple[int, ...]] = {"gate": shape, "up": shape, "down": (experts, hidden, inner)}
    shapes |= {f"{name}_bias": shapes[name][:2] for name in PROJECTIONS}
    for name, tensor in operands.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ModelError(
                f"{where}: {name} has the shape {list(tensor.shape)}, up's {list(shape)} wants "
                f"{list(shapes[name])}"
            )
