"""quantize-linears: linears, biases, the tied embedding table; what is left alone."""

import numpy as np
import pytest
import torch
import tvm
from tvm import IRModule, relax

from moqc.calibrate.workspace import ParamStore
from moqc.errors import PipelineError, UserError
from moqc.ir.annotations import LINEAR_BITS, PARAMS
from moqc.ir.text import parse_module
from moqc.ir.verify import verify
from moqc.passes import quantize_linears
from moqc.passes.base import PassContext
from moqc.passes.pipeline import Pipeline
from moqc.passes.quantize_linears import QuantizeLinears, quantize_by_rows
from moqc.quant.formats import Format
from moqc.quant.pack import Packed, pack, unpack
from moqc.quant.rtn import quantize_rtn

HEAD = """
batch = TypeVar("batch")
seq = TypeVar("seq")
@I.ir_module
class Module:
    I.module_attrs({
        "moqc.linear_bits": {"embed": "int4-g32", "q": "int8-g64-sym"},
        "moqc.params": [
            "embed.codes", "embed.scales", "embed.zeros", "router.weight", "q.codes", "q.scales", "q.bias",
            "mlp.experts.gate", "mlp.experts.up", "mlp.experts.down", "mlp.experts.down_bias"],
        "moqc.schema": 1})
    @R.function
    def main(
        input_ids: R.Tensor((batch, seq), "int64"),
        positions: R.Tensor((batch, seq), "int64"),
        embed_codes: R.Tensor((3, 2, 4, 64), "uint8"),
        embed_scales: R.Tensor((3, 2, 16), "float16"),
        embed_zeros: R.Tensor((3, 2, 16), "uint8"),
        router: R.Tensor((3, 64), "float32"),
        q_codes: R.Tensor((4, 2, 8, 64), "uint8"),
        q_scales: R.Tensor((4, 1, 16), "float16"),
        q_bias: R.Tensor((64,), "float32"),
        gate: R.Tensor((3, 32, 64), "float32"),
        up: R.Tensor((3, 32, 64), "float32"),
        down: R.Tensor((3, 64, 32), "float32"),
        down_bias: R.Tensor((3, 64), "float32"),
    ):
"""
EXPECTED = (
    HEAD
    + """
        with R.dataflow():
            x = R.moqc.embedding(
                input_ids, embed_codes, embed_scales, embed_zeros,
                site="embed", format="int4-g32", columns=64, operands=["codes", "scales", "zeros"])
            flat = R.reshape(x, R.shape([batch * seq, 64]))
            router_t = R.permute_dims(router)
            scores = R.matmul(flat, router_t)
            probabilities = R.nn.softmax(scores)
            top = R.topk(probabilities, k=2, ret_type="both", dtype="int64")
            weights = top[0]
            ids = top[1]
            y = R.moqc.experts(
                flat, ids, weights, gate, up, down, down_bias,
                site="mlp.experts", activation="silu_glu", operands=["gate", "up", "down", "down_bias"])
            h = R.moqc.linear(
                y, q_codes, q_scales, q_bias,
                site="q", format="int8-g64-sym", rows=64, activations="float",
                operands=["codes", "scales", "bias"])
            logits = R.moqc.linear(
                h, embed_codes, embed_scales, embed_zeros,
                site="embed", format="int4-g32", rows=40, activations="float",
                operands=["codes", "scales", "zeros"])
            R.output(logits)
        return logits
"""
)


@pytest.fixture
def ctx(checkpoint, tmp_path) -> PassContext:
    return PassContext(checkpoint=checkpoint, params=ParamStore(tmp_path))


def test_rewrites_linears_and_the_tied_table(moe: IRModule, ctx: PassContext) -> None:
    before = moe.script()
    pipeline = Pipeline.parse("quantize-linears{embeddings=int4-g32 activations=float}")
    result = pipeline.run(moe, ctx, verify_each=True)
    tvm.ir.assert_structural_equal(result, parse_module(EXPECTED), map_free_vars=True)
    assert relax.analysis.well_formed(result) is None
    assert moe.script() == before


