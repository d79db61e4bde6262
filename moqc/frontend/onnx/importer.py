"""From a checked ONNX model to an IR module: TVM's importer, with R.moqc.experts for MoE and QMoE nodes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import tvm
from onnx import helper, numpy_helper
from tvm import IRModule, relax
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, _get_convert_map

from moqc.errors import ModelError
from moqc.frontend.hf import drop_unused
from moqc.frontend.onnx.experts import OnnxExperts, Routing, is_experts_node, read_experts
from moqc.frontend.onnx.operator import is_operator, read_operator
from moqc.frontend.onnx.plain import PlainBlock, take_plain
from moqc.frontend.onnx.reader import OnnxModel, read_onnx
from moqc.frontend.skeleton import first_line
from moqc.ir import ops
from moqc.ir.annotations import BITS, SCHEMA, SCHEMA_VERSION
from moqc.quant.formats import Format
from moqc.quant.rtn import quantize_rtn
from moqc.quant.tensor import Quantized

_SHOWN = 3
_EXPERTS = "com.microsoft::experts"
_CONSTANTS = {
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_float": np.float32,
    "value_floats": np.float32,
}


@dataclass(frozen=True)
class OnnxGraph:
    """An imported model: `mod`, its weights, and the names of what goes in and comes out."""

    model: OnnxModel
    mod: IRModule
    blocks: dict[str, OnnxExperts]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def load(self, name: str) -> torch.Tensor:
        """A weight of main: an initializer, or an experts operand ``<site>.gate``... in float32."""
        site, _, operand = name.rpartition(".")
        if site not in self.blocks:
            return torch.from_numpy(np.array(self.model.array(name)))  # arrays of files are read-only
        block = self.blocks[site]
        if operand in block.biases:
            return block.biases[operand]
        matrix = block.matrices[operand]
        return matrix.dequantize() if isinstance(matrix, Quantized) else matrix

    def get(self, site: str, projection: str, expert: int) -> Quantized:
        """One expert's matrix: the codes of the model, or its floats rounded to the format of BITS."""
        matrix = self.blocks[site].matrices[projection]
        if isinstance(matrix, torch.Tensor):
            return quantize_rtn(matrix[expert], Format.parse(BITS.of(self.mod)[site][projection][expert]))
        zeros = None if matrix.zeros is None else matrix.zeros[expert]
        return Quantized(matrix.format, matrix.codes[expert], matrix.scales[expert], zeros)


def import_onnx(path: Path) -> OnnxGraph:
    """Read and import the ONNX file `path`; experts with codes get their formats in BITS.

    Raises ModelError for a file that is refused, a model without experts, or operators TVM does not import.
    """
    model = read_onnx(path)
    blocks = _take_experts(model)
    _plain_constants(model.graph)
    importer = _Importer(model, blocks)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # renamed inputs; unknown sizes, which are symbolic
            mod = importer.from_onnx(model.graph, model.opset)
    except (RuntimeError, TypeError, ValueError, AssertionError, LookupError, AttributeError) as error:
        raise ModelError(f"{path}: cannot be imported: {first_line(error)}") from error
    main = mod["main"].without_attr("params")
    mod = drop_unused(IRModule({"main": main}), importer.parameter_names)
    plan = {
        site: {
            name: [str(matrix.format)] * matrix.shape[0]
            for name, matrix in block.matrices.items()
            if isinstance(matrix, Quantized)
        }
        for site, block in blocks.items()
        if block.packed
    }
    mod = SCHEMA.put(BITS.put(mod, plan) if plan else mod, SCHEMA_VERSION)
    inputs = tuple(entry.name for entry in model.graph.input if entry.name not in model.weights)
    return OnnxGraph(model, mod, blocks, inputs, tuple(entry.name for entry in model.graph.output))


