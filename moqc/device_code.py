"""From a scheduled PrimFunc to the source of its kernels and what the host does to launch them.

TVM's own lowering and code generators for OpenCL and WGSL, but for two things: all indices become 32 bits
(WGSL has no others), and the host's part stays TIR, which becomes expressions, not machine code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import IRModule, tirx
from tvm.ir import Call
from tvm.s_tir import transform as s_tir
from tvm.tirx import transform
from tvm.tirx.compilation_pipeline import finalize_device_passes

from moqc.errors import InternalError, TargetError
from moqc.launches import Expression, Kernel, Precision, evaluate
from moqc.schedules.portable.emit import HALF, LOST, REAL_NAME

PREAMBLES = {
    "opencl": f"""static inline float {HALF}(uint word, uint upper) {{
  ushort bits = (ushort)(upper == 0u ? word : word >> 16);
  return vload_half(0, (const half *)&bits);
}}
""",
    "webgpu": f"""fn {HALF}(word : u32, upper : u32) -> f32 {{
  let both = unpack2x16float(word);
  return select(both.x, both.y, upper != 0u);
}}
""",
}
"""What comes before every kernel, after `TYPES`: float16 without the extensions for it."""
_EXPONENT = 0x7F800000
"""Bits of a float32 that are all set where it is infinite or not a number: compilers may take it that it is
never either, but not that of an integer."""
TYPES: dict[str, dict[Precision, str]] = {
    "opencl": {
        "float32": f"""typedef float {REAL_NAME};
static inline int {LOST}(float sum) {{ return 0; }}
""",
        "float16": f"""#pragma OPENCL EXTENSION cl_khr_fp16 : enable
typedef half {REAL_NAME};
static inline int {LOST}(float sum) {{ return (as_int(sum) & {_EXPONENT}) == {_EXPONENT}; }}
""",
    },
    "webgpu": {
        "float32": f"""alias {REAL_NAME} = f32;
fn {LOST}(sum : f32) -> i32 {{ return 0i; }}
""",
        "float16": f"""enable f16;
alias {REAL_NAME} = f16;
fn {LOST}(sum : f32) -> i32 {{ return i32((bitcast<i32>(sum) & {_EXPONENT}i) == {_EXPONENT}i); }}
""",
    },
}
"""Language -> precision -> what every source begins with on a device that has it."""
_REALS = {
    "opencl": ((r"\bconvert_half\b", f"({REAL_NAME})"), (r"\bhalf\b", REAL_NAME)),
    "webgpu": ((r"\bf16\b", REAL_NAME), (r"\b(\d\.\d+e[+-]\d+)h\b", rf"{REAL_NAME}(\1)")),
}
"""What TVM writes for float16, and what takes its place."""
_AXES = ("x", "y", "z")
_BINARY = {
    tirx.Add: "+",
    tirx.Sub: "-",
    tirx.Mul: "*",
    tirx.Div: "/",
    tirx.FloorDiv: "/",
    tirx.Mod: "%",
    tirx.FloorMod: "%",
    tirx.Min: "min",
    tirx.Max: "max",
    tirx.EQ: "==",
    tirx.NE: "!=",
    tirx.LT: "<",
    tirx.LE: "<=",
    tirx.And: "and",
    tirx.Or: "or",
}


@dataclass(frozen=True)
class HostLaunch:
    """A launch as the host's part has it: `buffers` are numbers of the function's parameters."""

    kernel: str
    buffers: tuple[int, ...]
    scalars: tuple[Expression, ...]
    grid: tuple[Expression, Expression, Expression]
    when: Expression = None


@dataclass(frozen=True)
class DeviceCode:
    """The kernels of one PrimFunc, by name, and its launches in its parameters' variables."""

    kernels: dict[str, Kernel]
    launches: tuple[HostLaunch, ...]
    parameters: tuple[Any, ...]


