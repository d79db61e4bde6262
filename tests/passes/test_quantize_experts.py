"""quantize-experts: bit classes, packed tensors, the rewritten module."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import tvm
from tvm import IRModule, relax

from moqc.calibrate.workspace import ParamStore
from moqc.errors import PipelineError, UserError
from moqc.ir.annotations import BITS, PARAMS
from moqc.ir.sites import weight_names
from moqc.ir.text import parse_module
from moqc.ir.verify import verify
from moqc.passes.base import PassContext
from moqc.passes.quantize_experts import (
    QuantizeExperts,
    bit_classes,
    check_plan,
    rewrite_experts,
    routing_table,
)
from moqc.quant.formats import Format
from moqc.quant.pack import Packed, unpack
from moqc.quant.rtn import quantize_rtn
from moqc.quant.tensor import Quantized

SITE = "mlp.experts"
PLAN = {
    SITE: {
        "gate": ["int3-g64", "int2-g64", "int3-g64"],
        "up": ["int4-g32-sym", "int4-g32-sym", "int4-g32-sym"],
        "down": ["int8-g64", "int1-g32", "int2-g64"],
    }
}


class Rounding:
    """A provider that rounds the checkpoint's weights as `plan` says."""

    def __init__(self, checkpoint, plan=PLAN) -> None:
        self.checkpoint, self.plan = checkpoint, plan

    def get(self, site: str, projection: str, expert: int) -> Quantized:
        matrix = self.checkpoint.load(f"{site}.{projection}")[expert]
        return quantize_rtn(matrix, Format.parse(self.plan[site][projection][expert]))


EXPECTED = """
batch = TypeVar("batch")
seq = TypeVar("seq")
@I.ir_module
class Module:
    I.module_attrs({"moqc.bits": {"mlp.experts": {
        "down": ["int8-g64", "int1-g32", "int2-g64"], "gate": ["int3-g64", "int2-g64", "int3-g64"],
        "up": ["int4-g32-sym", "int4-g32-sym", "int4-g32-sym"]}},
        "moqc.params": [
            "embed.weight", "router.weight", "q.weight", "q.bias",
            "mlp.experts.table",
            "mlp.experts.gate.0.codes", "mlp.experts.gate.0.scales", "mlp.experts.gate.0.zeros",
            "mlp.experts.gate.1.codes", "mlp.experts.gate.1.scales", "mlp.experts.gate.1.zeros",
            "mlp.experts.up.0.codes", "mlp.experts.up.0.scales",
            "mlp.experts.down.0.codes", "mlp.experts.down.0.scales", "mlp.experts.down.0.zeros",
            "mlp.experts.down.1.codes", "mlp.experts.down.1.scales", "mlp.experts.down.1.zeros",
            "mlp.experts.down.2.codes", "mlp.experts.down.2.scales", "mlp.experts.down.2.zeros",
            "mlp.experts.down_bias"],
        "moqc.schema": 1})
    @R.function
    def main(
        input_ids: R.Tensor((batch, seq), "int64"),
        positions: R.Tensor((batch, seq), "int64"),
        embed: R.Tensor((40, 64), "float32"),
        router: R.Tensor((3, 64), "float32"),
        q: R.Tensor((64, 64), "float32"),
        q_bias: R.Tensor((64,), "float32"),
        table: R.Tensor((3, 3, 2), "int32"),
        g0c: R.Tensor((1, 2, 2, 2, 64), "uint8"),
        g0s: R.Tensor((1, 2, 1, 16), "float16"),
        g0z: R.Tensor((1, 2, 1, 16), "uint8"),
        g1c: R.Tensor((2, 2, 2, 3, 64), "uint8"),
        g1s: R.Tensor((2, 2, 1, 16), "float16"),
        g1z: R.Tensor((2, 2, 1, 16), "uint8"),
        u0c: R.Tensor((3, 2, 2, 4, 64), "uint8"),
        u0s: R.Tensor((3, 2, 2, 16), "float16"),
        d0c: R.Tensor((1, 4, 1, 1, 64), "uint8"),
        d0s: R.Tensor((1, 4, 1, 16), "float16"),
        d0z: R.Tensor((1, 4, 1, 16), "uint8"),
        d1c: R.Tensor((1, 4, 1, 2, 64), "uint8"),
        d1s: R.Tensor((1, 4, 1, 16), "float16"),
        d1z: R.Tensor((1, 4, 1, 16), "uint8"),
        d2c: R.Tensor((1, 4, 1, 8, 64), "uint8"),
        d2s: R.Tensor((1, 4, 1, 16), "float16"),
        d2z: R.Tensor((1, 4, 1, 16), "uint8"),
        down_bias: R.Tensor((3, 64), "float32"),
    ):
        with R.dataflow():
            x = R.take(embed, input_ids, axis=0)
            flat = R.reshape(x, R.shape([batch * seq, 64]))
            router_t = R.permute_dims(router)
            scores = R.matmul(flat, router_t)
            probabilities = R.nn.softmax(scores)
            top = R.topk(probabilities, k=2, ret_type="both", dtype="int64")
            weights = top[0]
            ids = top[1]
            y = R.moqc.mixed_experts(
                flat, ids, weights, table,
                g0c, g0s, g0z, g1c, g1s, g1z, u0c, u0s,
                d0c, d0s, d0z, d1c, d1s, d1z, d2c, d2s, d2z, down_bias,
                site="mlp.experts", activation="silu_glu", activations="int8", intermediate=32,
                classes=["gate:int2-g64", "gate:int3-g64", "up:int4-g32-sym",
                         "down:int1-g32", "down:int2-g64", "down:int8-g64"],
                operands=["table", "gate.0.codes", "gate.0.scales", "gate.0.zeros",
                          "gate.1.codes", "gate.1.scales", "gate.1.zeros", "up.0.codes", "up.0.scales",
                          "down.0.codes", "down.0.scales", "down.0.zeros",
                          "down.1.codes", "down.1.scales", "down.1.zeros",
                          "down.2.codes", "down.2.scales", "down.2.zeros", "down_bias"])
            q_t = R.permute_dims(q)
            product = R.matmul(y, q_t)
            h = R.add(product, q_bias)
            embed_t = R.permute_dims(embed)
            logits = R.matmul(h, embed_t)
            R.output(logits)
        return logits
"""


