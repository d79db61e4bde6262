"""MLPs of every expert's own: for masked tokens, for tokens gathered and scattered, behind If."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import moqc
from moqc.errors import ModelError
from moqc.frontend.onnx.importer import import_onnx

EXPERTS, HIDDEN, INTER, TOP = 4, 32, 48, 2
STYLES = ("masked", "scattered", "if")


def random(*shape, seed, scale=0.2):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def nodes_of(steps):
    return [
        helper.make_node(kind, ins, outs, **(more[0] if more else {})) for kind, ins, outs, *more in steps
    ]


ROUTER = [
    ("MatMul", ["x", "router"], ["scores"]),
    ("Softmax", ["scores"], ["shares"]),
    ("TopK", ["shares", "top"], ["chosen", "ids"]),
    ("ReduceSum", ["chosen", "last"], ["total"]),
    ("Div", ["chosen", "total"], ["weights"]),
    ("Sub", ["x", "x"], ["sum"]),
]


def mlp(e, x, limit=False):
    """Expert `e` on the tensor `x`; the result is y{e}."""
    cut = [("Min", [f"g{e}", "fifty"], [f"c{e}"])] if limit else [("Identity", [f"g{e}"], [f"c{e}"])]
    return [
        ("MatMul", [x, f"gate{e}"], [f"g{e}"]),
        *cut,
        ("Transpose", [f"up{e}"], [f"turned{e}"]),
        ("MatMul", [x, f"turned{e}"], [f"u{e}"]),
        ("Sigmoid", [f"c{e}"], [f"s{e}"]),
        ("Mul", [f"c{e}", f"s{e}"], [f"a{e}"]),
        ("Mul", [f"a{e}", f"u{e}"], [f"m{e}"]),
        ("MatMul", [f"m{e}", f"down{e}"], [f"d{e}"]),
        ("Add", [f"d{e}", f"bias{e}"], [f"y{e}"]),
    ]


def masked(e, before, after, limit=False):
    """All tokens, with the weight that each gives the expert."""
    return [
        ("Equal", ["ids", f"n{e}"], [f"hit{e}"]),
        ("Where", [f"hit{e}", "weights", "zero"], [f"w{e}"]),
        ("ReduceSum", [f"w{e}", "last"], [f"t{e}"]),
        *mlp(e, "x", limit),
        ("Mul", [f"y{e}", f"t{e}"], [f"z{e}"]),
        ("Add", [before, f"z{e}"], [after]),
    ]


def scattered(e, before, after, _limit=False):
    """The tokens that chose the expert, added to where they came from."""
    return [
        ("Equal", ["ids", f"n{e}"], [f"hit{e}"]),
        ("NonZero", [f"hit{e}"], [f"at{e}"]),
        ("Transpose", [f"at{e}"], [f"pairs{e}"], {"perm": [1, 0]}),
        ("Gather", [f"pairs{e}", "zeroth"], [f"rows{e}"], {"axis": 1}),
        ("GatherND", ["x", f"rows{e}"], [f"x{e}"]),
        *mlp(e, f"x{e}"),
        ("GatherND", ["weights", f"pairs{e}"], [f"w{e}"]),
        ("Unsqueeze", [f"w{e}", "last"], [f"t{e}"]),
        ("Mul", [f"y{e}", f"t{e}"], [f"z{e}"]),
        ("ScatterND", [before, f"rows{e}", f"z{e}"], [after], {"reduction": "add"}),
    ]


def behind_if(e, before, after, _limit=False):
    """The same for experts that were chosen at all."""
    value = [helper.make_tensor_value_info("result", TensorProto.FLOAT, None)]
    then = helper.make_graph(nodes_of(scattered(e, before, "result")), "then", [], value)
    other = helper.make_graph(nodes_of([("Identity", [before], ["result"])]), "else", [], value)
    return [
        ("Equal", ["ids", f"n{e}"], [f"is{e}"]),
        ("Cast", [f"is{e}"], [f"ones{e}"], {"to": TensorProto.FLOAT}),
        ("ReduceMax", [f"ones{e}"], [f"most{e}"], {"keepdims": 0}),
        ("Cast", [f"most{e}"], [f"any{e}"], {"to": TensorProto.BOOL}),
        ("If", [f"any{e}"], [after], {"then_branch": then, "else_branch": other}),
    ]


def block(style, order=range(EXPERTS), limit=False):
    """A router and the experts one after the other; numbers are those of the weights."""
    write = {"masked": masked, "scattered": scattered, "if": behind_if}[style]
    steps, name = list(ROUTER), "sum"
    for e in order:
        steps += write(e, name, f"sum{e}", limit)
        name = f"sum{e}"
    return [*steps, ("Add", [name, "x"], ["y"])]


def table(loose=False):
    """The router's shares of all experts with those not chosen masked (or, `loose`, only made smaller)."""
    steps = [
        *ROUTER[:3],
        ("Mul", ["shares", "half" if loose else "zero"], ["base"]),
        ("ScatterElements", ["base", "ids", "chosen"], ["table"], {"axis": 1}),
        ("Sub", ["x", "x"], ["sum"]),
    ]
    name = "sum"
    for e in range(EXPERTS):
        steps += [
            ("Gather", ["table", f"n{e}"], [f"w{e}"], {"axis": 1}),
            ("Unsqueeze", [f"w{e}", "last"], [f"t{e}"]),
            *mlp(e, "x"),
            ("Mul", [f"y{e}", f"t{e}"], [f"z{e}"]),
            ("Add", [name, f"z{e}"], [f"sum{e}"]),
        ]
        name = f"sum{e}"
    return [*steps, ("Add", [name, "x"], ["y"])]


