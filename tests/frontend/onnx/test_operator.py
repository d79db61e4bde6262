"""moqc's operator in ONNX: written by torch's exporter for a hooked model, read back, compiled."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_models import make_config

import moqc
from moqc.errors import ModelError
from moqc.frontend import masks
from moqc.frontend.gate import random_model
from moqc.frontend.hooks import hook
from moqc.frontend.onnx.exporter import translations
from moqc.frontend.onnx.importer import import_onnx


@pytest.mark.filterwarnings("ignore")  # torch's, against itself
@pytest.mark.parametrize("model_type", ["gpt_oss", "nemotron_h"])  # biases, interleaved; no gate
def test_what_torch_exports_with_our_operator_is_compiled(model_type, tmp_path):
    model = random_model(make_config(model_type))
    (layout, *_) = hook(model)
    block = model.get_submodule(layout.site).eval()
    hidden, path = layout.shape("down")[1], tmp_path / "model.onnx"

    def inputs(tokens):
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.rand(tokens, layout.experts, generator=generator).argsort(1)[:, :2]
        return (
            torch.randn(tokens, hidden, generator=generator),
            ids,
            torch.rand(tokens, 2, generator=generator),
        )

    tokens = torch.export.Dim("tokens", min=2, max=512)
    torch.onnx.export(
        block,
        inputs(7),
        input_names=["x", "ids", "weights"],
        dynamo=True,
        dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens}),
        verbose=False,
        custom_translation_table=translations(),
    ).save(path)
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Experts"]
    moqc.compile(path, tmp_path / "out", cache=tmp_path / "cache", pipeline="legalize,schedule")
    graph = moqc.load_graph(tmp_path / "out")
    for count in (2, 33):
        given = inputs(count)
        names = dict(zip(("x", "ids", "weights"), map(torch.Tensor.numpy, given), strict=True))
        (found,) = graph.run(names).values()
        expected = block(*given)
        assert (torch.from_numpy(found) - expected).norm() < 1e-5 * expected.norm()


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, places):
        return self.model(input_ids=ids, position_ids=places, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_whole_model_of_one_length(tmp_path):
    """Of any length it does not get through TVM's importer."""
    model, path = random_model(make_config("olmoe")), tmp_path / "model.onnx"
    hook(model)
    ids, places = torch.randint(3, 60, (1, 7)), torch.arange(7)[None]
    with masks.unpacked():
        exported = torch.onnx.export(
            Logits(model.eval()),
            (ids, places),
            input_names=["ids", "places"],
            dynamo=True,
            verbose=False,
            custom_translation_table=translations(),
        )
    exported.save(path)
    moqc.compile(path, tmp_path / "out", cache=tmp_path / "cache", pipeline="legalize,schedule")
    graph = moqc.load_graph(tmp_path / "out")
    (found,) = graph.run({"ids": ids.numpy(), "places": places.numpy()}).values()
    expected = Logits(model)(ids, places)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_a_router_before_a_node_is_no_block_of_its_own(tmp_path):
    save(tmp_path / "model.onnx", {"up": UP, "down": DOWN}, "silu", routed=True)
    assert list(import_onnx(tmp_path / "model.onnx").blocks) == ["block"]


def save(path, shapes, activation, routed=False):
    """A graph of one node with weights of these shapes; `routed`: the first of x choose its experts."""
    given = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", 32]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["tokens", 2]),
        helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["tokens", 2]),
    ]
    names = ["x", "ids", "weights", *(name if name in shapes else "" for name in ("gate", "up", "down"))]
    top = helper.make_node("TopK", ["x", "two"], ["weights", "ids"], axis=-1)
    node = helper.make_node("Experts", names, ["y"], domain="ai.moqc", site="block", activation=activation)
    stored = [numpy_helper.from_array(torch.zeros(shape).numpy(), name) for name, shape in shapes.items()]
    if routed:
        given, stored = given[:1], [*stored, numpy_helper.from_array(np.array([2]), "two")]
    y = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", 32])]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.moqc", 1)]
    onnx.save(
        helper.make_model(
            helper.make_graph([top, node] if routed else [node], "g", given, y, stored),
            opset_imports=opsets,
            ir_version=10,
        ),
        path,
    )


UP, DOWN = (4, 48, 32), (4, 32, 48)


@pytest.mark.parametrize(
    ("shapes", "activation", "says"),
    [
        ({"up": UP, "down": DOWN}, "silu_glu", "has up, down; silu_glu needs"),
        ({"gate": UP, "up": UP, "down": UP}, "silu_glu", r"down has the shape \[4, 48, 32\]"),
        ({"up": (48, 32), "down": DOWN}, "silu", r"up has the shape \[48, 32\], expected"),
        ({"up": UP, "down": DOWN}, "swish", "unknown activation 'swish'"),
    ],
)
def test_nodes_that_are_refused(tmp_path, shapes, activation, says):
    save(tmp_path / "model.onnx", shapes, activation)
    with pytest.raises(ModelError, match=f"Experts node block: {says}"):
        import_onnx(tmp_path / "model.onnx")