def test_rewrites_to_mixed_experts(moe: IRModule, checkpoint, tmp_path) -> None:
    before = moe.script()
    result = rewrite_experts(BITS.put(moe, PLAN), Rounding(checkpoint), ParamStore(tmp_path), "int8")
    tvm.ir.assert_structural_equal(result, parse_module(EXPECTED), map_free_vars=True)
    verify(result)
    assert relax.analysis.well_formed(result) is None
    assert moe.script() == before


def test_every_new_parameter_is_in_the_store(moe: IRModule, checkpoint, tmp_path) -> None:
    store = ParamStore(tmp_path)
    result = rewrite_experts(BITS.put(moe, PLAN), Rounding(checkpoint), store, "float")
    types = {name: variable.ty for variable, name in weight_names(result).items()}
    packed = set(PARAMS.of(result)) - set(PARAMS.of(moe))
    assert set(store.names()) == packed
    for name in packed:
        array = store.get(name)
        assert array.shape == tuple(map(int, types[name].shape)), name
        assert str(array.dtype) == str(types[name].dtype), name


def test_table_and_classes_lead_to_every_expert(moe: IRModule, checkpoint, tmp_path) -> None:
    store, provider = ParamStore(tmp_path), Rounding(checkpoint)
    rewrite_experts(BITS.put(moe, PLAN), provider, store, "int8")
    table = store.get(f"{SITE}.table")
    for number, (projection, formats) in enumerate((p, PLAN[SITE][p]) for p in ("gate", "up", "down")):
        for expert, name in enumerate(formats):
            at, index = table[number, expert]
            parts = {part: f"{SITE}.{projection}.{at}.{part}" for part in ("codes", "scales", "zeros")}
            arrays = {
                part: np.array(store.get(path)[index]) if path in store else None
                for part, path in parts.items()
            }
            expected = provider.get(SITE, projection, expert)
            found = unpack(Packed(**arrays), Format.parse(name), *expected.shape)
            np.testing.assert_array_equal(found.dequantize(), expected.dequantize())


def test_classes_are_sorted_and_stable() -> None:
    names = ["int4-g64-sym", "int3-g64", "int4-g64", "int3-g64", "int4-g32"]
    classes = bit_classes(names)
    assert {str(format): experts for format, experts in classes.items()} == {
        "int3-g64": [1, 3],
        "int4-g32": [4],
        "int4-g64": [2],
        "int4-g64-sym": [0],
    }
    assert [str(format) for format in classes] == sorted(set(names), key=Format.parse)
    table = routing_table({"up": classes}, 5)
    assert table[1].tolist() == [[3, 0], [0, 0], [2, 0], [0, 1], [1, 0]]
    assert not table[[0, 2]].any()