def compile_function(name: str, function: tirx.PrimFunc, target: tvm.target.Target) -> DeviceCode:
    """Generate the kernels of a scheduled PrimFunc; their names start with `name`.

    Raises TargetError for what the language of `target` cannot say.
    """
    function = function.with_attr("global_symbol", name).with_attr("target", target)
    # Kernels written by hand wait where they must; the analysis would have them wait in branches too.
    written = "moqc.kernel" in function.attrs
    lowered = _lowering(generated=not written)(IRModule({name: function}))
    kernels = {}
    for variable, part in lowered.functions_items():
        if "tirx.kernel_launch_params" in (part.attrs or {}):
            kernels[str(variable.name_hint)] = _kernel(variable, part, target)
    host = _Host(lowered[name], {key: kernel.threads for key, kernel in kernels.items()})
    return DeviceCode(kernels, tuple(host.launches), tuple(function.params))


def _lowering(*, generated: bool) -> tvm.transform.Pass:
    """TVM's pipeline for scheduled functions up to the split of host and device, with 32-bit indices.

    `generated` ones get buffers cut to what is used, and barriers where shared memory is read after a write.
    """
    return tvm.transform.Sequential(
        [
            s_tir.CanonicalizeLoop(),
            s_tir.LowerCrossThreadReduction(),
            s_tir.LowerInitBlock(),
            s_tir.PlanAndUpdateBufferAllocationLocation(),
            s_tir.ConvertBlocksToOpaque(),
            s_tir.LiftThreadBinding(),
            *([s_tir.CompactBufferAllocation()] if generated else []),
            s_tir.UnifyThreadBinding(),
            s_tir.LowerMatchBuffer(),
            s_tir.StmtSimplify(),
            s_tir.LowerOpaqueBlock(),
            transform.FlattenBuffer(),
            transform.ForceNarrowIndexToInt32(),
            transform.NarrowDataType(32),
            s_tir.LoopPartition(),
            transform.VectorizeLoop(True),
            transform.StorageRewrite(),
            s_tir.HoistIfThenElse(),
            transform.UnrollLoop(),
            s_tir.RenormalizeSplitPattern(),
            transform.StmtSimplify(),
            transform.RemoveNoOp(),
            s_tir.RewriteUnsafeSelect(),
            transform.CommonSubexprElim(),
            transform.VerifyMemory(),
            transform.AnnotateEntryFunc(),
            *([s_tir.ThreadSync("shared")] if generated else []),
            s_tir.LowerThreadAllreduce(),
            transform.SplitHostDevice(),
        ]
    )


def _kernel(variable: Any, function: tirx.PrimFunc, target: tvm.target.Target) -> Kernel:
    """The source of one device function."""
    device = finalize_device_passes()(IRModule({variable: function}))
    kind = str(target.kind.name)
    text = str(tvm.get_global_func(f"target.build.{kind}")(device, target).inspect_source())
    text = _body(text)
    for written, real in _REALS[kind]:
        text = re.sub(written, real, text)
    if wide := re.search(r"\b(i64|u64|f64)\b", text) if kind == "webgpu" else None:
        raise TargetError(f"{variable.name_hint}: WGSL has no {wide[0]}; report this model")
    extents = {axis: 1 for axis in _AXES}

    def visit(node: tirx.AttrStmt) -> None:
        if node.attr_key == "thread_extent" and node.node.thread_tag.startswith("threadIdx."):
            extents[node.node.thread_tag[-1]] = int(node.value)

    tvm_ffi.structural_walk(function.body, [(tirx.AttrStmt, visit)])
    pointers = sum(isinstance(param.ty, tvm.ir.PointerType) for param in function.params)
    return Kernel(
        source=text,
        threads=(extents["x"], extents["y"], extents["z"]),
        buffers=pointers,
        scalars=len(function.params) - pointers,
    )


def _body(text: str) -> str:
    """Generated text without comments, directives and prototypes."""
    unwanted = re.compile(r"\s*|//.*|#.*|enable .*|__kernel void .*;")
    return "\n".join(line for line in text.splitlines() if not unwanted.fullmatch(line)) + "\n"


