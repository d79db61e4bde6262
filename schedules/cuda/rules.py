"""Default schedules of the PrimFuncs that are not hand-written: what TVM legalized and fused."""

from __future__ import annotations

from tvm import IRModule
from tvm.s_tir import dlight

from moqc.schedules.cuda.emit import without_early_launch


def schedule_for_gpu(mod: IRModule, early_launch: bool) -> IRModule:
    """`mod`, which is changed, with every unscheduled PrimFunc bound to threads; needs a target's scope.

    `early_launch`: whether kernels may start before the ones ahead have ended.
    """
    rules = dlight.ApplyDefaultSchedule(
        dlight.gpu.Matmul(),
        dlight.gpu.GEMV(),
        dlight.gpu.Reduction(),
        dlight.gpu.GeneralReduction(),
        dlight.gpu.Fallback(),
    )
    scheduled = rules(mod)
    return scheduled if early_launch else without_early_launch(scheduled)
