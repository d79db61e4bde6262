from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.statistics import PRIOR_PAIRS, SAMPLE, Sample, collect_statistics, shrink
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace
from moqc.quant import reference


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "cache")


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_against_a_plain_loop(
    small: Any, calibration: CalibrationSet, tokens: Tensor, workspace: Workspace, architecture: str
) -> None:
    """Counts, weights and moments, token by token in float64 from what hooks on the model saw."""
    model = small(architecture)
    statistics = collect_statistics(model.checkpoint, calibration, workspace)
    assert statistics.datasets == ("prose", "code")
    seen = model.expert_inputs(tokens)
    assert statistics.sites == list(seen)
    layered, first_dataset = LayeredModel(model.checkpoint), calibration.tokens[0].size
    for site, (x, ids, weights) in seen.items():
        found, block = statistics.of(site), layered.experts(site)
        pairs, mass = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.float64)
        inputs, hidden = torch.zeros(8, 32, 32).double(), torch.zeros(8, *2 * block.down.shape[2:]).double()
        for token in range(len(x)):
            for slot in range(ids.shape[1]):
                expert, gate = int(ids[token, slot]), weights[token, slot].double()
                dataset = int(token >= first_dataset)
                pairs[dataset, expert] += 1
                mass[dataset, expert] += gate
                row = x[token].double()
                inputs[expert] += gate**2 * torch.outer(row, row)
                middle = block.hidden(expert, x[token : token + 1])[0].double()
                hidden[expert] += gate**2 * torch.outer(middle, middle)
        assert found.tokens == len(x)
        assert torch.equal(found.pairs, pairs)
        torch.testing.assert_close(found.weight_mass, mass, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.input_moments.double(), inputs, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.hidden_moments.double(), hidden, rtol=1e-3, atol=1e-4)


def test_hidden_moments_give_the_exact_output_error(
    small: Any, calibration: CalibrationSet, tokens: Tensor, workspace: Workspace
) -> None:
    model = small()
    statistics = collect_statistics(model.checkpoint, calibration, workspace)
    site, expert = statistics.sites[0], 3
    x, ids, weights = model.expert_inputs(tokens)[site]
    block = LayeredModel(model.checkpoint).experts(site)
    error = torch.zeros_like(block.down)
    error[expert] = torch.randn(block.down.shape[1:], generator=torch.Generator().manual_seed(0))
    outputs = [
        reference.experts(x, ids, weights, block.gate, block.up, down, activation=block.activation)
        for down in (block.down, block.down + error)
    ]
    measured = (outputs[1] - outputs[0]).square().sum()
    moments = statistics.of(site).hidden_moments[expert]
    assert float(((error[expert] @ moments) * error[expert]).sum()) == pytest.approx(
        float(measured), rel=1e-3
    )


@pytest.mark.parametrize(("projection", "rotated"), [("up", False), ("down", True)])
def test_hessians_without_the_tokens_held_out(
    small: Any, calibration: CalibrationSet, workspace: Workspace, projection: str, rotated: bool
) -> None:
    """They are those of the other half of each expert's tokens, all of which are in this small sample."""
    model = small(moe_intermediate_size=40)
    statistics = collect_statistics(model.checkpoint, calibration, workspace)
    site = statistics.sites[0]
    found, block = statistics.of(site), LayeredModel(model.checkpoint).experts(site)
    block = block.rotated() if rotated else block
    sample, part = found.sample, found.sample.held_out()
    inputs = block.hidden(slice(None), sample.x) if projection == "down" else sample.x
    moments = torch.zeros(8, inputs.shape[2], inputs.shape[2])
    counts = found.counts.clone()
    for expert, count in enumerate(found.counts.tolist()):
        held = (count + 1) // 2
        assert int((part.weights[expert] != 0).sum()) == held
        counts[expert] -= held
        rows = inputs[expert, held:count] * sample.weights[expert, held:count].unsqueeze(1)
        moments[expert] = rows.T @ rows
    left = found.hessians(projection, rotated=rotated, without=(part, inputs)).matrices
    torch.testing.assert_close(left, shrink(moments, counts).matrices, rtol=1e-3, atol=1e-4)


def test_samples_are_routed_tokens_with_their_weights(
    small: Any, calibration: CalibrationSet, tokens: Tensor, workspace: Workspace
) -> None:
    model = small()
    statistics = collect_statistics(model.checkpoint, calibration, workspace)
    site = statistics.sites[1]
    found = statistics.of(site)
    x, ids, weights = model.expert_inputs(tokens)[site]
    assert int(found.counts.max()) <= SAMPLE  # so that every routed token is in the sample
    for expert in range(8):
        routed, slot = torch.nonzero(ids == expert, as_tuple=True)
        kept = found.sample.weights[expert] != 0
        assert int(kept.sum()) == len(routed)
        order = found.sample.weights[expert][kept].argsort()
        expected = weights[routed, slot]
        torch.testing.assert_close(
            found.sample.weights[expert][kept][order], expected.sort().values, rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            found.sample.x[expert][kept][order], x[routed][expected.argsort()], rtol=1e-3, atol=1e-4
        )


