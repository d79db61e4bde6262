from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moqc.calibrate import costs
from moqc.calibrate.costs import measure_block_errors, measure_costs, measure_sensitivity
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.statistics import collect_statistics
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace
from moqc.quant.formats import Format
from moqc.quant.gptq import quantize_gptq
from moqc.quant.mcmoe import mcmoe_rtn

FORMATS = [Format.parse("int1-g32"), Format.parse("int3-g32")]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "cache")


def only_expert(matrices: Tensor, expert: int, replacement: Tensor) -> Tensor:
    changed = matrices.clone()
    changed[expert] = replacement
    return changed


def total(costs: list[list[float]], calibration: CalibrationSet) -> list[float]:
    """Costs of each expert over all tokens, from those a token of each dataset."""
    sizes = [rows.size for rows in calibration.tokens]
    return [sum(c * n for c, n in zip(column, sizes, strict=True)) for column in zip(*costs, strict=True)]


@pytest.mark.parametrize(
    ("projection", "rotated"), [("gate", False), ("up", True), ("down", False), ("down", True)]
)
def test_cost_is_the_output_error_of_one_unit_alone(
    small: Any,
    calibration: CalibrationSet,
    tokens: Tensor,
    workspace: Workspace,
    projection: str,
    rotated: bool,
) -> None:
    model = small(moe_intermediate_size=40)
    statistics = collect_statistics(model.checkpoint, calibration, workspace)
    found = measure_costs(model.checkpoint, statistics, FORMATS, rotate=rotated)
    site = statistics.sites[1]
    x, ids, weights = model.expert_inputs(tokens)[site]
    block = LayeredModel(model.checkpoint).experts(site)
    exact = block.apply(x, ids, weights)
    block = block.rotated() if rotated else block
    hessians = statistics.of(site).hessians(projection, rotated=rotated).matrices
    for fmt in FORMATS:
        quantized = quantize_gptq(block.matrices(projection), hessians, fmt)[0].dequantize()
        for expert in (0, 5):
            matrices = only_expert(block.matrices(projection), expert, quantized[expert])
            changed = block.substitute(**{projection: matrices}).apply(x, ids, weights)
            expected = float((changed - exact).square().sum())
            # The samples hold every routed token of this small set, so nothing is estimated.
            costs = total(found[site][projection][str(fmt)]["datasets"], calibration)
            assert costs[expert] == pytest.approx(expected, rel=1e-2)
    coarse, fine = (total(found[site][projection][str(fmt)]["datasets"], calibration) for fmt in FORMATS)
    assert sum(coarse) > 2 * sum(fine)


def test_held_out_costs_are_errors_on_tokens_that_the_hessians_do_not_see(
    small: Any, calibration: CalibrationSet, workspace: Workspace
) -> None:
    checkpoint = small().checkpoint
    statistics = collect_statistics(checkpoint, calibration, workspace)
    found = measure_costs(checkpoint, statistics, FORMATS, held_out=True)
    seen = measure_costs(checkpoint, statistics, FORMATS)
    site = statistics.sites[1]
    measured, block = statistics.of(site), LayeredModel(checkpoint).experts(site)
    part = measured.sample.held_out()
    hessians = measured.hessians("up", without=(part, part.x)).matrices
    for fmt in FORMATS:
        up = quantize_gptq(block.up, hessians, fmt)[0].dequantize()
        change = block.substitute(up=up).output(slice(None), part.x) - block.output(slice(None), part.x)
        expected = part.totals(change.square().sum(2) * part.weights.square())
        costs = torch.tensor(found[site]["up"][str(fmt)]["datasets"], dtype=torch.float64)
        torch.testing.assert_close(costs, expected, rtol=1e-4, atol=1e-9)
        # What was fitted to tokens errs less on them.
        assert costs.sum() > torch.tensor(seen[site]["up"][str(fmt)]["datasets"]).sum()


def test_costs_are_cached_by_format(
    small: Any, calibration: CalibrationSet, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = small().checkpoint
    statistics = collect_statistics(checkpoint, calibration, workspace)
    first = measure_costs(checkpoint, statistics, FORMATS, quantizer="rtn")
    asked: list[Format] = []
    original = costs._site_costs
    monkeypatch.setattr(
        costs,
        "_site_costs",
        lambda w, m, s, formats, *rest: asked.extend(formats) or original(w, m, s, formats, *rest),
    )
    four = Format.parse("int4-g32")
    second = measure_costs(checkpoint, statistics, [*FORMATS, four], quantizer="rtn")
    assert asked == [four, four]  # once a site
    site = statistics.sites[0]
    assert {name: second[site]["up"][name] for name in first[site]["up"]} == first[site]["up"]


def test_block_errors_against_the_whole_block(
    small: Any, calibration: CalibrationSet, tokens: Tensor, workspace: Workspace
) -> None:
    model = small()
    found = measure_block_errors(model.checkpoint, calibration, workspace)
    site = "model.layers.0.mlp.experts"
    x, ids, weights = model.expert_inputs(tokens)[site]
    block = LayeredModel(model.checkpoint).experts(site)
    exact, split = block.apply(x, ids, weights), calibration.tokens[0].size
    for expert, bits in ((1, 1), (1, 3), (6, 2)):
        changes = {
            name: only_expert(block.matrices(name), expert, mcmoe_rtn(block.matrices(name)[expert], bits))
            for name in block.projections
        }
        difference = block.substitute(**changes).apply(x, ids, weights) - exact
        # Each dataset of this small set is one batch.
        expected = float(difference[:split].norm() + difference[split:].norm())
        assert found[site][expert][bits - 1] == pytest.approx(expected, rel=1e-3)


def test_sensitivity_against_noise_through_the_models_own_forward(
    small: Any, calibration: CalibrationSet, tokens: Tensor, workspace: Workspace
) -> None:
    """The same noise by hand. A token whose later routing flips carries most of the divergence, so only the
    very same noise gives the same number.
    """
    model = small()
    found = measure_sensitivity(model.checkpoint, calibration, workspace, tokens=10**6, noise=0.01, seed=3)
    exact = model.logits(tokens).log_softmax(-1)
    sizes = [array.size for array in calibration.tokens]
    for site, value in found.items():
        generator, squares = torch.Generator().manual_seed(3), []
        noise = torch.cat([torch.randn(size, 32, generator=generator) for size in sizes])

        def disturb(
            _module: Any, _args: Any, output: Tensor, noise: Tensor = noise, squares: list[float] = squares
        ) -> Tensor:
            scaled = noise * 0.01 * output.norm(dim=-1, keepdim=True) / 32**0.5
            squares.append(float(scaled.square().sum()))
            return output + scaled

        handle = model.model.get_submodule(site).register_forward_hook(disturb)
        disturbed = model.logits(tokens).log_softmax(-1)
        handle.remove()
        divergence = float((exact.exp() * (exact - disturbed)).sum())
        assert value == pytest.approx(divergence / squares[0], rel=2e-2)


def test_sensitivity_of_the_last_block_does_not_depend_on_the_noise(
    small: Any, calibration: CalibrationSet, workspace: Workspace
) -> None:
    """Divergence is quadratic in small errors where no router follows; routers make it discontinuous."""
    checkpoint = small().checkpoint
    last = checkpoint.layouts[-1].site
    found = [
        measure_sensitivity(checkpoint, calibration, workspace, noise=noise)[last]
        for noise in (0.04, 0.02, 0.01)
    ]
    assert found[0] > 0
    assert found[1:] == pytest.approx([found[0], found[0]], rel=0.1)
