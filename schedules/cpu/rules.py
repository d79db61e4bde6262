"""Default schedules of the PrimFuncs that are not hand-written: what TVM legalized and fused.

Threads share the outer loops, fused to one; the innermost constant loop is a vector. `guard_parallel` then
keeps small loops on the calling thread: extents are symbolic, so it is decided at run time.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import IRModule, tirx
from tvm.s_tir import Schedule
from tvm.s_tir.dlight.analysis import SBlockInfo, normalize_prim_func
from tvm.s_tir.dlight.base import try_inline
from tvm.s_tir.dlight.base.schedule_rule import ScheduleRule
from tvm.s_tir.stmt import SBlock
from tvm.target import Target

PARALLEL_ELEMENTS = 1 << 15
"""Elements below which a loop stays on its thread; waking the pool costs what some thousand take."""


class CpuDefault(ScheduleRule):  # type: ignore[misc]  # tvm has no types
    """Schedules any function whose blocks are elementwise or reductions; leaves the others as they are."""

    def __init__(self, lanes: int) -> None:
        super().__init__()
        self._lanes = lanes

    def apply(self, func: tirx.PrimFunc, _target: Target, _tunable: bool) -> Schedule | None:
        """The schedule, or None when the function is opaque (a call of an external sort)."""
        schedule = Schedule(func)
        blocks = normalize_prim_func(schedule)
        if blocks is None:
            return None
        for block in try_inline(schedule, blocks):
            self._schedule_block(schedule, block)
        return schedule

    def _schedule_block(self, schedule: Schedule, block: SBlockInfo) -> None:
        loops = schedule.get_loops(block.block_rv)
        kinds = block.dom_kind()
        spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "S"]
        reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "R"]
        if not spatial or len(spatial) + len(reduction) != len(loops):
            return
        extent = schedule.get(spatial[-1]).extent
        vector = None
        if isinstance(extent, tirx.IntImm) and int(extent) % self._lanes == 0:
            *outer, inner = spatial
            rest, vector = schedule.split(inner, [None, self._lanes])
            spatial = [*outer, rest]
        schedule.reorder(*spatial, *reduction, *([] if vector is None else [vector]))
        shared = schedule.fuse(*spatial) if len(spatial) > 1 else spatial[0]
        schedule.parallel(shared)
        if vector is not None:
            schedule.vectorize(vector)
        if reduction:
            # Last: afterwards the block is two.
            schedule.decompose_reduction(block.block_rv, reduction[0])


def guard_parallel(mod: IRModule) -> IRModule:
    """`mod` with the parallel loops of the functions `CpuDefault` scheduled run serially when small."""
    result = mod.clone()
    for variable, function in mod.functions_items():
        if isinstance(function, tirx.PrimFunc) and "moqc.kernel" not in (function.attrs or {}):
            body = tvm_ffi.structural_map(function.body, [(tirx.For, _guarded)])
            result.update_func(variable, function.with_body(body))
    return result


def _guarded(loop: tirx.For) -> tirx.Stmt:
    if loop.kind != tirx.ForKind.PARALLEL:
        return loop
    serial = tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)
    big = loop.extent * _elements(loop.body) > PARALLEL_ELEMENTS
    return tirx.IfThenElse(big, loop, _copy(serial))


def _copy(loop: tirx.For) -> tirx.For:
    """`loop` with variables of its own: two branches may not define the same ones."""
    fresh: dict[tirx.Var, tirx.Var] = {}

    def rename(variable: tirx.Var) -> None:
        fresh[variable] = tirx.Var(variable.name, variable.ty)

    def rename_axes(block: SBlock) -> None:
        for axis in block.iter_vars:
            rename(axis.var)

    tvm_ffi.structural_walk(loop, [(tirx.For, lambda inner: rename(inner.loop_var)), (SBlock, rename_axes)])
    return tvm_ffi.structural_map(loop, [(tirx.Var, lambda variable: fresh.get(variable, variable))])


def _elements(body: Any) -> int:
    """The product of the constant extents of the loops in `body`, as far as they nest."""
    found = [1]

    def visit(loop: tirx.For) -> None:
        if isinstance(loop.extent, tirx.IntImm):
            found[0] = max(found[0], int(loop.extent) * _elements(loop.body))

    tvm_ffi.structural_walk(body, [(tirx.For, visit)])
    return found[0]
