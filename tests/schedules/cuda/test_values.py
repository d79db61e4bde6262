"""Values of linears, embeddings and pruned routings on a GPU (``pytest -m cuda``), beside the references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import tvm_ffi
from random_codes import random_codes

from moqc.quant.formats import Format
from moqc.quant.grid import rounded
from moqc.quant.pack_mma import pack_units
from moqc.quant.routing import SitePruning, prune
from moqc.quant.tensor import Quantized
from moqc.schedules.cuda.dense import embedding_function
from moqc.schedules.cuda.linear import LinearShape, linear_function, workspace_bytes
from moqc.schedules.cuda.prune import prune_function
from moqc.schedules.pruning import PruneShape

FORMATS = (
    "int1-g64",
    "int1-g128-sym-s8",
    "int2-g128",
    "int3-g32-s8",
    "int4-g64-sym-s8",
    "int8-g64-sym",
    "tcq1-g128",
    "tcq2-g32",
    "tcq3-g64",
)
ROWS, COLUMNS = 104, 520
TOKENS = (1, 3, 8, 9, 21, 64, 70)
STRENGTH = torch.tensor([0.5, 2.0, 1.0, 0.0, 1.5, 0.7, 1.1])
TOP_K, HIDDEN = 4, 24
SLOPES = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(6)).half() / 5
RULES = {
    "mass": SitePruning("mass", 0.8, STRENGTH, True, 2.0, first=2, peak=2.5, margin=0.02),
    "plain": SitePruning("mass", 0.9, torch.ones(7), False, 1.0),
    "slopes": SitePruning("mass", 0.3, STRENGTH, False, 2.0, first=2, slopes=SLOPES),
    "ratio": SitePruning("ratio", 0.4, STRENGTH, True, first=1, margin=0.1),
}


def kernels() -> dict[str, Any]:
    """Every function that is checked."""
    functions = {}
    for name in FORMATS:
        fmt, key = Format.parse(name), name.replace("-", "_")
        functions[f"linear_{key}"] = linear_function([LinearShape(fmt, ROWS, COLUMNS, 1, bias=True)])
        functions[f"rows_{key}"] = embedding_function(fmt, COLUMNS, dtype="int64", lead=1)
    for name, rule in RULES.items():
        facts = (rule.kind, rule.exponent, rule.renormalize, rule.first)
        shape = PruneShape(7, TOP_K, HIDDEN, "int64", *facts, slopes=rule.slopes is not None)
        functions[f"prune_{name}"] = prune_function(shape)
    return functions


def worst_errors(function: Callable[[str], Any]) -> dict[str, float]:
    """Relative error of each format's linear by tokens, and of its rows."""
    errors, generator = {}, torch.Generator().manual_seed(3)
    for name in FORMATS:
        fmt, key = Format.parse(name), name.replace("-", "_")
        quantized = random_matrix(fmt, generator)
        units, dense = pack_units(quantized), quantized.dequantize()
        arrays = [array for array in (units.codes, units.scales, units.zeros) if array is not None]
        packed, bias = [torch.from_numpy(array).cuda() for array in arrays], torch.randn(ROWS)
        for tokens in TOKENS:
            x = torch.randn(tokens, COLUMNS, generator=generator)
            x[::2] *= 1e5
            workspace = torch.full((workspace_bytes(COLUMNS, tokens),), 255, dtype=torch.uint8, device="cuda")
            y = torch.full((tokens, ROWS), float("nan"), device="cuda")
            with tvm_ffi.use_torch_stream():
                function(f"linear_{key}")(x.cuda(), *packed, bias.cuda(), workspace, y)
            errors[f"{name} {tokens}"] = error(y, x.double() @ dense.double().T + bias)
        ids = torch.tensor([0, ROWS - 1, 17, -5])
        y = torch.full((len(ids), COLUMNS), float("nan"), device="cuda")
        with tvm_ffi.use_torch_stream():
            function(f"rows_{key}")(ids.cuda(), *packed, y)
        # What is no row of the table is the nearest one (of those stored, padding included).
        errors[f"{name} rows"] = error(y, dense[ids.clamp(0, ROWS - 1)])
    return errors


def differing_pairs(function: Callable[[str], Any]) -> dict[str, float]:
    """For each rule, how many pairs are kept or dropped wrongly, and by how much kept weights are off."""
    found, generator = {}, torch.Generator().manual_seed(5)
    for name, rule in RULES.items():
        ids = torch.rand(300, 7, generator=generator).argsort(1)[:, :TOP_K]
        ids[torch.rand(ids.shape, generator=generator) < 0.05] = -1
        weights = torch.rand(300, TOP_K, generator=generator) ** 2 + 1e-3
        x = torch.randn(300, HIDDEN, generator=generator)
        positions = torch.randint(-1, 9, (300,), generator=generator)
        limits = torch.tensor([rule.limit, rule.peak, rule.margin])
        given = [x, ids, weights, positions, rule.strength, limits]
        given += [] if rule.slopes is None else [rule.slopes]
        kept, left = torch.full_like(ids, 99).cuda(), torch.full_like(weights, float("nan")).cuda()
        with tvm_ffi.use_torch_stream():
            function(f"prune_{name}")(*(each.cuda() for each in given), kept, left)
        expected_ids, expected = prune(rule, x, ids, weights, positions)
        found[f"{name} pairs"] = float((kept.cpu() != expected_ids).sum())
        found[f"{name} weights"] = float((left.cpu() - expected).abs().nan_to_num(1e9).max())
    return found


def random_matrix(fmt: Format, generator: torch.Generator) -> Quantized:
    groups = (ROWS, fmt.groups(COLUMNS))
    codes = random_codes(fmt, (ROWS, COLUMNS), generator)
    scales = ((torch.rand(groups, generator=generator) + 0.1) / fmt.levels).half()
    if fmt.byte_scales:
        scales = rounded(scales.float(), torch.zeros(groups), fmt).scale.half()
    zeros = None if fmt.symmetric else torch.randint(0, 256, groups, generator=generator, dtype=torch.uint8)
    return Quantized(fmt, codes, scales, zeros)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    wrong = (actual.cpu().double() - expected).norm(dim=1) / expected.double().norm(dim=1)
    return float(wrong.nan_to_num(1e9).max())


@pytest.fixture(scope="module")
def library(build) -> Any:
    return build(kernels())


@pytest.mark.cuda
def test_linears_and_rows_equal_the_dequantized_product(library):
    assert {name: each for name, each in worst_errors(library.__getitem__).items() if not each < 5e-3} == {}


@pytest.mark.cuda
def test_pruning_keeps_what_the_reference_keeps(library):
    assert {name: each for name, each in differing_pairs(library.__getitem__).items() if each > 1e-6} == {}