def test_packed_weights_are_the_rounded_ones(moe: IRModule, ctx: PassContext) -> None:
    QuantizeLinears()(moe, ctx)
    assert ctx.params.names() == ["embed.codes", "embed.scales", "q.codes", "q.scales"]
    packed = Packed(*(np.array(ctx.params.get(f"embed.{part}")) for part in ("codes", "scales")), None)
    format = Format.parse("int8-g64-sym")
    expected = quantize_rtn(ctx.checkpoint.load("embed.weight").float(), format).dequantize()
    np.testing.assert_array_equal(unpack(packed, format, 40, 64).dequantize(), expected)


def test_is_idempotent(moe: IRModule, ctx: PassContext) -> None:
    once = QuantizeLinears()(moe, ctx)
    tvm.ir.assert_structural_equal(QuantizeLinears()(once, ctx), once)


def test_none_leaves_everything_alone(moe: IRModule) -> None:
    result = QuantizeLinears(linears="none", embeddings="none")(moe, PassContext())
    assert LINEAR_BITS.of(result) == {}
    tvm.ir.assert_structural_equal(LINEAR_BITS.drop(result), moe)


@pytest.mark.parametrize(
    ("options", "quantized"),
    [
        ({}, {"embed", "q"}),
        ({"embeddings": "none"}, {"q"}),
        ({"linears": "none"}, {"embed"}),
        ({"skip": "^emb"}, {"q"}),
        ({"skip": "q|embed"}, set()),
    ],
)
def test_what_is_left_alone(moe: IRModule, ctx: PassContext, options: dict, quantized: set[str]) -> None:
    """The router in any case: it decides which experts run."""
    result = QuantizeLinears(**options)(moe, ctx)
    verify(result)
    assert set(LINEAR_BITS.of(result)) == quantized
    assert "router.weight" in PARAMS.of(result)
    assert {f"{site}.weight" for site in quantized} == set(ctx.checkpoint.read)


def test_a_matrix_of_few_rows_is_left_alone(moe_text: str) -> None:
    """As of a shared expert's gate: padding it to 16 rows would make it larger."""
    text = moe_text
    for old, new in (
        ('"q.weight", ', '"q.weight", "shared.weight", '),
        ("        q_bias: R", '        shared: R.Tensor((1, 64), "float32"),\n        q_bias: R'),
        ("            q_t = R", "            s_t = R.permute_dims(shared)\n            q_t = R"),
        (
            "            product = R.matmul(y",
            "            z = R.matmul(y, s_t)\n            product = R.matmul(y * z",
        ),
    ):
        assert old in text
        text = text.replace(old, new)
    assert set(QuantizeLinears().plan(parse_module(text))) == {"embed", "q"}


def test_a_bias_whose_product_is_used_twice_stays_outside(moe_text: str, ctx: PassContext) -> None:
    text = moe_text.replace(
        "h = R.add(product, q_bias)",
        "biased = R.add(product, q_bias)\n            h = R.multiply(biased, product)",
    )
    result = QuantizeLinears()(parse_module(text), ctx)
    verify(result)
    script = result.script()
    assert "R.add(product, q_bias)" in script
    assert script.count("R.moqc.linear(y, q_codes, q_scales, activations") == 1


def test_quantizing_by_slices_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    format = Format.parse("int3-g32")
    whole = pack(quantize_rtn(weight, format))
    monkeypatch.setattr(quantize_linears, "SLICE", 16)
    sliced = quantize_by_rows(weight, format)
    for part in ("codes", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(sliced, part), getattr(whole, part))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"linears": "int9"}, UserError, "unknown format 'int9'"),
        ({"activations": "fp8"}, PipelineError, "activations=fp8 is not one of float, int8"),
        ({"skip": "("}, PipelineError, r"skip=\( is not a regular expression"),
    ],
)
def test_refuses_options(moe: IRModule, ctx: PassContext, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        QuantizeLinears(**options)(moe, ctx)
