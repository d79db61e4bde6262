"""Damaged and unusual ONNX files: refused in one line, before anything is computed."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moqc.errors import ModelError
from moqc.frontend.onnx.experts import unpack_codes
from moqc.frontend.onnx.importer import import_onnx
from moqc.frontend.onnx.reader import read_onnx

ONES = np.ones((8, 8), np.float32)


def make(nodes=None, weights=None, **fields):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")] if nodes is None else nodes
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in ("x", "y")]
    initializers = [
        numpy_helper.from_array(a, n) for n, a in ({"w": ONES} if weights is None else weights).items()
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializers)
    opsets = [helper.make_opsetid("", fields.pop("opset", 21)), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, **{"ir_version": 10, **fields})


@pytest.fixture
def saved(tmp_path):
    def save(model, **options):
        onnx.save(model, tmp_path / "model.onnx", **options)
        return tmp_path / "model.onnx"

    return save


def test_weights_come_back(saved):
    for options in ({}, {"save_as_external_data": True, "location": "data.bin", "size_threshold": 0}):
        model = read_onnx(saved(make(), **options))
        assert np.array_equal(model.array("w"), ONES)
        assert model.opset == 21
        assert len(model.fingerprint) == 64
        with pytest.raises(ModelError, match="y is computed, not stored"):
            model.array("y")


def test_local_functions_are_inlined(saved):
    """As torch's exporter writes them."""
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    opset = [helper.make_opsetid("", 21)]
    function = helper.make_function("pkg", "Product", ["a", "b"], ["c"], body, opset)
    model = make([helper.make_node("Product", ["x", "w"], ["y"], domain="pkg")])
    model.opset_import.append(helper.make_opsetid("pkg", 1))
    model.functions.append(function)
    assert [node.op_type for node in read_onnx(saved(model)).graph.node] == ["MatMul"]


def misshape(model):
    model.graph.initializer[0].dims[0] = 9
    return model


def negative(model):
    model.graph.initializer[0].dims[0] = -8
    return model


CYCLE = [
    helper.make_node("Add", ["x", "b"], ["a"]),
    helper.make_node("MatMul", ["a", "w"], ["b"]),
    helper.make_node("Identity", ["b"], ["y"]),
]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (make([]), "no nodes"),
        (make(ir_version=2), "IR version 2"),
        (make(ir_version=99), "IR version 99"),
        (make(opset=5), "operator set 5; moqc reads 11 to"),
        (make(opset=99), "operator set 99"),
        (make(CYCLE), "onnx.checker refuses it: .*topologically sorted"),
        (make(weights={}), "onnx.checker refuses it: .*'w'"),
        (misshape(make()), r"w has 256 bytes, its shape \[9, 8\] 288"),
        (negative(make()), r"w has the shape \[-8, 8\]"),
        (make([helper.make_node("MatMul", ["x"], ["y"])]), "onnx.checker refuses it"),
    ],
)
def test_refused_models(saved, model, says):
    with pytest.raises(ModelError, match=rf"model\.onnx: .*{says}"):
        read_onnx(saved(model))


def test_unknown_domains(saved):
    model = make([helper.make_node("Attention2", ["x", "w"], ["y"], domain="com.acme")])
    model.opset_import.append(helper.make_opsetid("com.acme", 1))
    with pytest.raises(ModelError, match=r"unknown domains: com.acme::Attention2"):
        read_onnx(saved(model))


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256)) * 9])
def test_other_files(tmp_path, content):
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.onnx: is not an ONNX model"):
        read_onnx(file)
    with pytest.raises(ModelError, match="cannot read"):
        read_onnx(tmp_path / "none.onnx")


def test_external_data_that_is_not_there(saved, tmp_path):
    options = {"save_as_external_data": True, "location": "data.bin", "size_threshold": 0}
    path = saved(make(), **options)
    data = tmp_path / "data.bin"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"data\.bin: truncated: w ends behind it"):
        read_onnx(path)
    data.unlink()
    with pytest.raises(ModelError, match=r"w is in data\.bin, which is missing"):
        read_onnx(path)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../data.bin"
    path.write_bytes(model.SerializeToString())
    (tmp_path.parent / "data.bin").write_bytes(bytes(256))
    with pytest.raises(ModelError, match="not inside of the model's folder"):
        read_onnx(path)


def test_models_without_experts_say_what_was_looked_for(saved):
    with pytest.raises(ModelError, match=r"looked for .*MoE and QMoE nodes.*TopK.*of 1 nodes: MatMul"):
        import_onnx(saved(make()))


def qmoe(**attributes):
    inputs = ["x", "w", "c", "s", "", "c", "s"]
    weights = {
        "w": ONES,
        "c": np.zeros((8, 8, 4), np.uint8),
        "s": np.ones((8, 8), np.float32),
    }
    options = {"k": 2, "activation_type": "silu", **attributes}
    node = helper.make_node("QMoE", inputs, ["y"], domain="com.microsoft", name="layer", **options)
    return make([node], weights)


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"activation_type": "identity"}, "plain activation identity"),
        ({"activation_type": "swiglu"}, "swiglu_fusion 0 of 8 rows"),
        ({"activation_type": "swiglu", "swiglu_fusion": 1, "activation_beta": 0.5}, "beta 0.5"),
        ({"use_sparse_mixer": 1}, "use_sparse_mixer"),
        ({"quant_type": "fp8"}, "quant_type fp8"),
        ({"expert_weight_bits": 5}, "5 bits in uint8"),
        ({"block_size": 3}, "blocks of 3"),
        ({"block_size": 4}, "blocks of 4"),
        ({"k": 9}, "takes 9 of 8 experts"),
    ],
)
def test_experts_moqc_does_not_compute(saved, attributes, says):
    with pytest.raises(ModelError, match=rf"QMoE node layer: .*{says}"):
        import_onnx(saved(qmoe(**attributes)))


def test_weights_that_are_computed(saved):
    model = qmoe()
    model.graph.node.insert(0, helper.make_node("Identity", ["c"], ["d"]))
    model.graph.node[1].input[2] = "d"
    with pytest.raises(ModelError, match="d is computed, not stored"):
        import_onnx(saved(model))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_unpack_low_bits_first(bits):
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, 16)).astype(np.uint8)
    packed = np.zeros((3, 16 * bits // 8), np.uint8)
    for index in range(16):
        packed[:, index * bits // 8] |= codes[:, index] << (index * bits % 8)
    assert np.array_equal(unpack_codes(packed, bits), codes)
