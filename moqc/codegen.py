"""From a scheduled module to code: an executable in memory, or a shared library for TVM's virtual machine.

The library's main takes (input_ids, positions, weights, caches), weights and caches as one tuple each, so
that a call does not pass hundreds of arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi
from tvm import IRModule, relax, tirx
from tvm.ir import Call
from tvm.relax.vm_build import VMExecutable

from moqc.errors import TargetError
from moqc.ir.annotations import CACHE
from moqc.ir.sites import bindings, input_count
from moqc.launch_plan import memory_passes, plan_launches
from moqc.launches import FILE
from moqc.manifest import LIBRARY
from moqc.page import write_page
from moqc.passes.base import PassContext
from moqc.passes.last_logits import LAST
from moqc.passes.legalize import Legalize
from moqc.passes.plan_cache import PlanCache
from moqc.passes.schedule import Schedule
from moqc.schedules.cuda.dense import advance_function
from moqc.schedules.cuda.toolchain import prepare
from moqc.targets import Target
from moqc.toolchains import linker

Run = Callable[[npt.NDArray[Any], npt.NDArray[Any]], npt.NDArray[Any]]
_GET_ITEM = "vm.builtin.tuple_getitem"


def bundle(mod: IRModule) -> IRModule:
    """`mod` with the weights and the caches (as CACHE counts them) of main each in one tuple parameter.

    The tuples have no type: the virtual machine would check each of their tensors at every call, a quarter of
    a microsecond each. The kernels check what they are given anyway. `last_logits`' function is bundled too.
    """
    bundled = mod.clone()
    for variable in mod.get_global_vars():
        if variable.name_hint in ("main", LAST):
            bundled.update_func(variable, _bundled(mod, variable.name_hint))
    return bundled


def _bundled(mod: IRModule, name: str) -> relax.Function:
    function, cache = mod[name], CACHE.get(mod)
    parameters = list(function.params)
    split = len(parameters) - (0 if cache is None else len(cache["tensors"]))
    inputs = input_count(function)
    groups = {"weights": parameters[inputs:split], "caches": parameters[split:]}
    builder = relax.BlockBuilder()
    tuples = {group: relax.Var(group, relax.AnyType()) for group in groups}
    with builder.function(name, [*parameters[:inputs], *tuples.values()], dict(function.attrs.items())):
        with builder.dataflow():
            for group, members in groups.items():
                for number, parameter in enumerate(members):
                    arguments = (tuples[group], relax.prim_value(number))
                    item = relax.op.call_pure_packed(_GET_ITEM, *arguments, ty_args=parameter.ty)
                    builder.emit_normalized(relax.VarBinding(parameter, builder.normalize(item)))
            for variable, value in bindings(function):
                builder.emit_normalized(relax.VarBinding(variable, value))
            result = builder.emit_output(function.body.body)
        builder.emit_func_output(result)
    return builder.finalize()[name]


def build(mod: IRModule, target: Target) -> VMExecutable:
    """Compile a module that went through legalize and schedule.

    Memory is planned for the upper bounds of the symbolic sizes (main's attribute ``tir_var_upper_bound``).
    Raises TargetError when an operator calls a function that TVM's runtime library does not have.
    """
    missing = sorted(_called_packed(mod, prefix="tvm.contrib."))
    if missing:
        raise TargetError(
            f"the model needs {', '.join(missing)}, which TVM's runtime library lacks; report this model"
        )
    machine = tvm.target.Target(target.tvm)
    if target.device == "cpu":
        return tvm.compile(bundle(mod), machine)
    prepare(target.architectures)
    # TVM's own pipeline for GPUs would legalize, fuse and schedule once more.
    with machine:
        return relax.build(_with_advance(bundle(mod)), machine, relax_pipeline=_gpu_pipeline())


def _with_advance(mod: IRModule) -> IRModule:
    """`mod` with a function advance(logits, ids, positions): a greedy step in place, on the device."""
    logits = mod["main"].ret_ty
    while isinstance(logits, relax.TupleType):
        logits = logits.fields[0]
    builder, batch = relax.BlockBuilder(mod), tirx.Var("batch", "int64")
    types = [relax.TensorType([batch, 1, logits.shape[-1]], "float32")]
    types += [relax.TensorType([batch, 1], "int64")] * 2
    names = ("logits", "ids", "positions")
    parameters = [relax.Var(name, ty) for name, ty in zip(names, types, strict=True)]
    with builder.function("advance", parameters):
        with builder.dataflow():
            function = builder.add_func(advance_function(int(logits.shape[-1])), "moqc_advance")
            call = relax.op.call_tir_inplace(function, relax.Tuple(parameters), [1, 2], types[1:])
            result = builder.emit_output(call)
        builder.emit_func_output(result)
    built = builder.get()
    return built if mod.attrs is None else built.with_attrs(dict(mod.attrs.items()))


def _gpu_pipeline() -> tvm.transform.Pass:
    """From scheduled kernels to instructions of the virtual machine."""
    return tvm.transform.Sequential(
        [
            *memory_passes(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )


def _called_packed(mod: IRModule, prefix: str) -> set[str]:
    """Names, starting with `prefix`, of the packed functions that PrimFuncs of `mod` call."""
    names: set[str] = set()

    def visit(call: Call) -> None:
        if str(getattr(call.op, "name", "")) == "tirx.tvm_call_packed":
            names.add(str(call.args[0].value))

    for function in mod.functions.values():
        if isinstance(function, tirx.PrimFunc):
            tvm_ffi.structural_walk(function.body, [(Call, visit)])
    return {name for name in names if name.startswith(prefix)}


def export(executable: VMExecutable, path: Path, target: Target) -> None:
    """Write the executable as a shared library, which TVM's runtime loads without its compiler.

    Raises TargetError when there is no linker for the target.
    """
    program = linker(target.machine).require()
    executable.export_library(str(path), cc=str(program))


def write_code(mod: IRModule, target: Target, folder: Path) -> None:
    """Write the code of a module that went through legalize and schedule: a library, or launches."""
    if not target.launched:
        export(build(mod, target), folder / LIBRARY, target)
        return
    launches = plan_launches(mod, target)
    (folder / FILE).write_text(launches.model_dump_json(), encoding="utf-8")
    if launches.language == "webgpu":
        write_page(folder)


def compile_and_run(mod: IRModule, weights: Sequence[npt.NDArray[Any]], target: Target) -> Run:
    """Lower, build and load a module fresh from the front end: the callable (ids, positions) -> logits.

    It is built with caches, as an artifact is, for sequences of up to twice the longest call; what it keeps
    between calls are the caches, and a sequence starts where its position is 0. `weights` are main's
    parameters after the two inputs. ids and positions are int64 [batch, seq]; logits are float32
    [batch, seq, vocabulary].
    """
    bounds = mod["main"].attrs["tir_var_upper_bound"]
    ctx = PassContext(target=target)
    planner = PlanCache(context=2 * int(bounds["seq"]), batch=int(bounds["batch"]), dtype="float32")
    mod = planner(mod, ctx)
    executable = build(Schedule()(Legalize()(mod, ctx), ctx), target)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(weight)) for weight in weights]
    caches = [tvm.runtime.tensor(np.zeros(shape, np.float32)) for shape in CACHE.of(mod)["tensors"]]

    def run(ids: npt.NDArray[Any], positions: npt.NDArray[Any]) -> npt.NDArray[Any]:
        inputs = [tvm.runtime.tensor(np.ascontiguousarray(array, np.int64)) for array in (ids, positions)]
        # The caches that come back are those that went in, written in place.
        result: npt.NDArray[Any] = machine["main"](*inputs, tensors, caches)[0].numpy()
        return result

    return run
