from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import tvm

from moqc.quant import reference
from moqc.quant.formats import ACTIVATION_GROUP, COLUMN_TILE
from moqc.quant.hadamard import BLOCK, rotate
from moqc.schedules.cpu.families import FAMILIES
from moqc.schedules.cpu.quantize_activations import activations_kernel
from moqc.targets import find_target, host_features

COLUMNS = ACTIVATION_GROUP + 6
TILES = 5
"""Of 32 columns, the last one short."""
GROUPS = 2


@pytest.fixture(scope="module", params=["x86-64-v4-vnni", "x86-64-v3"])
def kernels(request):
    target = find_target(request.param)
    if not target.features <= host_features():
        pytest.skip(f"this machine cannot run {target.name}")
    family = FAMILIES[target.dot]
    functions = {
        "int8": activations_kernel(family, COLUMNS, mode="int8"),
        "gathered": activations_kernel(family, COLUMNS, mode="int8", top_k=3),
        "float": activations_kernel(family, COLUMNS, mode="float", top_k=2),
        "rotated": activations_kernel(family, COLUMNS, mode="float", rotated=COLUMNS // BLOCK),
    }
    named = {name: function.with_attr("global_symbol", name) for name, function in functions.items()}
    return tvm.compile(tvm.IRModule(named), tvm.target.Target(target.tvm))


def _quantize(kernels, x: torch.Tensor) -> tuple[np.ndarray, ...]:
    rows = len(x)
    tiles = GROUPS * ACTIVATION_GROUP // COLUMN_TILE
    shapes = [((rows, GROUPS * ACTIVATION_GROUP), "int8")]
    shapes += [((rows, width), "float32") for width in (GROUPS, GROUPS, tiles)]
    outputs = [tvm.runtime.empty(shape, dtype) for shape, dtype in shapes]
    kernels["int8"](tvm.runtime.tensor(x.numpy()), *outputs)
    values, scales, sums, tile_sums = (output.numpy() for output in outputs)
    return values, scales, sums, tile_sums


@pytest.mark.parametrize("rows", [1, 100])
def test_codes_are_the_references(kernels, rows):
    x = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rows))
    x[0, :ACTIVATION_GROUP] = torch.arange(ACTIVATION_GROUP) - 63.5  # ties: the scale is 63.5 / 127
    x[-1, ACTIVATION_GROUP:] = 0
    values, scales, sums, tile_sums = _quantize(kernels, x)
    expected, expected_scales = reference.quantize_activations(x)
    np.testing.assert_array_equal(values[:, :COLUMNS], expected)
    assert not values[:, COLUMNS:].any()
    np.testing.assert_array_equal(scales, expected_scales)
    totals = values.reshape(rows, GROUPS, -1, COLUMN_TILE).sum(-1, dtype=np.int64)
    np.testing.assert_allclose(sums, scales * totals.sum(-1), rtol=1e-6)
    np.testing.assert_allclose(tile_sums, (scales[..., None] * totals).reshape(rows, -1), rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keeps_bad_numbers_visible(kernels, bad):
    x = torch.ones(1, COLUMNS)
    x[0, ACTIVATION_GROUP + 2] = bad
    _, scales, *_ = _quantize(kernels, x)
    assert np.isfinite(scales[0, 0])
    assert not np.isfinite(scales[0, 1])


def test_denormal_groups_do_not_wrap(kernels):
    values, *_ = _quantize(kernels, torch.full((1, COLUMNS), 3e-44))
    assert (values >= 0).all()


def test_gathers_the_rows_of_the_order(kernels):
    x = np.random.default_rng(0).standard_normal((3, COLUMNS)).astype(np.float32)
    order = np.array([5, 0, 1, 2, 4, 3], np.int32)
    output = tvm.runtime.empty((6, TILES * COLUMN_TILE), "float32")
    kernels["float"](tvm.runtime.tensor(x), tvm.runtime.tensor(order), output)
    np.testing.assert_array_equal(output.numpy()[:, :COLUMNS], x[order // 2])
    assert not output.numpy()[:, COLUMNS:].any()


def test_gathers_what_it_quantizes(kernels):
    x = torch.randn(150, COLUMNS, generator=torch.Generator().manual_seed(0))
    order = np.random.default_rng(0).permutation(3 * len(x)).astype(np.int32)
    plain = _quantize(kernels, x)
    outputs = [tvm.runtime.empty((3 * len(x), each.shape[1]), str(each.dtype)) for each in plain]
    kernels["gathered"](tvm.runtime.tensor(x.numpy()), tvm.runtime.tensor(order), *outputs)
    for output, each in zip(outputs, plain, strict=True):
        np.testing.assert_array_equal(output.numpy(), each[order // 3])


@pytest.mark.parametrize("rows", [1, 100])
def test_rotates_whole_blocks(kernels, rows):
    x = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rows))
    output = tvm.runtime.empty((rows, TILES * COLUMN_TILE), "float32")
    kernels["rotated"](tvm.runtime.tensor(x.numpy()), output)
    np.testing.assert_allclose(output.numpy()[:, :COLUMNS], rotate(x), rtol=1e-5, atol=1e-6)
    assert not output.numpy()[:, COLUMNS:].any()


def test_the_rotation_of_narrow_vectors_compiles_in_seconds():
    # TVM's simplifier took 200 s of CPU for it: twice as long for every bound sum that it looked through.
    target = find_target("aarch64")
    function = activations_kernel(FAMILIES[target.dot], 2 * BLOCK, mode="int8", rotated=2)
    begin = time.process_time()
    tvm.compile(tvm.IRModule({"rotated": function.with_attr("global_symbol", "rotated")}), target.tvm)
    assert time.process_time() - begin < 20
