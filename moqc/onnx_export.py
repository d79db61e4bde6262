"""Write a model or an artifact as an ONNX model with QMoE nodes, which onnxruntime runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import transformers
from numpy.typing import NDArray
from onnx import helper

from moqc.errors import ModelError, UserError
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.config import parse_config
from moqc.frontend.experts import ExpertLayout
from moqc.frontend.hooks import hook
from moqc.frontend.onnx import qmoe
from moqc.frontend.onnx.exporter import INPUTS, export_graph
from moqc.frontend.onnx.operator import is_operator
from moqc.frontend.onnx.reader import MICROSOFT, MOQC
from moqc.frontend.onnx.writer import DATA, DataWriter, save
from moqc.frontend.skeleton import build_skeleton
from moqc.inputs import resolve_model
from moqc.ir.ops import PROJECTIONS
from moqc.log import logger, track
from moqc.manifest import MANIFEST, read_manifest
from moqc.package import COPIED, staged_folder
from moqc.quant.formats import Format
from moqc.quant.hadamard import rotate
from moqc.quant.layouts import find_layout
from moqc.quant.rtn import quantize_rtn
from moqc.quant.tensor import Quantized
from moqc.targets import find_target
from moqc.tensorfile import StoredTensor, open_tensors

DEFAULT_FORMAT = "int4-g64-sym"
Array = NDArray[Any]

_INPUTS = {
    2: "fc1.codes",
    3: "fc1.scales",
    4: "fc1.bias",
    5: "fc2.codes",
    6: "fc2.scales",
    7: "fc2.bias",
    11: "fc1.zeros",
    12: "fc2.zeros",
}
"""Where a QMoE node has its weights."""


class Weights(Protocol):
    """What is exported: weights by name, experts in a format."""

    def dense(self, name: str) -> Array:
        """The weight called `name`, float32."""

    def expert(self, layout: ExpertLayout, projection: str, expert: int) -> Quantized:
        """One expert's matrix [N, K]."""


class ModelWeights:
    """Weights of a checkpoint; experts are rounded to nearest in one format."""

    def __init__(self, checkpoint: Checkpoint, format: Format) -> None:
        self._checkpoint, self._format = checkpoint, format

    def dense(self, name: str) -> Array:
        """The weight called `name`, float32."""
        return self._checkpoint.load(name).float().numpy()

    def expert(self, layout: ExpertLayout, projection: str, expert: int) -> Quantized:
        """One expert's matrix [N, K]."""
        matrix = self._checkpoint.load(f"{layout.site}.{projection}", expert)
        return quantize_rtn(matrix.float().contiguous(), self._format)


