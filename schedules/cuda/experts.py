"""The decode kernels (1 to 8 tokens) of an experts block with packed weights, for NVIDIA GPUs.

Two launches a layer: `gate_up_kernel` (with the activation function and the routing weight) and `down_kernel`
(with the weighted sum); for 2 to 8 tokens `route_kernel` before them lists the experts hit. Each expert hit
is read once, whatever its formats: all bit classes of a layer, different ones for gate, up and down too, are
in one launch. The device code is ``device.cu``; here its templates are chosen and TVM is told how to launch
them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any

from tvm import tirx
from tvm.backend.cuda.op import cuda_func_call
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moqc.errors import InternalError, UserError
from moqc.quant.activations import parse_activation
from moqc.quant.formats import Format
from moqc.quant.pack_mma import COLUMNS, ROWS, packed_shapes
from moqc.schedules.cuda.plan import MAX_TOKENS, SHARED_BYTES, ExpertsShape, Plan, shared_bytes


def _format(fmt: Format) -> str:
    return f"moqc::Format<{fmt.bits}, {fmt.group}, {str(fmt.symmetric).lower()}>"


def _formats(formats: Sequence[Format]) -> str:
    return f"moqc::Formats<{', '.join(map(_format, formats))}>"


def _layer(shape: ExpertsShape) -> str:
    activation = parse_activation(shape.activation)
    alpha, limit = (
        f"0x{struct.unpack('<I', struct.pack('<f', value))[0]:08x}u"
        for value in (activation.alpha, activation.limit)
    )
    function = f"moqc::act_{activation.kind}<{alpha}, {limit}>"
    return f"moqc::Layer<{shape.hidden}, {shape.intermediate}, {shape.experts}, {function}>"


def _plan(plan: Plan) -> str:
    registers = str(plan.registers).lower()
    return f"moqc::Plan<{plan.warps}, {plan.tiles}, {plan.stages}, {registers}, {plan.tokens}, {plan.items}>"


def _distinct(*lists: Sequence[Format]) -> list[Format]:
    """Every format once, the widest first."""
    return sorted({fmt for formats in lists for fmt in formats}, key=lambda fmt: (-fmt.bits, fmt))


class _Kernel:
    """A PrimFunc that launches one device function."""

    def __init__(self, builder: IRBuilder) -> None:
        self._builder = builder

    def parameter(self, name: str, shape: Sequence[Any], dtype: str) -> Any:
        """Declare the next parameter, a buffer."""
        extents = [tirx.const(extent, "int64") if isinstance(extent, int) else extent for extent in shape]
        return IRBuilder.name(name, T.match_buffer(T.arg(name, T.handle()), extents, dtype))

    def packed(self, name: str, formats: Sequence[Format], rows: int, columns: int) -> list[Any]:
        """Declare the tensors of a projection's classes; pointers to codes, scales and zeros of each."""
        pointers = []
        for number, fmt in enumerate(formats):
            count = tirx.Var(f"{name}_{number}", "int64")
            codes_shape, groups_shape = packed_shapes(fmt, rows, columns)
            prefix = f"{name}_{number}_"
            codes = self.parameter(prefix + "codes", [count, *codes_shape], "uint8")
            scales = self.parameter(prefix + "scales", [count, *groups_shape], "float16")
            zeros = codes  # never read
            if not fmt.symmetric:
                zeros = self.parameter(prefix + "zeros", [count, *groups_shape], "uint8")
            pointers += [pointer(codes), pointer(scales), pointer(zeros)]
        return pointers

    def launch(self, blocks: int, threads: int, shared: int, function: str, *arguments: Any) -> None:
        """Run `function` of device.cu (template arguments too), on a pointer to `shared` bytes if any."""
        source = resources.files("moqc.schedules.cuda").joinpath("device.cu").read_text()
        with (
            T.launch_thread("blockIdx.x", tirx.const(blocks, "int32")),
            T.launch_thread("threadIdx.x", tirx.const(threads, "int32")),
        ):
            memory = []
            if shared:
                # The whole buffer: TVM shrinks one of which it only sees the address of an element.
                memory = [T.alloc_buffer((shared,), "uint8", scope="shared.dyn").data]
            T.evaluate(cuda_func_call(function, *memory, *arguments, source_code=source))

    def finish(self, *, overlaps: bool) -> tirx.PrimFunc:
        """The function; if it `overlaps`, it may start before the kernel ahead ends, and waits itself."""
        function = self._builder.get()
        if not overlaps:
            return function
        # "programtic" is TVM's spelling; the shared memory's size has to come last.
        parameters = ["blockIdx.x", "threadIdx.x", "tirx.use_programtic_dependent_launch"]
        return function.with_attr("tirx.kernel_launch_params", [*parameters, "tirx.use_dyn_shared_memory"])


