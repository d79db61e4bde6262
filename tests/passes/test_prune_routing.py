"""prune-routing: the rewritten graph, what it reports, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import tvm

from moqc.calibrate.workspace import ParamStore
from moqc.errors import PipelineError
from moqc.frontend.hf import import_model
from moqc.ir import ops
from moqc.ir.annotations import BITS, PARAMS, PRUNING
from moqc.ir.sites import bindings, find_experts, find_linears
from moqc.ir.text import parse_module, print_module
from moqc.ir.verify import verify
from moqc.passes.base import PassContext
from moqc.passes.pipeline import Pipeline
from moqc.passes.prune_routing import PruneRouting
from moqc.passes.quantize_experts import QuantizeExperts

SITES = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]


@pytest.fixture(scope="module")
def imported(calibrated):
    return import_model(calibrated.checkpoint)


@pytest.fixture
def ctx(calibrated, tmp_path):
    return replace(calibrated, params=ParamStore(tmp_path))


@pytest.fixture(scope="module")
def pruned(imported, calibrated, tmp_path_factory):
    ctx = replace(calibrated, params=ParamStore(tmp_path_factory.mktemp("params")))
    return PruneRouting(share=0.2)(imported, ctx), ctx


def test_the_routing_of_every_block_goes_through_the_operator(pruned, imported):
    mod, ctx = pruned
    values = dict(bindings(mod["main"]))
    calls = [value for value in values.values() if ops.is_call(value, ops.EXPERTS)]
    assert len(calls) == 2
    for call in calls:
        named = ops.operands(call)
        ids, weights = values[named["ids"]], values[named["weights"]]
        prune = values[ids.tuple_value]
        assert ops.is_call(prune, ops.PRUNE_ROUTING)
        assert (ids.tuple_value, ids.index, weights.index) == (weights.tuple_value, 0, 1)
        assert ops.operand(prune, "x").same_as(named["x"])
        assert ops.attributes(prune)["site"] == ops.attributes(call)["site"]
    added = [
        f"model.layers.{n}.mlp.pruning.{part}" for n in range(2) for part in ("strength", "limits", "slopes")
    ]
    assert PARAMS.of(mod) == [*PARAMS.of(imported), *added]
    assert all(name in ctx.params for name in added)


def test_it_verifies_and_round_trips(pruned):
    mod, _ = pruned
    verify(mod)
    tvm.ir.assert_structural_equal(parse_module(print_module(mod)), mod)


def test_reading_the_input_makes_no_other_linear_a_router(pruned, imported):
    routers = {site.site for site in find_linears(imported) if site.router}
    assert routers == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    assert {site.site for site in find_linears(pruned[0]) if site.router} == routers


def test_the_report_counts_pairs(pruned):
    report = PRUNING.of(pruned[0])
    assert list(report) == SITES
    chosen, kept = (sum(sum(entry[name]) for entry in report.values()) for name in ("chosen", "kept"))
    assert 1 - kept / chosen == pytest.approx(0.2, abs=0.02)
    for entry in report.values():
        assert entry["cold"] == [expert for expert, pairs in enumerate(entry["kept"]) if pairs == 0]
        assert (entry["rule"], entry["renormalize"], entry["policy"]) == ("mass", 0, "keep")
        assert entry["skipped_ppm"] == round(1e6 * (1 - sum(entry["kept"]) / sum(entry["chosen"])))


def test_a_loss_finds_a_share(imported, ctx):
    report = PRUNING.of(PruneRouting(loss=0.01)(imported, ctx))
    skipped = 1 - sum(sum(e["kept"]) for e in report.values()) / sum(
        sum(e["chosen"]) for e in report.values()
    )
    assert 0.04 < skipped < 0.5


def test_demoted_experts_get_the_smallest_format(imported, ctx):
    plan = {
        site.site: {name: ["int3-g128", *["int2-g128"] * 7] for name in site.projections}
        for site in find_experts(imported)
    }
    mod = PruneRouting(share=0.2, cold="demote")(BITS.put(imported, plan), ctx)
    for site, entry in PRUNING.of(mod).items():
        wanted = ["int2-g128" if 0 in entry["cold"] else "int3-g128", *["int2-g128"] * 7]
        assert BITS.of(mod)[site] == {name: wanted for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "odp-literal", "share": 0.1}, "does not know; it is for `moqc compare` only"),
        ({"rule": "best", "share": 0.1}, "rule=best is not one of mass, odp, topk-threshold"),
        ({}, "give share or loss"),
        ({"share": 0.1, "loss": 0.1}, "give share or loss"),
        ({"share": 0.1, "cold": "burn"}, "cold=burn is not one of keep, demote, remove"),
        ({"share": 0.1, "cold": "demote"}, "run allocate-bits before"),
    ],
)
def test_refuses(imported, options, message):
    with pytest.raises(PipelineError, match=message):
        PruneRouting(**options)(imported, PassContext())


def test_a_second_pruning_is_refused(pruned):
    with pytest.raises(PipelineError, match=r"has moqc\.pruning already"):
        PruneRouting(share=0.1)(*pruned)


def test_its_text_is_its_options():
    text = "prune-routing{rule=odp share=0.25 cold=remove}"
    assert str(Pipeline.parse(text)) == text
    assert np.isclose(Pipeline.parse(text).passes[0].share, 0.25)


def test_removed_experts_are_not_packed(imported, ctx):
    """With a pruning under which some expert is cold: what is stored is what may be kept."""
    mod = PruneRouting(share=0.4, cold="remove")(imported, ctx)
    report = PRUNING.of(mod)
    site = SITES[0]
    report[site] |= {"cold": [1, 5]}
    mod = PRUNING.put(mod, report)
    plan = {
        s.site: {name: ["int3-g128", "int2-g128", *["int3-g128"] * 6] for name in s.projections}
        for s in find_experts(mod)
    }
    mod = QuantizeExperts(quantizer="rtn")(BITS.put(mod, plan), ctx)
    verify(mod)
    calls = [call for _, call in bindings(mod["main"]) if ops.is_call(call, ops.MIXED_EXPERTS)]
    attrs = ops.attributes(calls[0])
    assert (attrs["site"], attrs["removed"]) == (site, [1, 5])
    assert attrs["classes"] == ["gate:int3-g128", "up:int3-g128", "down:int3-g128"]
    assert ctx.params.get(f"{site}.up.0.codes").shape[0] == 6
    table = ctx.params.get(f"{site}.table")
    assert table[1, [0, 2, 3, 4, 6, 7], 1].tolist() == list(range(6))


def test_removal_leaves_cold_experts_no_strength(imported, ctx):
    mod = PruneRouting(share=0.4, rule="odp", cold="remove")(imported, ctx)
    for site, entry in PRUNING.of(mod).items():
        strength = ctx.params.get(f"{site.removesuffix('experts')}pruning.strength")
        assert np.flatnonzero(strength == 0).tolist() == entry["cold"]