def test_a_block_without_gate(moe_text: str, checkpoint, tmp_path) -> None:
    text = (
        moe_text.replace("gate, up, down, down_bias,", "up, down,")
        .replace(
            'activation="silu_glu", operands=["gate", "up", "down", "down_bias"]',
            'activation="relu2", operands=["up", "down"]',
        )
        .replace('"mlp.experts.gate", ', "")
        .replace(', "mlp.experts.down_bias"', "")
        .replace('        gate: R.Tensor((3, 32, 64), "float32"),\n', "")
        .replace('        down_bias: R.Tensor((3, 64), "float32"),\n', "")
    )
    plan = {SITE: {name: PLAN[SITE][name] for name in ("up", "down")}}
    result = rewrite_experts(
        BITS.put(parse_module(text), plan), Rounding(checkpoint), ParamStore(tmp_path), "float"
    )
    verify(result)
    assert PARAMS.of(result)[4:7] == [f"{SITE}.table", f"{SITE}.up.0.codes", f"{SITE}.up.0.scales"]


def test_leaves_a_module_without_experts_alone(moe: IRModule, checkpoint, tmp_path) -> None:
    ctx = PassContext(checkpoint=checkpoint, workspace=object(), params=ParamStore(tmp_path))
    done = rewrite_experts(BITS.put(moe, PLAN), Rounding(checkpoint), ParamStore(tmp_path), "int8")
    tvm.ir.assert_structural_equal(QuantizeExperts()(done, ctx), done)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, r"moqc\.bits has no entry for mlp\.experts"),
        (
            {SITE: {"up": ["int2-g64"] * 3, "down": ["int2-g64"] * 3}},
            "its projections gate, up, down need 3 each",
        ),
        ({SITE: PLAN[SITE] | {"up": ["int2-g64"]}}, "'up': 1.* need 3 each"),
    ],
)
def test_refuses_a_plan_that_does_not_fit(moe: IRModule, plan, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        check_plan(BITS.put(moe, plan))


def test_refuses_a_mode_of_activations_there_is_not() -> None:
    with pytest.raises(PipelineError, match="activations=int4 is not one of float, int8"):
        QuantizeExperts(activations="int4").check()


def test_refuses_computed_weights(moe_text: str) -> None:
    text = moe_text.replace(
        "            y = R.moqc", "            twice = R.add(up, up)\n            y = R.moqc"
    )
    text = text.replace("gate, up, down, down_bias,", "gate, twice, down, down_bias,", 1)
    with pytest.raises(PipelineError, match=r"mlp\.experts: up is computed, not a weight"):
        check_plan(BITS.put(parse_module(text), PLAN))


def test_refuses_a_provider_that_ignores_the_plan(moe: IRModule, checkpoint, tmp_path) -> None:
    other = {SITE: dict.fromkeys(PLAN[SITE], ["int8-g32"] * 3)}
    with pytest.raises(
        PipelineError, match=r"expert 1 of gate was quantized to int8-g32 .*moqc\.bits says int2-g64"
    ):
        rewrite_experts(BITS.put(moe, PLAN), Rounding(checkpoint, other), ParamStore(tmp_path), "int8")


def test_refuses_scales_beyond_what_kernels_take(moe: IRModule, checkpoint, tmp_path) -> None:
    class Wide(Rounding):
        def get(self, site: str, projection: str, expert: int) -> Quantized:
            matrix = super().get(site, projection, expert)
            return replace(matrix, scales=torch.full_like(matrix.scales, 1.5))

    message = r"expert 1 of gate has a scale of 1\.5 as int2-g64, .* below 1: give it more bits"
    with pytest.raises(UserError, match=message):
        rewrite_experts(BITS.put(moe, PLAN), Wide(checkpoint), ParamStore(tmp_path), "float", "mma16x256")


def test_needs_a_checkpoint(moe: IRModule) -> None:
    with pytest.raises(PipelineError, match="quantize-experts needs a checkpoint"):
        QuantizeExperts()(BITS.put(moe, PLAN), PassContext())


def test_refuses_a_quantizer_that_only_simulates() -> None:
    with pytest.raises(PipelineError, match="quantizer=mcmoe is not one of rtn, hqq, awq, gptq"):
        QuantizeExperts(quantizer="mcmoe").check()
