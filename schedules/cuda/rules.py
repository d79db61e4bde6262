"""Default schedules of the PrimFuncs that are not hand-written: what TVM legalized and fused."""

from __future__ import annotations

from tvm import IRModule
from tvm.s_tir import dlight


def schedule_for_gpu(mod: IRModule) -> IRModule:
    """`mod`, which is changed, with every unscheduled PrimFunc bound to threads; needs a target's scope."""
    rules = dlight.ApplyDefaultSchedule(
        dlight.gpu.Matmul(),
        dlight.gpu.GEMV(),
        dlight.gpu.Reduction(),
        dlight.gpu.GeneralReduction(),
        dlight.gpu.Fallback(),
    )
    return rules(mod)
