from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moqc.calibrate.experts import ExpertWeights
from moqc.calibrate.forward import reference_forward
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.quantize import QUANTIZERS, quantize_experts
from moqc.calibrate.statistics import collect_statistics, shrink
from moqc.calibrate.store import ExpertStore
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace
from moqc.errors import InternalError, PipelineError
from moqc.frontend.checkpoint import Checkpoint
from moqc.quant.formats import Format
from moqc.quant.gptq import quantize_gptq
from moqc.quant.hadamard import rotate
from moqc.quant.mcmoe import quantize_mcmoe
from moqc.quant.quantizers import STORABLE
from moqc.quant.reference import experts
from moqc.quant.rtn import quantize_rtn
from moqc.quant.versions import QUANTIZER_VERSIONS

MIXED = ["int2-g32", "int4-g32", "int2-g32", "int3-g32-sym", "int2-g32", "int8-g32", "int1-g32", "int4-g32"]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "cache")


def plan_for(checkpoint: Checkpoint, formats: list[str]) -> dict[str, dict[str, list[str]]]:
    return {layout.site: dict.fromkeys(layout.projections, formats) for layout in checkpoint.layouts}


def dense_block(checkpoint: Checkpoint, store: ExpertStore, site: str) -> ExpertWeights:
    block = LayeredModel(checkpoint).experts(site)
    return block.substitute(**{name: store.dense(site, name) for name in block.projections})


def turned_back(checkpoint: Checkpoint, store: ExpertStore, site: str) -> ExpertWeights:
    """A dense block of a rotated store, for inputs of down that are not."""
    block = dense_block(checkpoint, store, site)
    return block.substitute(down=rotate(block.down))


def put_into(model: Any, checkpoint: Checkpoint, store: ExpertStore, sites: list[str]) -> None:
    """Write dequantized experts into a transformers qwen3_moe model."""
    for site in sites:
        dense = turned_back if store.rotated else dense_block
        module, block = model.get_submodule(site), dense(checkpoint, store, site)
        module.gate_up_proj.data = torch.cat([block.gate, block.up], dim=1)
        module.down_proj.data = block.down


def test_rtn_is_every_matrix_on_its_own(small: Any, workspace: Workspace) -> None:
    checkpoint = small().checkpoint
    store = quantize_experts(checkpoint, plan_for(checkpoint, MIXED), "rtn", None, workspace)
    site, total = store.sites[1], 0
    block = LayeredModel(checkpoint).experts(site)
    for name in block.projections:
        dense = store.dense(site, name)
        for expert, chosen in enumerate(MIXED):
            expected = quantize_rtn(block.matrices(name)[expert], Format.parse(chosen))
            found = store.get(site, name, expert)
            assert found.format == expected.format
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.scales, expected.scales)
            assert torch.equal(dense[expert], expected.dequantize())
            total += expected.stored_bits
    assert store.stored_bits() == 2 * total  # two layers of the same shapes and formats


def test_gptq_works_on_what_the_quantized_layers_before_produce(
    small: Any, calibration: CalibrationSet, tokens: Tensor, workspace: Workspace
) -> None:
    """The second layer again, by hand, with transformers running the quantized first layer."""
    original = small()
    checkpoint, site = original.checkpoint, "model.layers.1.mlp.experts"
    plan = plan_for(checkpoint, ["int2-g32"] * 8)
    store = quantize_experts(checkpoint, plan, "gptq", calibration, workspace)
    block = LayeredModel(checkpoint).experts(site)
    put_into(original.model, checkpoint, store, ["model.layers.0.mlp.experts"])
    x, ids, weights = original.expert_inputs(tokens)[site]

    def hessians(rows_of: Any, columns: int) -> Tensor:
        moments, counts = torch.zeros(8, columns, columns), torch.bincount(ids.flatten(), minlength=8)
        for expert in range(8):
            routed, slot = torch.nonzero(ids == expert, as_tuple=True)
            rows = rows_of(expert, x[routed]) * weights[routed, slot, None]
            moments[expert] = rows.T @ rows
        return shrink(moments, counts).matrices

    fmt = Format.parse("int2-g32")
    of_input = hessians(lambda _, rows: rows, 32)
    quantized = {
        name: quantize_gptq(block.matrices(name), of_input, fmt)[0].dequantize() for name in ("gate", "up")
    }
    of_hidden = hessians(block.substitute(**quantized).hidden, 16)
    quantized["down"] = quantize_gptq(block.down, of_hidden, fmt)[0].dequantize()
    for name, expected in quantized.items():
        # Rounding may flip a code that lies halfway; a wrong Hessian changes far more than 1 % of them.
        same = torch.isclose(store.dense(site, name), expected, rtol=1e-2, atol=1e-4).float().mean()
        assert float(same) > 0.98, name


