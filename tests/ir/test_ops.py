"""Operators: what they infer, what they print, and that the text parses back."""

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax, tirx

from moqc.errors import InternalError, MoqcError, UserError, VerifyError
from moqc.frontend.skeleton import first_line
from moqc.ir import ops
from moqc.ir.packed import packed_types
from moqc.ir.text import parse_module, print_module
from moqc.quant.formats import Format

TOKENS, BATCH, SEQ = (tirx.Var(name, "int64") for name in ("tokens", "batch", "seq"))


def var(name: str, shape: list, dtype: str = "float32") -> relax.Var:
    return relax.Var(name, relax.TensorType(shape, dtype))


def packed(format: str, rows: int, columns: int, prefix: str = "", matrices=()) -> dict[str, relax.Var]:
    types = packed_types(Format.parse(format), rows, columns, matrices)
    return {prefix + part: relax.Var((prefix + part).replace(".", "_"), ty) for part, ty in types.items()}


def routed(hidden: int) -> list[relax.Var]:
    shapes = [
        ("x", [TOKENS, hidden], "float32"),
        ("ids", [TOKENS, 2], "int64"),
        ("weights", [TOKENS, 2], "float32"),
    ]
    return [var(*shape) for shape in shapes]


def an_experts() -> relax.Call:
    weights = [var("up", [3, 32, 64]), var("down", [3, 64, 32]), var("up_bias", [3, 32])]
    names = ["up", "down", "up_bias"]
    return ops.experts(*routed(64), *weights, site="a.experts", activation="relu2", operands=names)


def a_mixed() -> relax.Call:
    operands = {"table": var("table", [3, 3, 2], "int32")}
    operands |= packed("int3-g32", 32, 64, "up.0.", (1,)) | packed("int4-g64-sym", 32, 64, "up.1.", (2,))
    operands |= packed("int1-g64", 64, 32, "down.0.", (3,)) | {"down_bias": var("down_bias", [3, 64])}
    return ops.mixed_experts(
        *routed(64),
        *operands.values(),
        site="a.experts",
        activation="silu",
        activations="int8",
        operands=list(operands),
        classes=["up:int3-g32", "up:int4-g64-sym", "down:int1-g64"],
        intermediate=32,
    )


def a_linear() -> relax.Call:
    operands = {**packed("int8-g64", 48, 64), "bias": var("bias", [48])}
    x = var("x", [BATCH, SEQ, 64])
    attrs = {"site": "a.q", "format": "int8-g64", "rows": 48, "activations": "float"}
    return ops.linear(x, *operands.values(), **attrs, operands=list(operands))


def an_embedding() -> relax.Call:
    operands = packed("int4-g32-sym", 40, 64)
    ids = var("ids", [BATCH, SEQ], "int64")
    attrs = {"site": "embed", "format": "int4-g32-sym", "columns": 64}
    return ops.embedding(ids, *operands.values(), **attrs, operands=list(operands))


ATTENTION = {"site": "a.attention", "scale": "0.125", "window": 128, "softcap": "0.0", "causal": 1}


def queries() -> list[relax.Var]:
    q, k, v = var("q", [BATCH, 4, SEQ, 16]), var("k", [BATCH, 2, SEQ, 16]), var("v", [BATCH, 2, SEQ, 8])
    return [q, k, v, var("positions", [BATCH, SEQ], "int64")]


def an_attention() -> relax.Call:
    return ops.attention(*queries(), var("sinks", [4]), **ATTENTION, operands=["sinks"])


def a_cached_attention() -> relax.Call:
    caches = var("k_cache", [2, 2, 96, 16]), var("v_cache", [2, 2, 96, 8])
    return ops.cached_attention(*queries(), *caches, **ATTENTION, operands=[])


CASES = {
    "experts": (an_experts, 'R.Tensor((tokens, 64), dtype="float32")'),
    "mixed_experts": (a_mixed, 'R.Tensor((tokens, 64), dtype="float32")'),
    "linear": (a_linear, 'R.Tensor((batch, seq, 48), dtype="float32")'),
    "embedding": (an_embedding, 'R.Tensor((batch, seq, 64), dtype="float32")'),
    "attention": (an_attention, 'R.Tensor((batch, seq, 4, 8), dtype="float32")'),
    "cached_attention": (
        a_cached_attention,
        'R.Tuple(R.Tensor((batch, seq, 4, 8), dtype="float32"), R.Tensor((2, 2, 96, 16), dtype="float32"), '
        'R.Tensor((2, 2, 96, 8), dtype="float32"))',
    ),
}


