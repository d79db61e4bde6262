"""The kernel of R.moqc.prune_routing against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from moqc.ir import ops
from moqc.quant.routing import SitePruning, prune
from moqc.schedules.cpu.prune import lower_prune_routing
from moqc.targets import find_target

EXPERTS, HIDDEN = 7, 24


def compiled(top_k: int, ids: str, rule: SitePruning):
    target = find_target("native")
    tokens = tvm.tirx.Var("t", "int64")
    types = {
        "x": ([tokens, HIDDEN], "float32"),
        "ids": ([tokens, top_k], ids),
        "weights": ([tokens, top_k], "float32"),
        "positions": ([tokens], "int64"),
        "strength": ([EXPERTS], "float32"),
        "limits": ([3], "float32"),
    }
    if rule.slopes is not None:
        types["slopes"] = ([EXPERTS, HIDDEN], "float16")
    arguments = [relax.Var(name, relax.TensorType(shape, dtype)) for name, (shape, dtype) in types.items()]
    bb = relax.BlockBuilder()
    with bb.function("main", arguments):
        with bb.dataflow():
            call = ops.prune_routing(
                *arguments,
                site="s",
                rule=rule.kind,
                exponent=repr(rule.exponent),
                renormalize=int(rule.renormalize),
                first=rule.first,
                operands=list(types)[4:],
            )
            result = bb.emit_output(lower_prune_routing(bb, bb.normalize(call), target))
        bb.emit_func_output(result)
    executable = tvm.compile(bb.get(), tvm.target.Target(target.tvm))
    machine = relax.VirtualMachine(executable, tvm.cpu())

    def run(x, chosen, weights, positions):
        limits = np.array([rule.limit, rule.peak, rule.margin], np.float32)
        arrays = [
            x,
            chosen.to(getattr(torch, ids)),
            weights,
            positions,
            rule.strength,
            torch.from_numpy(limits),
            *([] if rule.slopes is None else [rule.slopes]),
        ]
        outputs = machine["main"](*(tvm.runtime.tensor(array.numpy()) for array in arrays))
        return [torch.from_numpy(output.numpy()) for output in outputs]

    return run


def inputs(tokens: int, top_k: int):
    generator = torch.Generator().manual_seed(tokens + top_k)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :top_k]
    ids[torch.rand(ids.shape, generator=generator) < 0.05] = -1
    weights = torch.rand(tokens, top_k, generator=generator) ** 2 + 1e-3
    x = torch.randn(tokens, HIDDEN, generator=generator)
    positions = torch.randint(-1, 9, (tokens,), generator=generator)
    return x, ids, weights, positions


STRENGTH = torch.tensor([0.5, 2.0, 1.0, 0.0, 1.5, 0.7, 1.1])
SLOPES = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(5)).half() / 5
RULES = {
    "mass": SitePruning("mass", 0.8, STRENGTH, True, 1.5, first=2, peak=2.5, margin=0.02),
    "mass, plain": SitePruning("mass", 0.2, torch.ones(EXPERTS), False, 2.0),
    "mass, slopes": SitePruning("mass", 0.3, STRENGTH, False, 2.0, first=1, slopes=SLOPES),
    "ratio": SitePruning("ratio", 0.4, STRENGTH, True, first=1, margin=0.1),
}


@pytest.mark.parametrize(
    ("top_k", "ids", "name"),
    [
        (4, "int64", "mass"),
        (6, "int32", "mass, plain"),
        (4, "int32", "mass, slopes"),
        (2, "int64", "ratio"),
        (1, "int64", "ratio"),
    ],
)
def test_agrees_with_the_reference(top_k, ids, name):
    rule = RULES[name]
    run = compiled(top_k, ids, rule)
    for tokens in (1, 200):
        given = inputs(tokens, top_k)
        kept_ids, kept_weights = run(*given)
        expected_ids, expected_weights = prune(rule, *given)
        assert torch.equal(kept_ids.long(), expected_ids)
        assert torch.allclose(kept_weights, expected_weights, rtol=1e-6, atol=1e-7)
    if top_k > 1:
        assert 0.05 < float((expected_ids == -1).float().mean()) < 0.9
