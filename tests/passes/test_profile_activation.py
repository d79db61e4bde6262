"""profile-activation: counts and weights of the router, by dataset."""

from typing import Any

import pytest
import torch
from tvm import IRModule

from moqc.calibrate.statistics import collect_statistics
from moqc.errors import PipelineError
from moqc.ir.annotations import PROFILE
from moqc.passes.base import PassContext
from moqc.passes.profile_activation import ProfileActivation

SITES = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
TOKENS, TOP_K = 8 * 12, 2


def test_profile(moe: IRModule, calibrated: Any) -> None:
    profile = PROFILE.of(ProfileActivation()(moe, calibrated))
    statistics = collect_statistics(calibrated.checkpoint, calibrated.calibration, calibrated.workspace)
    assert list(profile) == SITES
    for site, found in profile.items():
        assert found["tokens"] == TOKENS
        assert sum(found["pairs"]) == TOKENS * TOP_K
        assert list(found["datasets"]) == ["prose", "code"]
        assert sum(found["datasets"]["code"]) == 3 * 12 * TOP_K
        assert found["pairs"] == [sum(pair) for pair in zip(*found["datasets"].values(), strict=True)]
        # The router renormalises: the weights of a token add up to 1.
        mass = sum(pairs * ppm for pairs, ppm in zip(found["pairs"], found["weight_ppm"], strict=True))
        assert mass / 1e6 == pytest.approx(TOKENS, rel=1e-4)
        assert found["pairs"] == statistics.of(site).counts.tolist()


def test_without_calibration_text(moe: IRModule, calibrated: Any) -> None:
    with pytest.raises(PipelineError, match="profile-activation needs a calibration"):
        ProfileActivation()(
            moe, PassContext(checkpoint=calibrated.checkpoint, workspace=calibrated.workspace)
        )


def test_drift_and_significance_from_the_statistics(moe: IRModule, calibrated: Any) -> None:
    found = PROFILE.of(ProfileActivation()(moe, calibrated))
    collected = collect_statistics(calibrated.checkpoint, calibrated.calibration, calibrated.workspace)
    for site in collected.sites:
        measured = collected.of(site)
        shares = measured.weight_mass / measured.weight_mass.sum(1, keepdim=True)
        for expert in range(8):
            one, other = shares[:, expert].tolist()
            expected = abs(one - other) / (one + other)  # of two values: their deviation over their mean
            assert found[site]["drift_ppm"][expert] == pytest.approx(expected * 1e6, abs=1)
        # Over both datasets the energies are the traces of the second moments.
        traces = measured.hidden_moments.diagonal(dim1=1, dim2=2).sum(1)
        energies = measured.hidden_energy.sum((0, 2))
        torch.testing.assert_close(energies, traces, rtol=1e-4, atol=1e-9)
        for row, name in zip(measured.hidden_energy.sum(2), collected.datasets, strict=True):
            expected_row = (row / row.sum() * 1e6).tolist()
            assert found[site]["significance_ppm"][name] == pytest.approx(expected_row, abs=1)