def module_of(call: relax.Call) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    with builder.function("main", list(call.args)):
        with builder.dataflow():
            out = builder.emit_output(builder.emit(call))
        builder.emit_func_output(out)
    return builder.get()


@pytest.mark.parametrize("name", CASES)
def test_infers_and_round_trips(name: str) -> None:
    build, expected = CASES[name]
    mod = module_of(build())
    text = print_module(mod)
    assert f"lv: {expected} = R.moqc.{name}(" in text
    tvm.ir.assert_structural_equal(parse_module(text), mod)


@pytest.mark.parametrize(
    "transform",
    [
        relax.transform.Normalize(),
        relax.transform.CanonicalizeBindings(),
        relax.transform.EliminateCommonSubexpr(),
        relax.transform.FoldConstant(),
        relax.transform.ToNonDataflow(),
    ],
    ids=lambda transform: transform.info.name,
)
def test_attributes_survive_tvms_passes(transform: tvm.transform.Pass) -> None:
    before = ops.attributes(a_mixed())
    values = [
        value for block in transform(module_of(a_mixed()))["main"].body.blocks for value in block.bindings
    ]
    after = [ops.attributes(item.value) for item in values if ops.is_call(item.value, ops.MIXED_EXPERTS)]
    assert after == [before]
    assert before["classes"] == ["up:int3-g32", "up:int4-g64-sym", "down:int1-g64"]
    assert before["intermediate"] == 32


def test_an_unused_call_is_dead_code() -> None:
    call = an_experts()
    builder = relax.BlockBuilder()
    with builder.function("main", list(call.args)):
        with builder.dataflow():
            builder.emit(call)
            out = builder.emit_output(relax.op.negative(call.args[0]))
        builder.emit_func_output(out)
    assert "moqc" not in relax.transform.DeadCodeElimination()(builder.get()).script()


def test_operands_by_name() -> None:
    call = a_mixed()
    assert list(ops.operands(call))[:4] == ["x", "ids", "weights", "table"]
    assert ops.operand(call, "up.1.scales").name == "up_1_scales"
    assert ops.bit_classes(call) == {
        "up": (Format(3, 32), Format(4, 64, True)),
        "down": (Format(1, 64),),
    }
    with pytest.raises(
        VerifyError, match=r"R\.moqc\.mixed_experts of a\.experts has no operand 'gate'; it has x, ids"
    ):
        ops.operand(call, "gate")


def test_misuse_is_refused_when_the_call_is_built() -> None:
    x, ids, weights = routed(64)
    call = ops.experts(x, ids, weights, weights, site="s", activation="relu2", operands=["up", "down"])
    with pytest.raises(VerifyError, match=r"R\.moqc\.experts of s: 4 arguments, but they are named"):
        relax.BlockBuilder().normalize(call)
    flat = var("flat", [64])
    call = ops.experts(flat, ids, weights, site="s", activation="relu2", operands=[])
    with pytest.raises(VerifyError, match="x has 1 dimensions, expected 2"):
        relax.BlockBuilder().normalize(call)


def test_constants_round_trip() -> None:
    x = var("x", [TOKENS, 4])
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.add(x, relax.const(np.linspace(0, 1, 4, dtype="float32"))))
        builder.emit_func_output(out)
    mod = builder.get()
    tvm.ir.assert_structural_equal(parse_module(print_module(mod)), mod)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x =", "t.py is not an IR module: invalid syntax"),
        ("import os", "t.py is not an IR module"),
        ("@R.function\ndef main(x: R.Tensor((4,), 'float32')):\n    return x\n", "holds a single function"),
        ("@I.ir_module\nclass Module:\n    I.module_attrs({'moqc.schema': 7})\n", "annotations of schema 7"),
    ],
)
def test_text_that_is_no_module(text: str, message: str, capfd) -> None:
    with pytest.raises(UserError, match=message):
        parse_module(text, "t.py")


def test_errors_of_moqc_and_of_tvm_keep_apart():
    """Both have an InternalError; each comes back out of a function of TVM as itself."""

    def fail(error):
        def raising():
            raise error("why")

        return tvm_ffi.convert(raising)

    with pytest.raises(InternalError, match="why"):
        fail(InternalError)()
    with pytest.raises(tvm.error.InternalError, match="why") as caught:
        fail(tvm.error.InternalError)()
    assert not isinstance(caught.value, MoqcError)
    assert first_line(caught.value) == "TVM's InternalError: why"
