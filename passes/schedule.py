"""schedule: what legalize left to TVM -> PrimFuncs, fused and scheduled for the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import tvm
from tvm import IRModule, relax
from tvm.s_tir import dlight

from moqc.errors import TargetError
from moqc.passes.base import Pass, PassContext
from moqc.schedules.cpu.rules import CpuDefault, guard_parallel
from moqc.schedules.cuda.rules import schedule_for_gpu
from moqc.targets import Target


@dataclass(frozen=True)
class Schedule(Pass):
    """Legalize, fuse and schedule the operators that have no kernel of moqc's own."""

    name: ClassVar[str] = "schedule"

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Lower main for `ctx.target`. Raises TargetError when there are no schedules for it."""
        target: Target = ctx.need("target", self.name)
        if target.schedules not in ("cpu", "cuda", "portable"):
            raise TargetError(f"schedule: none for target {target.name} (schedules {target.schedules})")
        fuse = tvm.transform.Sequential(
            [
                relax.backend.DispatchSampling(),
                relax.backend.DispatchSortScan(),
                relax.transform.LegalizeOps(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FoldConstant(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                # Before scheduling, which hides that a function only copies: reshapes become views.
                relax.transform.RewriteDataflowReshape(),
                relax.transform.DeadCodeElimination(),
            ]
        )
        with tvm.target.Target(target.tvm):
            # The rules change the module they are given; it must not be the caller's.
            fused = fuse(mod).clone()
            if target.schedules != "cpu":
                return schedule_for_gpu(fused, target.warp_groups or target.launched)
            return guard_parallel(dlight.ApplyDefaultSchedule(CpuDefault(target.vector_lanes))(fused))
