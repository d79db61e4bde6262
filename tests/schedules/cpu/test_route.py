from __future__ import annotations

import numpy as np
import pytest
import tvm

from moqc.schedules.cpu.route import route_kernel

EXPERTS, TOP_K = 5, 3


@pytest.fixture(scope="module")
def route():
    functions = {dtype: route_kernel(EXPERTS, TOP_K, dtype) for dtype in ("int32", "int64")}
    named = {name: function.with_attr("global_symbol", name) for name, function in functions.items()}
    library = tvm.compile(tvm.IRModule(named), tvm.target.Target({"kind": "llvm"}))

    def run(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        outputs = [tvm.runtime.empty((n,), "int32") for n in (ids.size, EXPERTS + 1, EXPERTS + 1)]
        library[str(ids.dtype)](tvm.runtime.tensor(ids), *outputs)
        order, starts, active = (output.numpy() for output in outputs)
        return order, starts, active

    return run


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_sorts_pairs_by_expert(route, dtype, tokens):
    ids = np.random.default_rng(tokens).integers(0, EXPERTS - 1, (tokens, TOP_K)).astype(dtype)
    order, starts, active = route(ids)
    np.testing.assert_array_equal(order, np.argsort(ids.ravel(), kind="stable"))
    counts = np.bincount(ids.ravel(), minlength=EXPERTS)
    np.testing.assert_array_equal(np.diff(starts), counts)
    np.testing.assert_array_equal(active[1 : active[0] + 1], np.flatnonzero(counts))


def test_strays_come_last(route):
    ids = np.array([[4, -1, 0], [EXPERTS, 4, 1 << 40]])
    order, starts, active = route(ids)
    np.testing.assert_array_equal(order, [2, 0, 4, 1, 3, 5])
    np.testing.assert_array_equal(starts, [0, 1, 1, 1, 1, 3])
    np.testing.assert_array_equal(active[: active[0] + 1], [2, 0, 4])