def test_exponent_one_weights_by_the_gate_itself(
    small: Any, calibration: CalibrationSet, tokens: Tensor, workspace: Workspace
) -> None:
    model = small()
    statistics = collect_statistics(model.checkpoint, calibration, workspace, exponent=1)
    site = statistics.sites[0]
    x, ids, weights = model.expert_inputs(tokens)[site]
    routed, slot = torch.nonzero(ids == 2, as_tuple=True)
    expected = (x[routed] * weights[routed, slot, None]).T @ x[routed]
    torch.testing.assert_close(statistics.of(site).input_moments[2], expected, rtol=1e-3, atol=1e-4)


class Interrupted(Workspace):
    """A workspace that is interrupted when the second site is about to be stored."""

    def save_tensors(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        if any(self.root.rglob("*.safetensors")):
            raise KeyboardInterrupt
        super().save_tensors(key, tensors)


def test_an_interrupted_run_continues(
    small: Any, calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = small().checkpoint
    with pytest.raises(KeyboardInterrupt):
        collect_statistics(checkpoint, calibration, Interrupted(tmp_path / "cut"))
    [first] = (tmp_path / "cut").rglob("*.safetensors")
    written = first.stat().st_mtime_ns
    resumed = collect_statistics(checkpoint, calibration, Workspace(tmp_path / "cut"))
    assert first.stat().st_mtime_ns == written
    whole = collect_statistics(checkpoint, calibration, Workspace(tmp_path / "whole"))
    for site in whole.sites:
        assert torch.equal(resumed.of(site).input_moments, whole.of(site).input_moments)
    monkeypatch.setattr(LayeredModel, "start", None)  # complete: nothing runs any more
    collect_statistics(checkpoint, calibration, Workspace(tmp_path / "cut"))


def test_starved_experts_lean_on_their_layer() -> None:
    columns = 4
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(n, columns, generator=generator) for n in (6, 2, 0)]
    moments = torch.stack([x.T @ x for x in samples])
    found = shrink(moments, torch.tensor([6, 2, 0]))
    assert found.starved == [1, 2]
    per_pair = moments.sum(0) / 8
    share = columns / (columns + 6)
    torch.testing.assert_close(found.matrices[0], (1 - share) * moments[0] + share * 6 * per_pair)
    share = columns / (columns + 2)
    torch.testing.assert_close(found.matrices[1], (1 - share) * moments[1] + share * 2 * per_pair)
    torch.testing.assert_close(found.matrices[2], per_pair)
    assert float(torch.linalg.eigvalsh(found.matrices).min()) > 0


def test_an_expert_leans_on_its_layer_the_less_the_more_it_saw() -> None:
    moments = torch.eye(3) * torch.tensor([30.0, 600.0]).view(2, 1, 1)
    found = shrink(moments, torch.tensor([3, 297]))
    assert found.starved == []
    # 2.1 a token in the layer, 10 and 2.02 of the experts' own; shares 3 / 6 and 3 / 300
    expected = torch.tensor([0.5 * 30 + 0.5 * 3 * 2.1, 0.99 * 600 + 0.01 * 297 * 2.1])
    torch.testing.assert_close(found.matrices, torch.eye(3) * expected.view(2, 1, 1))


def test_even_routing_gives_every_expert_its_share_at_the_mean_weight() -> None:
    """Two experts, four tokens, one choice each: three went to the first."""
    sample = Sample(
        x=torch.zeros(2, 3, 1),
        weights=torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.0, 0.0]]),
        datasets=torch.zeros(2, 3, dtype=torch.int64),
        pairs=torch.tensor([[3, 1]]),
        tokens=4,
    )
    errors = torch.tensor([[1.0, 2.0, 3.0], [8.0, 99.0, 99.0]])
    square, overall = (3 * 0.25 + 1) / 4, 14 / 4
    means = [(6 + PRIOR_PAIRS * overall) / (3 + PRIOR_PAIRS), (8 + PRIOR_PAIRS * overall) / (1 + PRIOR_PAIRS)]
    expected = torch.tensor([mean * square / 2 for mean in means]).double()
    torch.testing.assert_close(sample.even(errors), expected)


def test_costs_under_even_routing_are_the_measured_ones_where_routing_is_even() -> None:
    """Same pairs, weights and errors everywhere: both sums are the same."""
    sample = Sample(
        x=torch.zeros(4, 5, 1),
        weights=torch.full((4, 5), 0.5),
        datasets=torch.zeros(4, 5, dtype=torch.int64),
        pairs=torch.full((1, 4), 5),
        tokens=10,
    )
    errors = torch.full((4, 5), 3.0)
    torch.testing.assert_close(sample.even(errors), sample.totals(errors * sample.weights.square())[0])