def arrays():
    own = {
        "router": random(HIDDEN, EXPERTS, seed=0, scale=1),
        "top": np.array([TOP]),
        "last": np.array([-1]),
        "zeroth": np.array([0]),
        "zero": np.zeros((), np.float32),
        "half": np.full((), 0.5, np.float32),
        "fifty": np.full((), 50, np.float32),
    }
    for e in range(EXPERTS):
        own |= {
            f"n{e}": np.array(e),
            f"gate{e}": random(HIDDEN, INTER, seed=4 * e + 1),
            f"up{e}": random(INTER, HIDDEN, seed=4 * e + 2),
            f"down{e}": random(INTER, HIDDEN, seed=4 * e + 3),
            f"bias{e}": random(HIDDEN, seed=4 * e + 4),
        }
    return own


@pytest.fixture
def saved(tmp_path):
    """``saved(steps)``: the path of a model file with x and y of the given shape."""

    def save(steps, shape=("tokens", HIDDEN)):
        used = {name for _, names, *_ in steps for name in names}
        stored = {name: array for name, array in arrays().items() if name in used or "If" in str(steps)}
        graph = helper.make_graph(
            nodes_of(steps),
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(array, name) for name, array in stored.items()],
        )
        opsets = [helper.make_opsetid("", 20)]
        path = tmp_path / "model.onnx"
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
        return path

    return save


def assert_recognized(path):
    """The block has the experts' matrices, in the order of their numbers."""
    (found,) = import_onnx(path).blocks.values()
    weights = arrays()
    assert (found.activation, found.inputs[:2]) == ("silu_glu", ("x", "ids"))
    for e in range(EXPERTS):
        np.testing.assert_array_equal(found.matrices["gate"][e].numpy(), weights[f"gate{e}"].T)
        np.testing.assert_array_equal(found.matrices["up"][e].numpy(), weights[f"up{e}"])
        np.testing.assert_array_equal(found.matrices["down"][e].numpy(), weights[f"down{e}"].T)
        np.testing.assert_array_equal(found.biases["down_bias"][e].numpy(), weights[f"bias{e}"])
    assert not found.biases["gate_bias"].any()


def assert_compiled_equals_onnxruntime(path, folder, shapes):
    moqc.compile(path, folder / "out", cache=folder / "cache", pipeline="legalize,schedule")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    graph = moqc.load_graph(folder / "out")
    name = session.get_inputs()[0].name
    for seed, shape in enumerate(shapes):
        x = random(*shape, seed=seed, scale=1)
        (expected,) = session.run(None, {name: x})
        (found,) = graph.run({name: x}).values()
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("style", STYLES)
def test_experts_one_after_the_other(saved, style):
    assert_recognized(saved(block(style)))


@pytest.mark.parametrize("style", STYLES)
def test_compiled_they_are_what_onnxruntime_computes(saved, tmp_path, style):
    assert_compiled_equals_onnxruntime(saved(block(style)), tmp_path, [(n, HIDDEN) for n in (1, 7, 33)])


def test_experts_in_another_order_get_their_numbers(saved):
    assert_recognized(saved(block("masked", order=(2, 0, 3, 1))))


def test_sizes_stored_in_the_graph(saved):
    assert_recognized(saved(block("masked"), shape=(6, HIDDEN)))


def test_batch_and_sequence(saved, tmp_path):
    path = saved(block("masked"), shape=("batch", "seq", HIDDEN))
    assert_recognized(path)
    assert_compiled_equals_onnxruntime(path, tmp_path, [(1, 5, HIDDEN), (3, 2, HIDDEN)])


def test_a_table_of_all_weights(saved, tmp_path):
    path = saved(table())
    assert_recognized(path)
    assert_compiled_equals_onnxruntime(path, tmp_path, [(n, HIDDEN) for n in (1, 7)])


LIKE_EXPERTS = "the indices ids of a TopK look like those of experts, but"


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (table(loose=True), f"{LIKE_EXPERTS} table, the weights of all experts, is not 0 for those"),
        (block("masked", limit=True), f"{LIKE_EXPERTS} what their block computes is no activation"),
        ([("Add", ["x", "x"], ["y"])], "no experts: .* did not find a TopK: there is none"),
        (
            [*ROUTER[:3], ("GatherElements", ["x", "ids"], ["y"], {"axis": 1})],
            "no experts: .* behind the TopK ids products with stored matrices",
        ),
    ],
)
def test_other_graphs_are_refused_with_what_was_missing(saved, steps, says):
    with pytest.raises(ModelError, match=says):
        import_onnx(saved(steps))
