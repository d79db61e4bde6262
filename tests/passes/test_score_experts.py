"""score-experts: super experts are found and stored finely."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tvm import IRModule

from moqc.errors import PipelineError
from moqc.frontend.hf import import_model
from moqc.ir.annotations import BITS, CHANNELS, COSTS, PROFILE, SCORES
from moqc.ir.sites import find_experts
from moqc.passes.allocate_bits import AllocateBits
from moqc.passes.allocation_problem import build_problem
from moqc.passes.base import PassContext
from moqc.passes.profile_activation import ProfileActivation
from moqc.passes.profile_channels import ProfileChannels
from moqc.passes.score_experts import ScoreExperts
from moqc.quant.formats import Format

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
FORMATS = ("int1-g32", "int2-g32", "int4-g32")


@pytest.fixture
def annotated(calibrated: Any) -> IRModule:
    """Costs that fall tenfold a bit; expert 5 of the second block costs 100 times as much as the others."""
    mod = ProfileChannels()(ProfileActivation()(import_model(calibrated.checkpoint), calibrated), calibrated)
    costs: dict[str, Any] = {}
    for site in (FIRST, SECOND):
        row = np.full(8, 1000)
        row[5] = 100_000 if site == SECOND else 1000
        one = {name: (row * 10_000 // 10 ** Format.parse(name).bits).tolist() for name in FORMATS}
        costs[site] = {projection: one for projection in ("gate", "up", "down")}
    return COSTS.put(mod, costs)


def test_scores(annotated: IRModule) -> None:
    found = SCORES.of(ScoreExperts()(annotated, PassContext()))
    assert (found[FIRST]["super"], found[SECOND]["super"]) == ([], [5])
    assert found[FIRST]["score_ppm"] == [10**6] * 8
    assert found[SECOND]["score_ppm"][5] == round(100 / (107 / 8) * 1e6)
    channels, profile = CHANNELS.of(annotated), PROFILE.of(annotated)
    for site in (FIRST, SECOND):
        starved = {*channels[site]["input"]["starved"], *channels[site]["hidden"]["starved"]}
        assert found[site]["starved"] == sorted(starved)
        assert found[site]["drift_ppm"] == profile[site]["drift_ppm"]
    assert SCORES.of(ScoreExperts(super_ratio=200.0)(annotated, PassContext()))[SECOND]["super"] == []
    with pytest.raises(PipelineError, match="super_ratio=1 must be above 1"):
        ScoreExperts(super_ratio=1.0)(annotated, PassContext())


def test_super_experts_keep_four_bits(annotated: IRModule) -> None:
    """Even where the costs would not: here they are made equal after scoring."""
    mod = ScoreExperts()(annotated, PassContext())
    flat = {
        site: {p: {name: [c[0]] * 8 for name, c in by_format.items()} for p, by_format in projections.items()}
        for site, projections in COSTS.of(mod).items()
    }
    mod = COSTS.put(mod, flat)
    plan = BITS.of(AllocateBits(bits=14.0, formats=FORMATS)(mod, PassContext()))
    assert {plan[SECOND][p][5] for p in ("gate", "up", "down")} == {"int4-g32"}
    problem = build_problem(mod, find_experts(mod), "global", FORMATS, 14.0)
    assert problem.allowed is not None
    assert (~problem.allowed).any(axis=1).sum() == 3
    assert build_problem(annotated, find_experts(annotated), "global", FORMATS, 14.0).allowed is None
    assert replace(problem, allowed=None).permitted.all()