@contextmanager
def _kernel(kind: str, **facts: Any) -> Iterator[_Kernel]:
    builder = IRBuilder()
    with builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr(
            {
                "tirx.noalias": True,
                "tirx.is_scheduled": True,
                "op_pattern": 8,  # opaque: FuseOps leaves it alone
                "moqc.kernel": {"kind": kind, **facts},
            }
        )
        yield _Kernel(builder)


def pointer(buffer: Any) -> Any:
    """The address of a buffer's first element."""
    return T.address_of(buffer[tuple(0 for _ in buffer.shape)])


def _check(shape: ExpertsShape, plan: Plan, rows: int, projections: int, formats: Sequence[Format]) -> int:
    """The shared memory of a block; InternalError for a plan that cannot work."""
    shared = shared_bytes(plan, projections, formats)
    tiles, total = -(-rows // ROWS), projections * plan.tiles
    if (
        tiles % (plan.tiles * plan.items)
        or plan.tokens not in (1, MAX_TOKENS)
        or shared > SHARED_BYTES
        or plan.warps > 32
    ):
        raise InternalError(f"plan {plan} does not fit {tiles} row tiles ({shared} bytes of shared memory)")
    if plan.registers and total % plan.stages and plan.tiles % plan.stages:
        raise InternalError(f"plan {plan}: {total} tiles are no whole windows of registers")
    return shared


def route_kernel(shape: ExpertsShape, dtype: str) -> tirx.PrimFunc:
    """Build the list of experts that 2 to 8 tokens hit.

    Parameters of the PrimFunc: ids `dtype` ``[T, top_k]``, weights float32 ``[T, top_k]``, and the outputs
    slots int32 ``[S]`` (experts hit, rising), shares float32 ``[S, 8]`` (weight of the expert for each token)
    and hit int32 ``[1]`` (how many slots are used); ``S = shape.slots(8)``. Ids out of range are dropped.
    """
    if shape.experts > 1024:
        raise UserError(f"{shape.experts} experts: the CUDA kernels take up to 1024")
    with _kernel("route", experts=shape.experts, top_k=shape.top_k) as k:
        tokens, slots = tirx.Var("t", "int64"), shape.slots(MAX_TOKENS)
        ids = k.parameter("ids", [tokens, shape.top_k], dtype)
        weights = k.parameter("weights", [tokens, shape.top_k], "float32")
        outputs = [
            k.parameter("slots", [slots], "int32"),
            k.parameter("shares", [slots, MAX_TOKENS], "float32"),
            k.parameter("hit", [1], "int32"),
        ]
        arguments = [pointer(ids), pointer(weights), tirx.Cast("int32", tokens), *map(pointer, outputs)]
        threads = -(-shape.experts // 32) * 32
        k.launch(1, threads, 0, f"moqc::route<{shape.experts}, {shape.top_k}>", *arguments)
    return k.finish(overlaps=False)


def gate_up_kernel(shape: ExpertsShape, plan: Plan, x_dtype: str, id_dtype: str = "int32") -> tirx.PrimFunc:
    """Build the first product with the activation function.

    Parameters of the PrimFunc: x `x_dtype` ``[T, H]`` (float16 or float32, read as float16: below 4094),
    slots `id_dtype` ``[S]``, shares float32 ``[S, plan.tokens]``, hit int32 ``[1]`` (not for 1 token), table
    int32 ``[3, E, 2]``, the classes of gate, then of up (codes, scales, zeros unless symmetric), and the
    outputs hidden float16 ``[S, plan.tokens, I]`` and y float32 ``[T, H]``, which is cleared for
    `down_kernel`. For 1 token, slots and shares are the router's ids and weights. A projection of one class
    holds all experts in order.
    """
    formats = _distinct(shape.gate, shape.up)
    shared = _check(shape, plan, shape.intermediate, 2 if shape.gate else 1, formats)
    if plan.warps != -(-shape.hidden // COLUMNS):
        raise InternalError(f"plan {plan}: gate and up want a warp for each {COLUMNS} of {shape.hidden}")
    with _kernel("gate_up", plan=str(plan), formats=[str(fmt) for fmt in formats]) as k:
        tokens, slots = tirx.Var("t", "int64"), shape.slots(plan.tokens)
        x = k.parameter("x", [tokens, shape.hidden], x_dtype)
        named = k.parameter("slots", [slots], id_dtype)
        shares = k.parameter("shares", [slots, plan.tokens], "float32")
        hit = k.parameter("hit", [1], "int32") if plan.tokens > 1 else None
        table = k.parameter("table", [3, shape.experts, 2], "int32")
        gate = k.packed("gate", shape.gate, shape.intermediate, shape.hidden)
        up = k.packed("up", shape.up, shape.intermediate, shape.hidden)
        hidden = k.parameter("hidden", [slots, plan.tokens, shape.intermediate], "float16")
        y = k.parameter("y", [tokens, shape.hidden], "float32")
        lists = ", ".join(map(_formats, (shape.gate, shape.up, formats)))
        arguments = [pointer(x), tirx.Cast("int32", tokens), pointer(named), pointer(shares)]
        arguments += [pointer(table if hit is None else hit), pointer(table), pointer(hidden), pointer(y)]
        blocks = slots * (-(-shape.intermediate // ROWS) // (plan.tiles * plan.items))
        function = f"moqc::gate_up<{_layer(shape)}, {_plan(plan)}, {lists}>"
        k.launch(blocks, 32 * plan.warps, shared, function, *arguments, *gate, *up)
    return k.finish(overlaps=plan.tokens > 1)


def down_kernel(shape: ExpertsShape, plan: Plan, id_dtype: str = "int32") -> tirx.PrimFunc:
    """Build the second product with the weighted sum over a token's experts.

    Parameters of the PrimFunc: hidden float16 ``[S, plan.tokens, I]``, slots, hit and table as for
    `gate_up_kernel`, the classes of down, and y float32 ``[T, H]``, added to in place. Where one block sees
    all experts (1 token and ``plan.warps >= top_k * ceil(I / 256)``), y is written and its bits are the same
    every time; else the order in which blocks add to it is not fixed.
    """
    shared = _check(shape, plan, shape.hidden, 1, shape.down)
    formats = _distinct(shape.down)
    with _kernel("down", plan=str(plan), formats=[str(fmt) for fmt in formats]) as k:
        tokens, slots = tirx.Var("t", "int64"), shape.slots(plan.tokens)
        hidden = k.parameter("hidden", [slots, plan.tokens, shape.intermediate], "float16")
        named = k.parameter("slots", [slots], id_dtype)
        hit = k.parameter("hit", [1], "int32") if plan.tokens > 1 else None
        table = k.parameter("table", [3, shape.experts, 2], "int32")
        down = k.packed("down", shape.down, shape.hidden, shape.intermediate)
        y = k.parameter("y", [tokens, shape.hidden], "float32")
        slices = -(-slots * -(-shape.intermediate // COLUMNS) // plan.warps)
        adds = str(slices > 1 or plan.tokens > 1).lower()
        function = (
            f"moqc::down<{_layer(shape)}, {_plan(plan)}, {adds}, {_formats(shape.down)}, {_formats(formats)}>"
        )
        arguments = [pointer(hidden), tirx.Cast("int32", tokens), pointer(named)]
        arguments += [pointer(table if hit is None else hit), tirx.const(shape.top_k, "int32")]
        blocks = slices * (-(-shape.hidden // ROWS) // (plan.tiles * plan.items))
        k.launch(blocks, 32 * plan.warps, shared, function, *arguments, pointer(table), pointer(y), *down)
    return k.finish(overlaps=True)