def test_gptq_leaves_the_least_output_error(
    small: Any, calibration: CalibrationSet, tokens: Tensor, workspace: Workspace
) -> None:
    original = small()
    checkpoint, site = original.checkpoint, "model.layers.0.mlp.experts"
    x, ids, weights = original.expert_inputs(tokens)[site]
    exact = LayeredModel(checkpoint).experts(site).apply(x, ids, weights)
    errors = {}
    for quantizer, fmt in [(name, "int2-g32") for name in STORABLE] + [("gptq", "tcq2-g32")]:
        plan = plan_for(checkpoint, [fmt] * 8)
        text = None if STORABLE[quantizer].data_free else calibration
        store = quantize_experts(checkpoint, plan, quantizer, text, workspace)
        found = dense_block(checkpoint, store, site).apply(x, ids, weights)
        errors[quantizer, fmt] = float((found - exact).norm())
        assert store.get(site, "up", 3).format == Format.parse(fmt)
    best = errors["gptq", "int2-g32"]
    assert best < 0.8 * errors["rtn", "int2-g32"]
    assert best < 0.8 * min(errors["hqq", "int2-g32"], errors["awq", "int2-g32"])
    assert errors["gptq", "tcq2-g32"] < best  # with 2.25 bits a weight against 2.75


@pytest.mark.parametrize("rotated", [False, True])
def test_reference_forward_runs_the_quantized_model(
    small: Any, tokens: Tensor, workspace: Workspace, rotated: bool
) -> None:
    original = small(moe_intermediate_size=40)
    checkpoint = original.checkpoint
    store = quantize_experts(checkpoint, plan_for(checkpoint, MIXED), "rtn", None, workspace, rotate=rotated)
    found = torch.cat(list(reference_forward(checkpoint, tokens, store)))
    unquantized = torch.cat(list(reference_forward(checkpoint, tokens)))
    torch.testing.assert_close(unquantized, original.logits(tokens), rtol=1e-5, atol=1e-4)
    put_into(original.model, checkpoint, store, store.sites)
    expected = original.logits(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert float((expected - unquantized).abs().max()) > 0.1


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_rotated_is_down_alone_and_kept_apart(
    small: Any, calibration: CalibrationSet, tokens: Tensor, workspace: Workspace, quantizer: str
) -> None:
    """Quantized is down R, under the moments of R h; one large channel is spread over its block by it."""
    original = small(moe_intermediate_size=64)
    module = original.model.get_submodule("model.layers.0.mlp.experts")
    module.down_proj.data[:, :, 5] *= 30
    original.model.save_pretrained(original.checkpoint.path)
    checkpoint, site = Checkpoint.open(original.checkpoint.path), "model.layers.0.mlp.experts"
    plan, text = plan_for(checkpoint, ["int3-g64"] * 8), None if quantizer == "rtn" else calibration
    plain, rotated = (
        quantize_experts(checkpoint, plan, quantizer, text, workspace, rotate=choice)
        for choice in (False, True)
    )
    assert set(plain.keys.values()).isdisjoint(rotated.keys.values())
    assert torch.equal(plain.dense(site, "gate"), rotated.dense(site, "gate"))
    x, ids, weights = original.expert_inputs(tokens)[site]
    exact = LayeredModel(checkpoint).experts(site).apply(x, ids, weights)
    errors = [
        float((block.apply(x, ids, weights) - exact).norm())
        for block in (dense_block(checkpoint, plain, site), turned_back(checkpoint, rotated, site))
    ]
    assert errors[1] < 0.9 * errors[0]
    if quantizer == "rtn":
        expected = quantize_rtn(rotate(LayeredModel(checkpoint).experts(site).down), Format.parse("int3-g64"))
        assert torch.equal(rotated.dense(site, "down"), expected.dequantize())


def test_int8_activations_are_modelled_where_weights_are_quantized(
    small: Any, tokens: Tensor, workspace: Workspace
) -> None:
    original = small()
    checkpoint = original.checkpoint
    store = quantize_experts(checkpoint, plan_for(checkpoint, ["int8-g32"] * 8), "rtn", None, workspace)
    name = "model.layers.0.self_attn.o_proj"
    linears = {name: quantize_rtn(checkpoint.load(f"{name}.weight").float(), Format.parse("int8-g32"))}
    found = torch.cat(list(reference_forward(checkpoint, tokens, store, activations="int8", linears=linears)))
    model = LayeredModel(
        checkpoint,
        override=lambda asked: linears[name].dequantize() if asked == f"{name}.weight" else None,
        activations="int8",
    )
    blocks = {site: dense_block(checkpoint, store, site) for site in store.sites}

    def int8_experts(call: Any) -> Tensor:
        block = blocks[call.site]
        return experts(
            call.x,
            call.ids,
            call.weights,
            block.gate,
            block.up,
            block.down,
            activation=block.activation,
            activations="int8",
        )

    [expected] = model.logits(model.forward([tokens], int8_experts))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    exact = torch.cat(list(reference_forward(checkpoint, tokens, store, linears=linears)))
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 0.2


def test_mcmoe_is_simulated(
    small: Any, calibration: CalibrationSet, tokens: Tensor, workspace: Workspace
) -> None:
    original = small()
    checkpoint = original.checkpoint
    formats = ["int1-g128", "int3-g128"] + ["int2-g128"] * 6
    store = quantize_experts(checkpoint, plan_for(checkpoint, formats), "mcmoe", calibration, workspace)
    site = store.sites[0]
    with pytest.raises(InternalError, match="not stored as codes"):
        store.get(site, "gate", 0)
    # 8 experts: gate and up [16, 32], down [32, 16]; codes and one group a row with 32 bits of scale and zero
    codes, rows = 3 * 512 * (1 + 3 + 6 * 2), 8 * (16 + 16 + 32)
    assert store.stored_bits() == 2 * (codes + 32 * rows)
    x, ids, _ = original.expert_inputs(tokens)[site]
    block = LayeredModel(checkpoint).experts(site)
    routed = x[(ids == 1).any(1)]
    expected, _ = quantize_mcmoe(block.up[1:2], (routed.T @ routed)[None], 3)
    same = torch.isclose(store.dense(site, "up")[1], expected[0], rtol=1e-3, atol=1e-5).float().mean()
    assert float(same) > 0.98


def test_results_are_cached_and_shared_by_plans_that_begin_alike(
    small: Any, calibration: CalibrationSet, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = small().checkpoint
    first, second = (layout.site for layout in checkpoint.layouts)
    plan = plan_for(checkpoint, ["int2-g32"] * 8)
    store = quantize_experts(checkpoint, plan, "gptq", calibration, workspace)
    other = {**plan, second: dict.fromkeys(plan[second], ["int4-g32"] * 8)}
    changed = quantize_experts(checkpoint, other, "gptq", calibration, workspace)
    assert changed.keys[first] == store.keys[first]
    assert changed.keys[second] != store.keys[second]
    assert changed.get(second, "up", 0).format.bits == 4
    monkeypatch.setattr(LayeredModel, "start", None)  # all there: nothing runs any more
    again = quantize_experts(checkpoint, other, "gptq", calibration, workspace)
    assert torch.equal(again.dense(second, "down"), changed.dense(second, "down"))


def test_results_of_another_version_of_the_quantizer_are_not_taken(
    small: Any, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(QUANTIZER_VERSIONS) == set(QUANTIZERS)
    checkpoint = small().checkpoint
    plan = plan_for(checkpoint, ["int2-g32"] * 8)
    before = quantize_experts(checkpoint, plan, "rtn", None, workspace).keys
    monkeypatch.setitem(QUANTIZER_VERSIONS, "rtn", 1000)
    after = quantize_experts(checkpoint, plan, "rtn", None, workspace).keys
    assert not set(before.values()) & set(after.values())


def test_a_changed_earlier_layer_changes_the_later_ones(
    small: Any, calibration: CalibrationSet, workspace: Workspace
) -> None:
    checkpoint = small().checkpoint
    first, second = (layout.site for layout in checkpoint.layouts)
    plan = plan_for(checkpoint, ["int2-g32"] * 8)
    other = {**plan, first: dict.fromkeys(plan[first], ["int1-g32"] * 8)}
    for quantizer, same in (("rtn", True), ("gptq", False)):
        stores = [quantize_experts(checkpoint, p, quantizer, calibration, workspace) for p in (plan, other)]
        assert (stores[0].keys[second] == stores[1].keys[second]) is same
        assert torch.equal(stores[0].dense(second, "up"), stores[1].dense(second, "up")) is same


def test_first_layer_gptq_agrees_with_the_statistics(
    small: Any, calibration: CalibrationSet, workspace: Workspace
) -> None:
    checkpoint = small().checkpoint
    store = quantize_experts(
        checkpoint, plan_for(checkpoint, ["int3-g32"] * 8), "gptq", calibration, workspace
    )
    site = store.sites[0]
    hessians = collect_statistics(checkpoint, calibration, workspace).of(site).hessians("gate").matrices
    block = LayeredModel(checkpoint).experts(site)
    expected = quantize_gptq(block.matrices("gate"), hessians, Format.parse("int3-g32"))[0]
    assert torch.equal(store.dense(site, "gate"), expected.dequantize())


@pytest.mark.parametrize(
    ("quantizer", "formats", "message"),
    [
        ("spqr", ["int2-g32"] * 8, "unknown quantizer 'spqr'"),
        ("gptq", ["int2-g32"] * 8, "needs calibration text"),
        ("rtn", ["int2-g32"] * 7, "7 formats for gate, the block 8 experts"),
    ],
)
def test_bad_requests(
    small: Any, workspace: Workspace, quantizer: str, formats: list[str], message: str
) -> None:
    checkpoint = small().checkpoint
    with pytest.raises(PipelineError, match=message):
        quantize_experts(checkpoint, plan_for(checkpoint, formats), quantizer, None, workspace)


def test_a_plan_for_another_model_is_refused(small: Any, workspace: Workspace) -> None:
    checkpoint = small().checkpoint
    plan = plan_for(checkpoint, ["int2-g32"] * 8)
    plan["model.layers.9.mlp.experts"] = plan.pop("model.layers.1.mlp.experts")
    with pytest.raises(PipelineError, match=r"differ in their experts blocks: model\.layers\.1"):
        quantize_experts(checkpoint, plan, "rtn", None, workspace)