class _Host:
    """Reads the launches of a function's host part."""

    def __init__(self, function: tirx.PrimFunc, threads: Mapping[str, tuple[int, int, int]]) -> None:
        self.launches: list[HostLaunch] = []
        self._threads = threads
        self._places = {hash(param): number for number, param in enumerate(function.params)}
        self._views: dict[int, Any] = {}
        self._bound: dict[str, Expression] = {}
        self._visit(function.body, None)

    def _visit(self, statement: Any, when: Expression) -> None:
        if isinstance(statement, tirx.SeqStmt):
            for part in statement.seq:
                self._visit(part, when)
        elif isinstance(statement, tirx.AttrStmt):
            self._visit(statement.body, when)
        elif isinstance(statement, tirx.DeclBuffer):
            self._views[hash(statement.buffer)] = statement.data
        elif isinstance(statement, tirx.Bind):
            self._bound[str(statement.var.name)] = self._expression(statement.value)
        elif isinstance(statement, tirx.IfThenElse):
            condition = self._expression(statement.condition)
            self._visit(statement.then_case, _both(when, condition))
            if statement.else_case is not None:
                self._visit(statement.else_case, _both(when, ["==", condition, 0]))
        elif isinstance(statement, tirx.Evaluate) and isinstance(statement.value, Call):
            self._launch(statement.value, when)
        else:
            raise InternalError(f"a kernel's host part has a {type(statement).__name__}: {statement}")

    def _launch(self, call: Call, when: Expression) -> None:
        if str(call.op.name) != "tirx.call_ffi_kernel":
            raise InternalError(f"a kernel's host part calls {call.op.name}")
        name, *arguments = call.args
        params = [str(param) for param in call.attrs.launch_params]
        values, extents = arguments[: len(arguments) - len(params)], arguments[len(arguments) - len(params) :]
        buffers = [value for value in values if isinstance(value, Call) and "data" in str(value.op.name)]
        sizes = dict(zip(params, extents, strict=True))
        grid = [self._expression(sizes.get(f"blockIdx.{axis}", 1)) for axis in _AXES]
        self.launches.append(
            HostLaunch(
                kernel=str(name.value),
                buffers=tuple(self._place(value) for value in buffers),
                scalars=tuple(self._expression(value) for value in values[len(buffers) :]),
                grid=(grid[0], grid[1], grid[2]),
                when=when,
            )
        )

    def _expression(self, value: Any) -> Expression:
        return expression(value, self._bound)

    def _place(self, data: Any) -> int:
        """The parameter whose data this is, through views of it."""
        buffer = data.args[0]
        while hash(buffer) in self._views:
            buffer = self._views[hash(buffer)].args[0]
        if hash(buffer) not in self._places:
            raise InternalError(f"a kernel reads {buffer}, which is no parameter")
        return self._places[hash(buffer)]


def _both(first: Expression, second: Expression) -> Expression:
    return second if first is None else ["and", first, second]


def expression(value: Any, bound: Mapping[str, Expression] | None = None) -> Expression:
    """A TIR expression of integers as an `Expression` of its variables' names, those `bound` replaced."""

    def operation(operator: str, *operands: Any) -> Expression:
        return [operator, *(expression(operand, bound) for operand in operands)]

    if isinstance(value, (int, tirx.IntImm)):
        return int(value)
    if isinstance(value, tirx.Var):
        return (bound or {}).get(str(value.name), str(value.name))
    if isinstance(value, tirx.Cast):
        return expression(value.value, bound)
    if type(value) in _BINARY:
        return operation(_BINARY[type(value)], value.a, value.b)
    if isinstance(value, tirx.Not):
        return operation("==", value.a, 0)
    if isinstance(value, (tirx.GT, tirx.GE)):
        return operation("<" if isinstance(value, tirx.GT) else "<=", value.b, value.a)
    shifts = {"tirx.shift_right": "/", "tirx.shift_left": "*"}
    if isinstance(value, Call) and str(value.op.name) in shifts:
        return operation(shifts[str(value.op.name)], value.args[0], 1 << int(value.args[1]))
    raise InternalError(f"no launch can be computed from {value} ({type(value).__name__})")


def substitute(value: Expression, bound: Mapping[str, Expression]) -> Expression:
    """The expression with variables replaced, constants folded."""
    if isinstance(value, int) or value is None:
        return value
    if isinstance(value, str):
        return bound[value]
    operator, *operands = value
    operands = [substitute(operand, bound) for operand in operands]
    constant = all(isinstance(operand, int) for operand in operands)
    return evaluate([operator, *operands], {}) if constant else [operator, *operands]
