"""Kernels on rows: RMS norm and top-k."""

import numpy as np
import pytest
import tvm

from moqc.schedules.cpu.rms_norm import rms_norm_kernel
from moqc.schedules.cpu.topk import topk_kernel
from moqc.targets import TARGETS


def compile_kernel(kernel):
    module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    return tvm.compile(module, target=TARGETS["x86-64-v4"].tvm)["kernel"]


@pytest.mark.parametrize(("columns", "weighted"), [(128, True), (48, False), (7, True)])
def test_rms_norm(columns, weighted):
    run = compile_kernel(rms_norm_kernel(columns, 1e-6, weighted=weighted, lead=2, lanes=16))
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 3, columns)).astype(np.float32) * 3
    x[0, 1] = 0  # epsilon keeps it finite
    weight = random.standard_normal(columns).astype(np.float32)
    out = tvm.runtime.empty(x.shape, "float32")
    run(*(tvm.runtime.tensor(a) for a in ([x, weight] if weighted else [x])), out)
    expected = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * (weight if weighted else 1)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-6)


def top(x, k, dtype="int64"):
    run = compile_kernel(topk_kernel(x.shape[1], k, dtype, lead=1))
    values = tvm.runtime.empty((len(x), k), "float32")
    indices = tvm.runtime.empty((len(x), k), dtype)
    run(tvm.runtime.tensor(x), values, indices)
    return values.numpy(), indices.numpy()


def test_topk_is_sorted_and_stable():
    random = np.random.default_rng(0)
    x = random.integers(0, 9, (50, 20)).astype(np.float32)  # many ties
    values, indices = top(x, 6)
    order = np.argsort(-x, axis=1, kind="stable")[:, :6]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, 1))


def test_topk_indices_are_distinct_whatever_the_values():
    x = np.array([[np.nan] * 4, [-np.inf] * 4, [-np.inf, 2, np.nan, -np.inf]], np.float32)
    _, indices = top(x, 3, "int32")
    assert all(len(set(row)) == 3 for row in indices.tolist())
    assert indices.min() >= 0
    assert indices.max() < 4
