from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moqc.calibrate.gradients import measure_gradients
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace
from moqc.frontend.experts import is_experts
from moqc.quant.mcmoe import mcmoe_rtn


def expected_gradients(model: Any, batches: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of the summed cross entropy at the output of each experts block, through transformers."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if is_experts(module):

            def keep(_: Any, __: Any, output: Tensor, name: str = name) -> None:
                output.retain_grad()
                found.setdefault(name, []).append(output)

            handles.append(module.register_forward_hook(keep))
    for tokens in batches:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {
        name: torch.cat([out.grad.reshape(-1, out.shape[-1]) for out in outputs])
        for name, outputs in found.items()
    }


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_against_autograd_through_the_whole_model(
    small: Any, calibration: CalibrationSet, tmp_path: Path, architecture: str
) -> None:
    model = small(architecture)
    found = measure_gradients(model.checkpoint, calibration, Workspace(tmp_path / "cache"), tokens=10**6)
    windows = [torch.from_numpy(rows) for rows in calibration.tokens]
    expected = expected_gradients(model.model, windows)
    seen = model.expert_inputs(torch.cat(windows))
    for site, gradients in expected.items():
        squares = gradients.double().square()
        assert found.power(site) == pytest.approx(float(squares.mean()), rel=1e-3)
        x, ids, weights = seen[site]
        block = LayeredModel(model.checkpoint).experts(site)
        exact = block.apply(x, ids, weights)
        sample, errors = found.sample(site), found.errors(site)
        assert sample.curvature is not None
        for expert in (0, 3):
            for column, bits in enumerate((1, 2, 3)):
                rounded = {}
                for name in block.projections:
                    rounded[name] = block.matrices(name).clone()
                    rounded[name][expert] = mcmoe_rtn(rounded[name][expert], bits)
                change = block.substitute(**rounded).apply(x, ids, weights) - exact
                value = float((squares * change.double().square()).sum())
                assert errors[expert][column] == pytest.approx(value, rel=1e-2, abs=1e-12)
            # The sample holds every routed token here; the curvature is that of the token's own output.
            kept = int((sample.weights[expert] != 0).sum())
            routed = (ids == expert).any(1)
            assert kept == int(routed.sum())
            total = sample.curvature[expert, :kept].double().sum()
            torch.testing.assert_close(total, squares[routed].sum(), rtol=1e-3, atol=1e-9)


def test_results_are_cached(
    small: Any, calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, workspace = small().checkpoint, Workspace(tmp_path / "cache")
    first = measure_gradients(checkpoint, calibration, workspace)
    monkeypatch.setattr(LayeredModel, "start", lambda *_: pytest.fail("ran again"))
    again = measure_gradients(checkpoint, calibration, workspace)
    assert [again.errors(site) for site in again.keys] == [first.errors(site) for site in first.keys]
