"""last-logits: a function whose logits are those of main's last token."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from moqc.ir.annotations import PARAMS
from moqc.ir.text import parse_module, print_module
from moqc.passes.base import PassContext
from moqc.passes.pipeline import Pipeline
from moqc.targets import find_target

MAIN = """
batch = TypeVar("batch")
seq = TypeVar("seq")
@I.ir_module
class Module:
    I.module_attrs({"moqc.params": ["table", "head"], "moqc.schema": 1})
    @R.function
    def main(
        ids: R.Tensor((batch, seq), "int64"),
        positions: R.Tensor((batch, seq), "int64"),
        table: R.Tensor((10, 8), "float32"),
        head: R.Tensor((10, 8), "float32"),
    ):
        R.func_attr({"tir_var_upper_bound": {"batch": 2, "seq": 16}})
        with R.dataflow():
            rows = R.take(table, R.reshape(ids, R.shape([batch * seq])), axis=0)
            x = R.reshape(rows, R.shape([batch, seq, 8]))
            scores = R.matmul(x, R.permute_dims(head))
            small = R.multiply(scores, R.const(0.5, "float32"))
            capped = R.tanh(small)
            R.output(capped)
        return capped
"""


def run(text: str):
    mod = parse_module(text)
    return mod, Pipeline.parse("last-logits").run(mod, PassContext())


def test_it_computes_what_main_computes_for_the_last_token():
    _, mod = run(MAIN)
    assert PARAMS.of(mod) == ["table", "head"]
    assert dict(mod["last"].attrs["tir_var_upper_bound"]) == {"batch": 2, "seq": 16}
    target = find_target("native")
    lowered = Pipeline.parse("legalize,schedule").run(mod, PassContext(target))
    machine = relax.VirtualMachine(tvm.compile(lowered, tvm.target.Target(target.tvm)), tvm.cpu())
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 10, (2, 7))
    weights = [generator.standard_normal((10, 8)).astype(np.float32) for _ in range(2)]
    arguments = [tvm.runtime.tensor(each) for each in (ids, ids, *weights)]
    everything, last = (machine[name](*arguments).numpy() for name in ("main", "last"))
    assert last.shape == (2, 1, 10)
    np.testing.assert_allclose(last[:, 0], everything[:, -1], rtol=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        MAIN.replace("R.tanh(small)", "R.nn.softmax(small, axis=1)"),  # mixes tokens after the product
        MAIN.replace('R.multiply(scores, R.const(0.5, "float32"))', "R.add(scores, scores)"),
        MAIN.replace("R.matmul(x, R.permute_dims(head))", "R.add(x, x)"),
    ],
)
def test_other_ends_are_left_alone(text):
    assert text != MAIN
    before, after = run(text)
    assert [variable.name_hint for variable in after.get_global_vars()] == ["main"]
    assert print_module(before) == print_module(after)