class ArtifactWeights:
    """Weights of an artifact; experts as they are, or rounded again to one format."""

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, ...]], format: Format | None) -> None:
        """`shapes` are those of the model's parameters."""
        self._manifest, self._shapes, self._format = read_manifest(folder), shapes, format
        self._layout = find_layout(find_target(self._manifest.target.name).layout)
        self._stored: dict[str, StoredTensor] = {}
        for file in sorted(folder.glob("params-*.safetensors")):
            self._stored |= open_tensors(file)

    def dense(self, name: str) -> Array:
        """The weight called `name`, float32; dequantized where it is packed."""
        site = name.removesuffix(".weight")
        if site in self._manifest.linear_bits:
            format = Format.parse(self._manifest.linear_bits[site])
            rows, columns = self._shapes[name]
            return self._unpack(f"{site}.", slice(None), format, rows, columns).dequantize().numpy()
        if name not in self._stored:
            raise ModelError(f"the artifact has no weight {name}: it was compiled by another moqc")
        stored = self._stored[name]
        array = np.empty(stored.data.shape, np.float32)
        stored.copy_to(array)
        return array

    def expert(self, layout: ExpertLayout, projection: str, expert: int) -> Quantized:
        """One expert's matrix [N, K]. Raises ModelError for codes that stand for rotated weights."""
        if layout.site in self._manifest.protected:
            raise ModelError(
                f"{layout.site}: QMoE has no protected channels: compile without protect-channels"
            )
        names = self._manifest.bits[layout.site][projection]
        number, index = self._array(f"{layout.site}.table")[PROJECTIONS.index(projection), expert].tolist()
        shape = layout.shape(projection)[1:]
        prefix = f"{layout.site}.{projection}.{number}."
        found = self._unpack(prefix, slice(index, index + 1), Format.parse(names[expert]), *shape)
        zeros = None if found.zeros is None else found.zeros[0]
        matrix = Quantized(found.format, found.codes[0], found.scales[0], zeros)
        rotated = self._manifest.rotated and projection == "down"
        if self._format is not None:
            dense = matrix.dequantize()
            return quantize_rtn(rotate(dense) if rotated else dense, self._format)
        if rotated:
            raise ModelError(
                f"{layout.site}: down is stored for rotated inputs, which QMoE has not: export with "
                f"--uniform {DEFAULT_FORMAT}, or an artifact whose quantize-experts has rotate=false"
            )
        return matrix

    def _array(self, name: str) -> Array:
        return np.asarray(self._stored[name].data)

    def _unpack(self, prefix: str, part: slice, format: Format, rows: int, columns: int) -> Quantized:
        names = ("codes", "scales") if format.symmetric else ("codes", "scales", "zeros")
        parts = {name: np.array(self._array(f"{prefix}{name}")[part]) for name in names}
        return self._layout.unpack(_Parts(**parts), format, rows, columns)


class _Parts:
    """Packed tensors of any layout."""

    def __init__(self, codes: Array, scales: Array, zeros: Array | None = None) -> None:
        self.codes, self.scales, self.zeros = codes, scales, zeros


def export_onnx(source: str | Path, out: Path, *, uniform: str | None) -> None:
    """Write ``model.onnx``, its data file and the tokenizer into the folder `out`.

    `source` is an artifact, whose experts keep their codes, or a checkpoint, whose experts are rounded to
    nearest. `uniform` is the format of all experts: by default that of an artifact, `DEFAULT_FORMAT` for a
    checkpoint. All other weights are float32. The graph has no cache: (input_ids, positions) -> logits.

    Raises ModelError for a model or formats without a form in ONNX, UserError when `out` cannot be written.
    """
    folder = Path(source)
    format = None if uniform is None else Format.parse(uniform)
    if (folder / MANIFEST).is_file():
        if read_manifest(folder).graph is not None:
            raise UserError(f"{folder}: is a compiled ONNX graph; export the model it was made from")
        model = build_skeleton(parse_config(folder, str(folder)))
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        weights: Weights = ArtifactWeights(folder, shapes, format)
    else:
        checkpoint = Checkpoint.open(resolve_model(source))
        folder, model = checkpoint.path, build_skeleton(checkpoint.config)
        weights = ModelWeights(checkpoint, format or Format.parse(DEFAULT_FORMAT))
    layouts = {layout.site: layout for layout in hook(model)}
    with staged_folder(out, force=False) as staged:
        logger.info("exporting %s", model.config.model_type)
        _write(export_graph(model), model, layouts, weights, staged)
        for name in ("tokenizer.json", *COPIED):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, staged / name)


def _write(
    proto: onnx.ModelProto,
    model: transformers.PreTrainedModel,
    layouts: dict[str, ExpertLayout],
    weights: Weights,
    folder: Path,
) -> None:
    graph = proto.graph
    known = {*INPUTS, *(tensor.name for tensor in graph.initializer)}
    made = {name for node in graph.node for name in node.output}
    wanted = dict.fromkeys(name for node in graph.node for name in node.input if name)
    with (folder / DATA).open("wb") as stream:
        writer = DataWriter(graph, stream)
        for name in track([name for name in wanted if name not in known | made], "writing weights"):
            writer.add(name, weights.dense(model.all_tied_weights_keys.get(name, name)))
        nodes: list[onnx.NodeProto] = []
        for node in track(list(graph.node), "writing experts"):
            if not is_operator(node):
                nodes.append(node)
                continue
            attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
            layout = layouts[attributes["site"].decode()]
            nodes += _qmoe(node, layout, attributes, weights, writer)
    del graph.node[:]
    graph.node.extend(nodes)
    kept = [entry for entry in proto.opset_import if entry.domain != MOQC]
    del proto.opset_import[:]
    proto.opset_import.extend([*kept, helper.make_opsetid(MICROSOFT, 1)])
    save(proto, folder)


