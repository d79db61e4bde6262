"""profile-channels: starved experts and where the energy of their inputs is."""

import logging
from typing import Any

import pytest
import torch
from tvm import IRModule

from moqc.calibrate.statistics import collect_statistics
from moqc.ir.annotations import CHANNELS
from moqc.passes.profile_channels import ProfileChannels


def test_channels(moe: IRModule, calibrated: Any) -> None:
    channels = CHANNELS.of(ProfileChannels()(moe, calibrated))
    statistics = collect_statistics(calibrated.checkpoint, calibrated.calibration, calibrated.workspace)
    for site, found in channels.items():
        measured = statistics.of(site)
        for name, columns, moments in (
            ("input", 32, measured.input_moments),
            ("hidden", 16, measured.hidden_moments),
        ):
            counts = measured.counts.tolist()
            assert found[name]["columns"] == columns
            assert found[name]["starved"] == [e for e in range(8) if counts[e] < columns]
            for expert in range(8):
                energy = torch.diagonal(moments[expert]).double()
                share = float(energy.max() / energy.sum()) * 1e6  # 1 % of 32 or of 16 channels is one
                assert found[name]["top_ppm"][expert] == pytest.approx(share, abs=1)


def test_starved_experts_are_reported(
    moe: IRModule, calibrated: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="moqc"):
        channels = CHANNELS.of(ProfileChannels()(moe, calibrated))
    starved = sum(len({*site["input"]["starved"], *site["hidden"]["starved"]}) for site in channels.values())
    assert starved > 0
    assert f"{starved} of 16 experts saw fewer calibration tokens" in caplog.text
