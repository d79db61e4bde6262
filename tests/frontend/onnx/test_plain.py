"""Blocks of experts that a graph spells out: which are recognized, as what, and which are refused."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import moqc
from moqc.errors import ModelError
from moqc.frontend.onnx.importer import import_onnx

EXPERTS, HIDDEN, INTER, TOP = 8, 32, 48, 2


def random(*shape, seed, scale=0.2):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def silu(name):
    return [("Sigmoid", [name], ["sig"]), ("Mul", [name, "sig"], ["act"])]


def gelu(name):
    return [("Gelu", [name], ["act"], {"approximate": "tanh"})]


def relu2(name):
    return [("Relu", [name], ["r"]), ("Mul", ["r", "r"], ["act"])]


def cosine(name):
    return [("Cos", [name], ["act"])]


def halves(name, gated, interleaved):
    """Steps that cut gate (a) and up (b) out of `name`."""
    if not gated:
        return []
    if not interleaved:
        return [("Split", [name, "halves"], ["a", "b"], {"axis": 1})]
    return [
        ("Reshape", [name, "by_two"], ["pair"]),
        ("Split", ["pair"], ["a0", "b0"], {"axis": 2, "num_outputs": 2}),
        ("Squeeze", ["a0", "last"], ["a"]),
        ("Squeeze", ["b0", "last"], ["b"]),
    ]


def block(activation, *, gated=True, interleaved=False, biases=False, weighted="d"):
    """A block of gathered matrices, as torch.onnx writes transformers' batched_mm."""
    first, second = ("hb", "db") if biases else ("h", "d")
    steps = [
        ("MatMul", ["x", "router"], ["scores"]),
        ("Softmax", ["scores"], ["shares"]),
        ("TopK", ["shares", "top"], ["weights", "ids"]),
        ("Unsqueeze", ["x", "one"], ["x1"]),
        ("Expand", ["x1", "wide"], ["x2"]),
        ("Reshape", ["x2", "rows"], ["x3"]),
        ("Reshape", ["ids", "all"], ["flat"]),
        ("Gather", ["w1", "flat"], ["g1"]),
        ("Unsqueeze", ["x3", "last"], ["x4"]),
        ("MatMul", ["g1", "x4"], ["h1"]),
        ("Squeeze", ["h1", "last"], ["h"]),
        *([("Gather", ["b1", "flat"], ["c1"]), ("Add", ["h", "c1"], ["hb"])] if biases else []),
        *halves(first, gated, interleaved),
        *activation("a" if gated else first),
        ("Mul", ["act", "b"], ["m"]) if gated else ("Identity", ["act"], ["m"]),
        ("Gather", ["w2", "flat"], ["g2"]),
        ("Unsqueeze", ["m", "last"], ["m1"]),
        ("MatMul", ["g2", "m1"], ["d1"]),
        ("Squeeze", ["d1", "last"], ["d"]),
        *([("Gather", ["b2", "flat"], ["c2"]), ("Add", ["d", "c2"], ["db"])] if biases else []),
        ("Reshape", ["weights", "all"], ["r1"]),
        ("Unsqueeze", ["r1", "last"], ["r2"]),
        *([("Cos", [second], ["odd"])] if weighted == "odd" else []),
        ("Mul", ["odd" if weighted == "odd" else second, "r2"], ["e1"]),
        ("Reshape", ["e1", "pairs"], ["e2"]),
        ("ReduceSum", ["e2", "one"], ["experts"], {"keepdims": 0}),
        ("Add", ["experts", "x"], ["y"]),
    ]
    return [
        helper.make_node(kind, ins, outs, **(more[0] if more else {})) for kind, ins, outs, *more in steps
    ]


