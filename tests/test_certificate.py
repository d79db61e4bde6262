"""The numerics certificate on a toy module: what is measured, what is refused, what cannot be run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tvm import relax

from moqc import codegen, targets
from moqc.calibrate.workspace import ParamStore
from moqc.certificate import TOLERANCES, certify
from moqc.errors import InternalError
from moqc.ir import ops
from moqc.ir.annotations import BITS
from moqc.ir.text import parse_module
from moqc.package import from_torch
from moqc.passes.base import PassContext
from moqc.passes.legalize import LOWERINGS, Legalize
from moqc.passes.quantize_experts import rewrite_experts
from moqc.passes.quantize_linears import QuantizeLinears
from moqc.passes.schedule import Schedule
from moqc.quant.formats import Format
from moqc.quant.rtn import quantize_rtn
from moqc.schedules.cpu.lower import lower_linear
from moqc.targets import find_target
from moqc.tensorfile import StoredTensor

MOE = """
batch = TypeVar("batch")
seq = TypeVar("seq")
@I.ir_module
class Module:
    I.module_attrs({"moqc.params": [
        "embed.weight", "router.weight", "q.weight", "q.bias", "o.weight", "k.weight",
        "experts.gate", "experts.up", "experts.down", "experts.down_bias"], "moqc.schema": 1})
    @R.function
    def main(
        input_ids: R.Tensor((batch, seq), "int64"),
        positions: R.Tensor((batch, seq), "int64"),
        embed: R.Tensor((40, 64), "float32"),
        router: R.Tensor((3, 64), "float32"),
        q: R.Tensor((64, 64), "float32"),
        q_bias: R.Tensor((64,), "float32"),
        o: R.Tensor((64, 64), "float32"),
        k: R.Tensor((64, 64), "float32"),
        gate: R.Tensor((3, 40, 64), "float32"),
        up: R.Tensor((3, 40, 64), "float32"),
        down: R.Tensor((3, 64, 40), "float32"),
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
            y = R.moqc.experts(
                flat, ids, weights, gate, up, down, down_bias,
                site="experts", activation="silu_glu", operands=["gate", "up", "down", "down_bias"])
            q_t = R.permute_dims(q)
            product = R.matmul(y, q_t)
            h = R.add(product, q_bias)
            o_t = R.permute_dims(o)
            r = R.matmul(h, o_t)
            k_t = R.permute_dims(k)
            z = R.matmul(r, k_t)
            embed_t = R.permute_dims(embed)
            logits = R.matmul(z, embed_t)
            R.output(logits)
        return logits
"""

PLAN = {
    "gate": ["int1-g64", "int3-g64", "int3-g64"],
    "up": ["int2-g32", "int2-g32", "int4-g64-sym"],
    "down": ["int3-g32", "int8-g32-sym", "int3-g32"],
}
SHAPES = {
    "embed.weight": (40, 64), "q.weight": (64, 64), "q.bias": (64,), "o.weight": (64, 64),
    "k.weight": (64, 64), "experts.gate": (3, 40, 64),
    "experts.up": (3, 40, 64), "experts.down": (3, 64, 40),
    "experts.down_bias": (3, 64),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Weights:
    """Random weights: the checkpoint and the store of quantized experts at once."""

    tensors: dict[str, torch.Tensor]

    def load(self, name):
        return self.tensors[name]

    def get(self, site, projection, expert):
        matrix = self.tensors[f"{site}.{projection}"][expert]
        return quantize_rtn(matrix, Format.parse(PLAN[projection][expert]))


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    return Weights({name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()})


def lowered(weights, folder, activations):
    """The module with everything packed, after legalize and schedule, and its parameters."""
    params = ParamStore(folder)
    ctx = PassContext(target=find_target("native"), checkpoint=weights, params=params)
    mod = BITS.put(parse_module(MOE), {"experts": PLAN})
    mod = rewrite_experts(mod, weights, params, activations)
    mod = QuantizeLinears(linears="int4-g64", activations=activations)(mod, ctx)
    mod = Schedule()(Legalize()(mod, ctx), ctx)
    library = folder / "model.so"
    codegen.export(codegen.build(mod, ctx.target), library, ctx.target)

    def load(name):
        return StoredTensor.of(params.get(name)) if name in params else from_torch(weights.load(name))

    return library, mod, load


EXPERTS = (
    "experts gate:int1-g64 gate:int3-g64 up:int2-g32 up:int4-g64-sym down:int3-g32 down:int8-g32-sym "
    "top-2 40 rows of (n, 64) silu_glu down_bias"
)


@pytest.mark.parametrize("mode", ["float", "int8"])
def test_every_packed_kernel_is_measured_once(weights, tmp_path, mode):
    library, mod, load = lowered(weights, tmp_path, mode)
    found = certify(library, mod, find_target("native"), load)
    assert {name: record.site for name, record in found.items()} == {
        "embedding int8-g64-sym 64 columns of (n, n)": "embed",
        f"{EXPERTS} {mode}": "experts",
        f"linear int4-g64 64 rows of (n, 64) bias {mode}": "q",
        f"linear int4-g64 64 rows of (n, 64) {mode}": "o",  # and of k: the same code
        f"linear int8-g64-sym 40 rows of (n, 64) {mode}": "embed",
    }
    kernels = [
        dict(f.attrs["moqc.kernel"])["kind"] for f in mod.functions.values() if "moqc.kernel" in f.attrs
    ]
    assert kernels.count("linear") == 3  # the certificate runs the code of main, not a copy
    assert kernels.count("gate_up") == kernels.count("embedding") == 1
    for name, record in found.items():
        assert record.not_run is None
        tolerance = TOLERANCES["float" if name.startswith("embedding") else mode]
        assert 0 <= record.max_relative_error < tolerance / 10, name
        assert record.shapes == (((1, 1), (1, 5)) if name.startswith("embedding") else ((1, 64), (5, 64)))
    assert found[f"{EXPERTS} {mode}"].max_relative_error > 0


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_kernel_is_refused(weights, tmp_path, monkeypatch, factor):
    def wrong(builder, call, target):
        result = builder.emit(lower_linear(builder, call, target))
        return relax.op.multiply(result, relax.const(factor, "float32"))

    monkeypatch.setitem(LOWERINGS["cpu"].operators, ops.LINEAR, wrong)
    library, mod, load = lowered(weights, tmp_path, "float")
    with pytest.raises(InternalError, match=r"q: the compiled kernel 'linear int4-g64 .* relative error"):
        certify(library, mod, find_target("native"), load)


def test_a_host_without_the_instructions_says_so(weights, tmp_path, monkeypatch):
    library, mod, load = lowered(weights, tmp_path, "float")
    monkeypatch.setattr(targets, "host_features", lambda: find_target("x86-64-v3").features - {"fma"})
    found = certify(library, mod, find_target("x86-64-v3"), load)
    assert {record.not_run for record in found.values()} == {"host lacks fma"}
    assert {record.max_relative_error for record in found.values()} == {None}


def test_nothing_packed_is_nothing_certified(tmp_path):
    ctx = PassContext(target=find_target("native"))
    mod = Schedule()(Legalize()(parse_module(MOE), ctx), ctx)
    assert certify(tmp_path / "absent.so", mod, ctx.target, lambda name: pytest.fail(name)) == {}
