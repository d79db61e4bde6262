"""schedule: every operator becomes a scheduled function that computes the same."""

import dataclasses

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from moqc.errors import TargetError
from moqc.ir.text import parse_module
from moqc.passes.base import PassContext
from moqc.passes.schedule import Schedule
from moqc.targets import TARGETS, find_target

MODULE = """
n = TypeVar("n")
m = TypeVar("m")
@I.ir_module
class Module:
    @R.function
    def main(
        x: R.Tensor((n, m, 64), "float32"), w: R.Tensor((64, 48), "float32"), b: R.Tensor((48,), "float32")
    ):
        with R.dataflow():
            soft = R.nn.softmax(x)
            product = R.matmul(soft, w)
            biased = R.add(product, b)
            turned = R.permute_dims(biased, axes=[1, 0, 2])
            left = R.strided_slice(turned, axes=[2], begin=[0], end=[24])
            right = R.strided_slice(turned, axes=[2], begin=[24], end=[48])
            minus = R.negative(right)
            rotated = R.concat((minus, left), axis=-1)
            total = R.sum(rotated, axis=[-1], keepdims=True)
            y = R.subtract(rotated, total)
            R.output(y)
        return y
"""


def expected(x, w, b):
    soft = np.exp(x - x.max(-1, keepdims=True))
    turned = ((soft / soft.sum(-1, keepdims=True)) @ w + b).transpose(1, 0, 2)
    rotated = np.concatenate([-turned[..., 24:], turned[..., :24]], -1)
    return rotated - rotated.sum(-1, keepdims=True)


def functions(mod):
    return [function for function in mod.functions.values() if isinstance(function, tirx.PrimFunc)]


def test_results_are_the_same_for_small_and_big_sizes():
    target = find_target("native")
    mod = Schedule()(parse_module(MODULE), PassContext(target=target))
    machine = relax.VirtualMachine(tvm.compile(mod, tvm.target.Target(target.tvm)), tvm.cpu())
    random = np.random.default_rng(0)
    w, b = (random.standard_normal(shape).astype(np.float32) for shape in ((64, 48), (48,)))
    # The second is beyond what stays on one thread.
    for shape in ((1, 3, 64), (4, 200, 64)):
        x = random.standard_normal(shape).astype(np.float32)
        y = machine["main"](*(tvm.runtime.tensor(a) for a in (x, w, b))).numpy()
        np.testing.assert_allclose(y, expected(x, w, b), atol=1e-4)


def test_everything_is_scheduled_and_parallel_loops_are_guarded():
    mod = Schedule()(parse_module(MODULE), PassContext(target=TARGETS["x86-64-v4"]))
    assert "R.nn.softmax" not in mod.script()
    for function in functions(mod):
        assert function.attrs["tirx.is_scheduled"]
        text = function.script()
        assert text.count("T.parallel(") == text.count("> T.int64(32768):"), text
        assert "T.parallel(" in text
    # The product, whose last axis is 48, is vectorized by the 16 lanes of AVX-512.
    assert any("T.vectorized(T.int64(16))" in function.script() for function in functions(mod))


def test_the_given_module_is_not_touched():
    mod = parse_module(MODULE)
    before = mod.script()
    Schedule()(mod, PassContext(target=TARGETS["x86-64-v3"]))
    assert mod.script() == before


def test_a_target_without_schedules_is_refused():
    target = dataclasses.replace(TARGETS["x86-64-v3"], schedules="abacus")
    with pytest.raises(TargetError, match="abacus"):
        Schedule()(parse_module(MODULE), PassContext(target=target))