def arrays(gated=True):
    rows = 2 * INTER if gated else INTER
    ints = {"top": [TOP], "all": [-1], "one": [1], "last": [-1], "wide": [1, TOP, 1], "rows": [-1, HIDDEN]}
    ints |= {"pairs": [-1, TOP, HIDDEN], "halves": [INTER, INTER], "by_two": [-1, INTER, 2]}
    return {
        "router": random(HIDDEN, EXPERTS, seed=0, scale=1),
        "w1": random(EXPERTS, rows, HIDDEN, seed=1),
        "w2": random(EXPERTS, HIDDEN, INTER, seed=2),
        "b1": random(EXPERTS, rows, seed=3),
        "b2": random(EXPERTS, HIDDEN, seed=4),
    } | {name: np.array(value, np.int64) for name, value in ints.items()}


@pytest.fixture
def saved(tmp_path):
    """``saved(nodes, weights)``: the path of a model file."""

    def save(nodes, weights):
        used = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", HIDDEN])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", HIDDEN])],
            [numpy_helper.from_array(array, name) for name, array in weights.items() if name in used],
        )
        opsets = [helper.make_opsetid("", 20)]
        path = tmp_path / "model.onnx"
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
        return path

    return save


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("activation", "name"), [(silu, "silu_glu"), (gelu, "gelu_tanh_glu")])
def test_gated_blocks(saved, activation, name, interleaved, biases):
    weights = arrays()
    graph = import_onnx(saved(block(activation, interleaved=interleaved, biases=biases), weights))
    (found,) = graph.blocks.values()
    assert (found.site, found.inputs, found.activation) == ("experts", ("x", "ids", "weights"), name)
    gate, up = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(INTER), slice(INTER, None))
    expected = {"gate": weights["w1"][:, gate], "up": weights["w1"][:, up], "down": weights["w2"]}
    for operand, array in expected.items():
        np.testing.assert_array_equal(found.matrices[operand].numpy(), array)
    if biases:
        np.testing.assert_array_equal(found.biases["gate_bias"].numpy(), weights["b1"][:, gate])
        np.testing.assert_array_equal(found.biases["down_bias"].numpy(), weights["b2"])
    assert list(found.biases) == (["gate_bias", "up_bias", "down_bias"] if biases else [])


def test_blocks_without_a_gate(saved):
    (found,) = import_onnx(saved(block(relu2, gated=False), arrays(gated=False))).blocks.values()
    assert (found.activation, list(found.matrices)) == ("relu2", ["up", "down"])


def test_compiled_it_is_what_onnxruntime_computes(saved, tmp_path):
    path = saved(block(silu), arrays())
    moqc.compile(path, tmp_path / "out", cache=tmp_path / "cache", pipeline="legalize,schedule")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    graph = moqc.load_graph(tmp_path / "out")
    for tokens in (1, 7, 33):
        x = random(tokens, HIDDEN, seed=tokens, scale=1)
        (expected,) = session.run(None, {"x": x})
        difference = np.linalg.norm(graph.run({"x": x})["y"] - expected)
        assert difference < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("nodes", [block(cosine), block(silu, weighted="odd")])
def test_blocks_that_are_refused(saved, nodes):
    says = "indices ids of a TopK look like those of experts, but what their block computes is no activation"
    with pytest.raises(ModelError, match=f"{says} and layout that moqc knows"):
        import_onnx(saved(nodes, arrays()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's, against itself
def test_what_torch_writes_of_transformers_is_recognized(tmp_path):
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_tok": TOP}
    config = Qwen3MoeConfig(**sizes, moe_intermediate_size=INTER, norm_topk_prob=True)
    config._experts_implementation = "batched_mm"
    module = Qwen3MoeSparseMoeBlock(config).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    tokens = {1: torch.export.Dim("tokens", min=2, max=512)}
    inputs = (torch.randn(1, 7, HIDDEN),)
    program = torch.onnx.export(
        module, inputs, dynamo=True, dynamic_shapes={"hidden_states": tokens}, verbose=False
    )
    program.save(tmp_path / "model.onnx")
    (found,) = import_onnx(tmp_path / "model.onnx").blocks.values()
    gate, up = module.experts.gate_up_proj.detach().chunk(2, dim=1)
    assert found.activation == "silu_glu"
    for name, expected in {"gate": gate, "up": up, "down": module.experts.down_proj.detach()}.items():
        torch.testing.assert_close(found.matrices[name], expected, rtol=0, atol=0)
