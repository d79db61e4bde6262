"""What operators become for CUDA targets, before any machine code."""

from __future__ import annotations

import tvm
from tvm import relax, tirx

from moqc.ir import ops
from moqc.schedules.cuda.emit import EARLY_LAUNCH, without_early_launch
from moqc.schedules.cuda.lower import lower_prune_routing
from moqc.targets import find_target

LAUNCH = "tirx.kernel_launch_params"


def pruned_module() -> tvm.IRModule:
    tokens, top_k, experts = tirx.Var("t", "int64"), 4, 7
    types = {
        "x": ([tokens, 24], "float32"),
        "ids": ([tokens, top_k], "int64"),
        "weights": ([tokens, top_k], "float32"),
        "positions": ([tokens], "int64"),
        "strength": ([experts], "float32"),
        "limits": ([3], "float32"),
    }
    arguments = [relax.Var(name, relax.TensorType(shape, dtype)) for name, (shape, dtype) in types.items()]
    attributes = {"site": "s", "rule": "mass", "exponent": "2.0", "renormalize": 1, "first": 2}
    builder = relax.BlockBuilder()
    with builder.function("main", arguments):
        with builder.dataflow():
            call = ops.prune_routing(*arguments, **attributes, operands=["strength", "limits"])
            lowered = lower_prune_routing(builder, builder.normalize(call), find_target("cuda"))
            result = builder.emit_output(lowered)
        builder.emit_func_output(result)
    return builder.get()


def kernels(mod: tvm.IRModule) -> list[tirx.PrimFunc]:
    return [function for function in mod.functions.values() if isinstance(function, tirx.PrimFunc)]


def test_pruned_routing_is_one_kernel():
    (kernel,) = kernels(pruned_module())
    facts = dict(kernel.attrs["moqc.kernel"])
    assert (facts["kind"], facts["rule"], facts["experts"]) == ("prune_routing", "mass", 7)
    assert "moqc::prune<7, 4, 24, true, true>" in str(kernel)


def test_kernels_start_early_on_warp_group_gpus_only():
    mod = pruned_module()
    (before,), (after,) = kernels(mod), kernels(without_early_launch(mod))
    assert EARLY_LAUNCH in list(before.attrs[LAUNCH])
    assert [each for each in before.attrs[LAUNCH] if each != EARLY_LAUNCH] == list(after.attrs[LAUNCH])
    assert find_target("cuda").warp_groups
    assert not find_target("cuda:sm_80+sm_90").warp_groups
    assert not find_target("cuda:sm_87@aarch64:cortex-a78ae").warp_groups
