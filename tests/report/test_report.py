"""The report of a small artifact written by hand: its numbers, its page, its text."""

import io
import json
import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

import moqc
import moqc.api
from moqc.errors import ArtifactError, UserError
from moqc.manifest import (
    CacheSpec,
    CalibrationRecord,
    Generation,
    KernelNumerics,
    Manifest,
    Sizes,
    Source,
    TargetRecord,
    Versions,
    record_files,
    write_manifest,
)
from moqc.recipe import Recipe
from moqc.report.data import read_report
from moqc.report.frontier import frontier
from moqc.report.page import render
from moqc.report.svg import bits_color
from moqc.report.terminal import print_report

FORMATS = ("int1-g128", "int2-g128", "int4-g128")
SITES = ("model.layers.0.mlp.experts", "model.layers.3.mlp.experts")
HIDDEN, INTERMEDIATE, EXPERTS = 128, 256, 3
BITS = {
    SITES[0]: {"up": ("int4-g128", "int1-g128", "int2-g128"), "down": ("int4-g128",) * 3},
    SITES[1]: {"up": ("int1-g128",) * 3, "down": ("int2-g128", "int1-g128", "int1-g128")},
}


def costs(scale):
    """By projection and format, falling fourfold with each format."""
    by_expert = np.array([4.0, 1.0, 2.0]) * scale
    return {
        name: {fmt: (by_expert * 64 / 4**at).astype(int).tolist() for at, fmt in enumerate(FORMATS)}
        for name in ("up", "down")
    }


@pytest.fixture
def folder(tmp_path):
    """An artifact's manifest and analysis, without library and weights."""
    analysis = {
        "schema_version": 1,
        "sites": {
            site: {
                "experts": EXPERTS,
                "hidden": HIDDEN,
                "intermediate": INTERMEDIATE,
                "projections": ["up", "down"],
            }
            for site in SITES
        },
        "annotations": {
            "moqc.profile": {
                site: {"tokens": 600, "pairs": [900, 0, 300], "weight_ppm": [500000, 0, 250000]}
                for site in SITES
            },
            "moqc.coactivation": {
                SITES[0]: {
                    "communities": [[0, 2], [1]],
                    "centrality_ppm": [700000, 0, 300000],
                    "cross_ppm": 0,
                    "pairs": [[2, 0, 250, 1000]],
                }
            },
            "moqc.sensitivity": {SITES[0]: 10**9, SITES[1]: 10**8},
            "moqc.costs": {SITES[0]: costs(100), SITES[1]: costs(1)},
        },
    }
    (tmp_path / "analysis.json").write_text(json.dumps(analysis))
    manifest = Manifest(
        source=Source(path="models/<b>tiny</b>", model_type="toy_moe", fingerprint="f" * 64),
        target=TargetRecord(name="x86-64-v3", features=("avx2",)),
        versions=Versions(moqc="0.1.0", tvm="0.27.0.post1", tvm_ffi="0.1.14", llvm="22"),
        pipeline="allocate-bits{bits=2.5}",
        recipe=Recipe(bits=2.5).plain(),
        calibration=CalibrationRecord(datasets={"text": 600}, fingerprint="d" * 32),
        bits=BITS,
        linear_bits={"lm_head": "int8-g64-sym"},
        activations="int8",
        sizes=Sizes(
            expert_file_bits_per_weight=2.5,
            model_file_bits_per_weight=4.0,
            parameter_bytes=1000,
            artifact_bytes=0,
        ),
        parameters=(),
        cache=CacheSpec(context=64, batch=2, chunk=8, tensors=()),
        vocabulary=100,
        generation=Generation(),
        numerics={"experts": KernelNumerics(site=SITES[0], max_relative_error=2e-7)},
        files=record_files(tmp_path),
    )
    write_manifest(tmp_path, manifest)
    return tmp_path


def test_plan_and_uniform_costs_by_hand(folder):
    report = read_report(folder)
    assert report.measured_formats == list(FORMATS)
    assert report.uniform_cost("int2-g128") == 2 * 7 * 16 * 101
    by_site = (100 * (4 * 4 + 64 + 2 * 16) + 100 * 7 * 4, 64 * 7 + 4 * 16 + 64 * 3)
    assert report.plan_cost == sum(by_site)
    assert report.uniform_bits("int2-g128") == pytest.approx(2 + 24 / 128)


