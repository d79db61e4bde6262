"""How a PrimFunc for NVIDIA GPUs is put together: its parameters, and launches of device functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from typing import Any

from tvm import IRModule, tirx
from tvm.backend.cuda.op import cuda_func_call
from tvm.s_tir.stmt import SBlock, SBlockRealize
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moqc.quant.formats import Format
from moqc.quant.pack_mma import packed_shapes
from moqc.schedules.cuda.templates import SOURCES

EARLY_LAUNCH = "tirx.use_programtic_dependent_launch"
"""TVM's launch parameter, in its spelling: a kernel may start before the one ahead ends. From sm_90 on."""
_LAUNCH_PARAMETERS = "tirx.kernel_launch_params"


@cache
def _source() -> str:
    folder = resources.files("moqc.schedules.cuda")
    return "\n".join(folder.joinpath(name).read_text() for name in SOURCES)


def scale_type(format: Format) -> str:
    """How a format's scales are stored."""
    return "uint8" if format.byte_scales else "float16"


class Kernel:
    """A PrimFunc being built."""

    def __init__(self, builder: IRBuilder) -> None:
        self._builder = builder

    def parameter(self, name: str, shape: Sequence[Any], dtype: str) -> Any:
        """Declare the next parameter, a buffer; the address of its first element."""
        extents = [tirx.const(extent, "int64") if isinstance(extent, int) else extent for extent in shape]
        buffer = IRBuilder.name(name, T.match_buffer(T.arg(name, T.handle()), extents, dtype))
        return T.address_of(buffer[tuple(0 for _ in buffer.shape)])

    def bytes(self, name: str, size: Any) -> Any:
        """Declare the next parameter, `size` bytes; the buffer."""
        return IRBuilder.name(name, T.match_buffer(T.arg(name, T.handle()), [size], "uint8"))

    def packed(self, name: str, formats: Sequence[Format], rows: int, columns: int) -> list[Any]:
        """Declare the tensors of a projection's classes; pointers to codes, scales and zeros of each."""
        pointers = []
        for number, fmt in enumerate(formats):
            count = tirx.Var(f"{name}_{number}", "int64")
            codes_shape, groups_shape = packed_shapes(fmt, rows, columns)
            prefix = f"{name}_{number}_"
            codes = self.parameter(prefix + "codes", [count, *codes_shape], "uint8")
            scales = self.parameter(prefix + "scales", [count, *groups_shape], scale_type(fmt))
            zeros = codes  # never read
            if not fmt.symmetric:
                zeros = self.parameter(prefix + "zeros", [count, *groups_shape], "uint8")
            pointers += [codes, scales, zeros]
        return pointers

    def launch(self, blocks: Any, threads: int, shared: int, function: str, *arguments: Any) -> None:
        """Run `function` of the device code, on a pointer to `shared` bytes first if any."""
        grid = tirx.const(blocks, "int32") if isinstance(blocks, int) else tirx.Cast("int32", blocks)
        with (
            T.launch_thread("blockIdx.x", grid),
            T.launch_thread("threadIdx.x", tirx.const(threads, "int32")),
        ):
            memory = []
            if shared:
                # The whole buffer: TVM shrinks one of which it only sees the address of an element.
                memory = [T.alloc_buffer((shared,), "uint8", scope="shared.dyn").data]
            T.evaluate(cuda_func_call(function, *memory, *arguments, source_code=_source()))

    def finish(self) -> tirx.PrimFunc:
        """The function. Each of its kernels may start before the one ahead ends, and waits itself."""
        # The shared memory's size has to come last.
        parameters = ["blockIdx.x", "threadIdx.x", EARLY_LAUNCH, "tirx.use_dyn_shared_memory"]
        function = self._builder.get()
        # Relax's RewriteDataflowReshape wants a root block.
        block = SBlock([], [], [], "root", function.body)
        function = function.with_body(SBlockRealize([], tirx.const(True, "bool"), block))
        return function.with_attr(_LAUNCH_PARAMETERS, parameters)


def without_early_launch(mod: IRModule) -> IRModule:
    """`mod` for GPUs before sm_90: every kernel starts when the one ahead has ended."""
    changed = mod.clone()
    for name, function in mod.functions_items():
        given = (function.attrs or {}).get(_LAUNCH_PARAMETERS)
        if given is not None:
            kept = [str(each) for each in given if str(each) != EARLY_LAUNCH]
            changed.update_func(name, function.with_attr(_LAUNCH_PARAMETERS, kept))
    return changed


@contextmanager
def kernel(kind: str, **facts: Any) -> Iterator[Kernel]:
    """Build a PrimFunc: opaque to fusion, scheduled, its facts under ``moqc.kernel``."""
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
        yield Kernel(builder)