def _qmoe(
    node: onnx.NodeProto,
    layout: ExpertLayout,
    attributes: dict[str, Any],
    weights: Weights,
    writer: DataWriter,
) -> list[onnx.NodeProto]:
    """The QMoE node for a placeholder, after nodes that scatter its routing into [tokens, experts]."""
    site, (x, ids, shares) = layout.site, node.input
    activation = qmoe.node_attributes(attributes["activation"].decode())
    found = {
        name: [weights.expert(layout, name, expert) for expert in range(layout.experts)]
        for name in layout.projections
    }
    every = [matrix for matrices in found.values() for matrix in matrices]
    bits, block = qmoe.width_of(every, site), qmoe.block_size(every, site)
    parts = {name: qmoe.node_matrix(matrices, block, bits) for name, matrices in found.items()}
    biases = {name: weights.dense(f"{site}.{name}") for name in layout.operands if name.endswith("_bias")}
    fused = layout.has_gate
    first = qmoe.fuse(parts["gate"], parts["up"]) if fused else parts["up"]
    bias = biases.get("up_bias")
    if fused and bias is not None:
        bias = qmoe.interleave(biases["gate_bias"], bias)
    arrays = {"fc1.bias": bias, "fc2.bias": biases.get("down_bias")}
    for name, matrix in (("fc1", first), ("fc2", parts["down"])):
        zeros = None if matrix.centered else matrix.packed_zeros
        arrays |= {
            f"{name}.codes": matrix.packed_codes,
            f"{name}.scales": matrix.scales,
            f"{name}.zeros": zeros,
        }
    inputs = [x, f"{site}.chosen", *[""] * 12, f"{site}.shares"]
    for index, name in _INPUTS.items():
        array = arrays[name]
        if array is not None:
            inputs[index] = writer.add(f"{site}.{name}", array)
    options = {"k": attributes["k"], "normalize_routing_weights": 0, "expert_weight_bits": bits, **activation}
    made = helper.make_node(
        "QMoE", inputs, node.output, name=site, domain=MICROSOFT, block_size=block, **options
    )
    return [*_scatter(site, ids, shares, layout.experts), made]


def _scatter(site: str, ids: str, shares: str, experts: int) -> list[onnx.NodeProto]:
    """Routing as QMoE takes it: 1 where an expert is chosen, and its share, both in [tokens, experts]."""
    zero, one = (helper.make_tensor("value", onnx.TensorProto.FLOAT, [1], [value]) for value in (0.0, 1.0))

    def name(part: str) -> str:
        return f"{site}.{part}"

    return [
        helper.make_node("Shape", [ids], [name("tokens")], start=0, end=1),
        helper.make_node("Constant", [], [name("experts")], value_ints=[experts]),
        helper.make_node("Concat", [name("tokens"), name("experts")], [name("shape")], axis=0),
        helper.make_node("ConstantOfShape", [name("shape")], [name("zeros")], value=zero),
        helper.make_node("Shape", [ids], [name("pairs")]),
        helper.make_node("ConstantOfShape", [name("pairs")], [name("ones")], value=one),
        helper.make_node("ScatterElements", [name("zeros"), ids, name("ones")], [name("chosen")], axis=1),
        helper.make_node("ScatterElements", [name("zeros"), ids, shares], [name("shares")], axis=1),
    ]