def test_frontier_falls_and_undercuts_uniform(folder):
    report = read_report(folder)
    points = frontier(report)
    assert len(points) > 4
    assert all(a.cost >= b.cost for a, b in pairwise(points))
    two = report.uniform_bits("int2-g128")
    beside = [point for point in points if point.bits <= two]
    assert min(point.cost for point in beside) < report.uniform_cost("int2-g128")


def test_page_needs_nothing_else(folder):
    page = render(read_report(folder))
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=|url\(|@import", page)
    assert "<b>tiny</b>" not in page
    for name in FORMATS:
        assert name in page
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(figures) == 9  # up, down, activation, harm, sensitivity, mean bits; why, trade, co-activation
    for figure in figures:
        ElementTree.fromstring(figure)
    assert "layer 3, expert 1, up: int1-g128, 0.00% of its tokens" in page
    assert "never used" in page
    assert "2 communities" in page
    assert page.count('class="edge"') == 1
    assert page.count('class="ringed"') == 2 * EXPERTS
    assert "moqc compile" in page
    assert "--bits 2.5" in page


def test_cells_have_the_color_of_their_bits(folder):
    page = render(read_report(folder))
    first = re.search(r'<rect[^>]*fill="(#\w+)"><title>layer 0, expert 0, up: int4-g128', page)
    assert first[1] == bits_color(4.1875)
    colors = [bits_color(bits) for bits in (1.19, 2.19, 3.19, 4.19, 8.2)]
    assert len(set(colors)) == 5


def test_terminal_has_a_digit_for_each_expert(folder):
    out = io.StringIO()
    print_report(read_report(folder), Console(file=out, width=40))
    lines = out.getvalue().splitlines()
    assert "   0 433  3.35" in lines  # means 4.19, 2.69 and 3.19
    assert "   3 211  1.35" in lines
    assert "fewer calibration tokens than columns, layer/expert (tokens): 0/1 (0), 3/1 (0)" in out.getvalue()


def test_results_of_other_commands_are_shown(folder, tmp_path):
    compare = {
        "reference_loss": 2.5,
        "tokens": 511,
        "files": ["a"],
        "rows": [
            {
                "plan": "uniform:rtn",
                "allocator": "uniform",
                "quantizer": "rtn",
                "expert_file_bits_per_weight": 2.4,
                "loss": 2.75,
                "loss_increase": 0.25,
            }
        ],
    }
    speed = {"load_seconds": 0.1, "rows": [{"test": "tg128", "batch": 1, "tokens_per_s": 890.0}]}
    paths = []
    for name, content in (("compare", compare), ("bench", speed)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(content))
    page = render(moqc.api.read_report(folder, paths))
    assert "+0.2500" in page
    assert "<b>890</b>" in page
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="not what"):
        moqc.api.read_report(folder, [tmp_path / "other.json"])


def test_without_analysis_what_is_known_is_shown(folder):
    (folder / "analysis.json").unlink()
    report = read_report(folder)
    assert report.plan_cost is None
    page = render(report)
    assert "Size against harm" not in page
    assert "bits of up" in page
    assert moqc.inspect(folder)["uniform"] == []


def test_layers_are_compared_by_harm_without_a_sensitivity(folder):
    path = folder / "analysis.json"
    content = json.loads(path.read_text())
    del content["annotations"]["moqc.sensitivity"]
    path.write_text(json.dumps(content))
    page = render(read_report(folder))
    assert "harm of layer" in page
    assert "of the answer to its errors" not in page


def test_damaged_analysis_is_refused(folder):
    (folder / "analysis.json").write_text('{"sites": 1}')
    with pytest.raises(ArtifactError, match="damaged"):
        read_report(folder)


def test_page_is_written_where_asked(folder, tmp_path):
    moqc.api.write_report(folder, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    with pytest.raises(UserError, match="cannot write"):
        moqc.api.write_report(folder, tmp_path / "none" / "report.html")