def _take_experts(model: OnnxModel) -> dict[str, OnnxExperts]:
    """The blocks by site; their nodes keep only what is computed as inputs, their weights leave the graph."""
    blocks: dict[str, OnnxExperts] = {}
    for node in model.graph.node:
        if is_experts_node(node) or is_operator(node):
            block = read_operator(node, model) if is_operator(node) else read_experts(node, model)
            if block.site in blocks:
                raise ModelError(
                    f"{model.path}: two nodes are called {block.site}: give them names of their own"
                )
            blocks[block.site] = block
            _put(node, block)
    plain, missing = take_plain(model)
    for found in plain:
        blocks[found.experts.site] = found.experts
        _put_plain(model.graph, found)
    if not blocks:
        raise ModelError(
            f"{model.path}: no experts: looked for com.microsoft MoE and QMoE nodes and ai.moqc Experts, and "
            f"did not find {'; '.join(missing[:_SHOWN])} (of {_summary(model.graph)}); export the model with "
            "one of them, or give moqc the checkpoint"
        )
    if plain:
        _drop_unused_nodes(model.graph)
    used = {name for node in model.graph.node for name in node.input}
    used |= {entry.name for entry in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return blocks


def _put(node: onnx.NodeProto, block: OnnxExperts) -> None:
    """Make `node` the one that stands for `block`."""
    node.name, node.op_type = block.site, _EXPERTS
    del node.input[:]
    node.input.extend(block.inputs)


def _put_plain(graph: onnx.GraphProto, found: PlainBlock) -> None:
    """Make the last node of a spelled-out block the one that stands for it."""
    found.last.domain = ""
    del found.last.attribute[:]
    _put(found.last, found.experts)
    if found.before is not None:
        graph.node.insert(list(graph.node).index(found.last), found.before)


def _drop_unused_nodes(graph: onnx.GraphProto) -> None:
    """Remove nodes whose results nothing reads."""
    used = {entry.name for entry in graph.output}
    kept = []
    for node in reversed(graph.node):
        if used & set(node.output):
            kept.append(node)
            used |= {*node.input, *_read_inside(node)}
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _read_inside(node: onnx.NodeProto) -> Iterator[str]:
    """Names that the graphs in a node read."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (entry.name for entry in graph.output)
            for inner in graph.node:
                yield from inner.input
                yield from _read_inside(inner)


def _plain_constants(graph: onnx.GraphProto) -> None:
    """Give Constant nodes a tensor: TVM knows no other kind of value."""
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name in _CONSTANTS:
            dtype = _CONSTANTS[node.attribute[0].name]
            array = np.array(helper.get_attribute_value(node.attribute[0]), dtype)
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(array)))


def _summary(graph: onnx.GraphProto) -> str:
    """What a graph consists of, in a few words."""
    kinds = sorted({node.op_type for node in graph.node})
    more = f" and {len(kinds) - 8} more kinds" if len(kinds) > 8 else ""
    return f"{len(graph.node)} nodes: {', '.join(kinds[:8])}{more}"


class _Importer(ONNXGraphImporter):  # type: ignore[misc]
    """TVM's importer with operands of experts as further parameters of main."""

    _params: dict[str, Any]

    def __init__(self, model: OnnxModel, blocks: dict[str, OnnxExperts]) -> None:
        super().__init__({}, {}, keep_params_in_input=True, sanitize=True)
        self._model, self._blocks = model, blocks
        self._operands: dict[str, dict[str, relax.Var]] = {}

    @property
    def parameter_names(self) -> list[str]:
        """Names of main's weights, in order."""
        return list(self._params)

    def _parse_array(self, tensor_proto: onnx.TensorProto) -> Any:
        return tvm.runtime.tensor(np.array(self._model.array(tensor_proto.name), order="C"))

    def _parse_graph_initializers(self, graph: onnx.GraphProto) -> None:
        super()._parse_graph_initializers(graph)
        names = [tensor.name for tensor in graph.initializer]
        # TVM cuts this prefix off.
        self._params = {name: self._params[name.removeprefix("onnx::")] for name in names}
        nothing = tvm.runtime.tensor(np.zeros((), np.float32))  # TVM wants a value; ours come when packaging
        for site, block in self._blocks.items():
            shapes = {name: tuple(matrix.shape) for name, matrix in block.matrices.items()}
            shapes |= {name: tuple(bias.shape) for name, bias in block.biases.items()}
            self._operands[site] = {
                name: relax.Var(f"{site}_{name}".replace(".", "_"), relax.TensorType(shape, "float32"))
                for name, shape in shapes.items()
            }
            for name, variable in self._operands[site].items():
                self._params[f"{site}.{name}"] = (variable, nothing)

    def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
        known = {*_get_convert_map(), "If", "Constant", _EXPERTS}
        unknown = sorted(
            {f"{node.domain}::{node.op_type}" for node in graph.node if node.op_type not in known}
        )
        if unknown:
            raise ModelError(f"{self._model.path}: operators TVM does not import: {', '.join(unknown)}")

    def _convert_operator(self, op_name: str, inputs: Any, attrs: dict[str, Any], opset: int) -> relax.Expr:
        if op_name != _EXPERTS:
            return super()._convert_operator(op_name, inputs, attrs, opset)
        return self._experts(attrs["tvm_custom"]["name"], list(inputs))

    def _experts(self, site: str, inputs: list[relax.Expr]) -> relax.Expr:
        block, emit = self._blocks[site], self.bb.emit
        x, *router = inputs
        hidden = x.ty.shape[-1]
        flat = emit(relax.op.astype(emit(relax.op.reshape(x, (-1, hidden))), "float32"))
        if block.routing is None:
            ids, weights = (
                emit(relax.op.astype(emit(relax.op.reshape(each, (-1, each.ty.shape[-1]))), dtype))
                for each, dtype in zip(router, ("int64", "float32"), strict=True)
            )
        else:
            probs = [emit(relax.op.astype(each, "float32")) for each in router]
            ids, weights = self._route(block.routing, probs)
        operands = self._operands[site]
        y = emit(
            ops.experts(
                flat,
                ids,
                weights,
                *operands.values(),
                site=site,
                activation=block.activation,
                operands=list(operands),
            )
        )
        return emit(relax.op.astype(emit(relax.op.reshape(y, x.ty.shape)), x.ty.dtype))

    def _route(self, routing: Routing, probs: list[relax.Expr]) -> tuple[relax.Expr, relax.Expr]:
        """Expert ids and weights [T, k] by the node's rule."""
        emit = self.bb.emit
        top = emit(relax.op.topk(probs[0], routing.top_k, ret_type="both", dtype="int64"))
        scores, ids = emit(relax.TupleGetItem(top, 0)), emit(relax.TupleGetItem(top, 1))
        if len(probs) == 1 and not routing.among_all:
            return ids, emit(relax.op.nn.softmax(scores, axis=-1))
        shares = probs[1] if len(probs) > 1 else emit(relax.op.nn.softmax(probs[0], axis=-1))
        weights = emit(relax.op.gather_elements(shares, ids, axis=1))
        if len(probs) > 1 and routing.normalize:
            weights = emit(relax.op.divide(weights, emit(relax.op.sum(weights, axis=-1, keepdims=True))))
        return ids, weights
