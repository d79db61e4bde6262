"""The C++ names of the device code's templates, and the geometry of launches; no TVM here."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from moqc.errors import InternalError
from moqc.quant.activations import parse_activation
from moqc.quant.formats import Format
from moqc.quant.pack_mma import COLUMNS, ROWS
from moqc.schedules.cuda.plan import COLUMN_TOKENS, SHARED_BYTES, ExpertsShape, Plan, shared_bytes
from moqc.schedules.cuda.quads import QuadsPlan
from moqc.schedules.cuda.rows import RowsPlan, rows_bytes

SOURCES = (
    "trellis.cu",
    "device.cu",
    "decoding.cu",
    "activations.cu",
    "bytes.cu",
    "stream.cu",
    "decode.cu",
    "routing.cu",
    "wgmma.cu",
    "gather.cu",
    "prefill_tiles.cu",
    "quads.cu",
    "prefill_multiply.cu",
    "prefill_bytes.cu",
    "prefill.cu",
    "prefill_gate_up.cu",
    "prefill_down.cu",
    "rows.cu",
    "rows_gate_up.cu",
    "rows_down.cu",
    "quad_shares.cu",
    "quad_blocks.cu",
    "quads_layer.cu",
    "linear.cu",
    "prefill_mma.cu",
    "heads.cu",
    "attention.cu",
    "dense.cu",
)
"""The device code, in the order of its parts."""
AnyPlan = Plan | RowsPlan | QuadsPlan
SlotsPlan = Plan | RowsPlan
"""Of kernels for slots: an expert and up to 8 of its tokens, from lists."""
CPP = {"int32": "int", "int64": "long long"}
BIASES = ("gate_bias", "up_bias", "down_bias")


def parse_plan(text: str) -> AnyPlan:
    """Read a plan of either kind; the inverse of `str`."""
    kind = QuadsPlan if "q" in text else RowsPlan if "p" in text else Plan
    return kind.parse(text)


def block_bytes(plan: SlotsPlan, projections: int, formats: Sequence[Format]) -> int:
    """Shared memory of a block."""
    if isinstance(plan, RowsPlan):
        return rows_bytes(plan, projections, formats)
    return shared_bytes(plan, projections, formats)


def format_of(format: Format) -> str:
    """The C++ type of a format."""
    flags = f"{str(format.symmetric).lower()}, {str(format.byte_scales).lower()}"
    flags += ", true" if format.trellis else ""
    return f"moqc::Format<{format.bits}, {format.group}, {flags}>"


def formats_of(formats: Sequence[Format]) -> str:
    """The C++ type of a list of formats."""
    return f"moqc::Formats<{', '.join(map(format_of, formats))}>"


def layer_of(shape: ExpertsShape) -> str:
    """The C++ type of a layer."""
    activation = parse_activation(shape.activation)
    alpha, limit = (
        f"0x{struct.unpack('<I', struct.pack('<f', value))[0]:08x}u"
        for value in (activation.alpha, activation.limit)
    )
    function = f"moqc::act_{activation.kind}<{alpha}, {limit}>"
    biases = sum(1 << BIASES.index(name) for name in shape.biases)
    return f"moqc::Layer<{shape.hidden}, {shape.intermediate}, {shape.experts}, {biases}, {function}>"


def distinct(*lists: Sequence[Format]) -> list[Format]:
    """Every format once, the widest first."""
    return sorted({fmt for formats in lists for fmt in formats}, key=lambda fmt: (-fmt.bits, fmt))


def gate_up_of(
    shape: ExpertsShape, plan: SlotsPlan, id_dtype: str, *, routed: bool = False
) -> tuple[str, int]:
    """The function of the first product, and a block's shared memory; `routed`: slots are a router's ids."""
    formats, projections = distinct(shape.gate, shape.up), 2 if shape.gate else 1
    lists = ", ".join(map(formats_of, (shape.gate, shape.up, formats)))
    if isinstance(plan, RowsPlan):
        plan.check(shape.hidden, whole=True)
        shared, function = _fitting(plan, rows_bytes(plan, projections, formats)), "gate_up_rows"
    else:
        shared, function = _check(plan, shape.intermediate, projections, formats), "gate_up"
        if plan.warps != -(-shape.hidden // COLUMNS):
            raise InternalError(f"plan {plan}: gate and up want a warp for each {COLUMNS} of {shape.hidden}")
    flag = str(routed).lower()
    return f"moqc::{function}<{layer_of(shape)}, {_plan(plan)}, {flag}, {lists}, {CPP[id_dtype]}>", shared


def down_of(
    shape: ExpertsShape, plan: SlotsPlan, id_dtype: str, *, adds: bool, many: bool = False
) -> tuple[str, int]:
    """The same of the second product; `adds`: to y, for several blocks share a result."""
    formats = distinct(shape.down)
    lists = f"{formats_of(shape.down)}, {formats_of(formats)}"
    if isinstance(plan, RowsPlan):
        plan.check(shape.intermediate, whole=False)
        shared = _fitting(plan, rows_bytes(plan, 1, formats))
        return f"moqc::down_rows<{layer_of(shape)}, {_plan(plan)}, {lists}, {CPP[id_dtype]}>", shared
    shared = _check(plan, shape.hidden, 1, formats)
    flags = f"{str(adds).lower()}, {str(many).lower()}"
    return f"moqc::down<{layer_of(shape)}, {_plan(plan)}, {flags}, {lists}, {CPP[id_dtype]}>", shared


def gate_up_groups(shape: ExpertsShape, plan: SlotsPlan) -> int:
    """Blocks of the first product for each slot, or tile of slots."""
    return _groups(plan, shape.intermediate)


def down_groups(shape: ExpertsShape, plan: SlotsPlan) -> int:
    """Blocks of the second product for each of its slices of columns."""
    return _groups(plan, shape.hidden)


def _groups(plan: SlotsPlan, rows: int) -> int:
    if isinstance(plan, RowsPlan):
        return plan.groups(rows)
    return -(-rows // ROWS) // (plan.tiles * plan.items)


def _plan(plan: SlotsPlan) -> str:
    if isinstance(plan, RowsPlan):
        numbers = plan.warps, plan.pairs, plan.units, plan.split, plan.depth, plan.tokens
        return f"moqc::RowsPlan<{', '.join(map(str, numbers))}>"
    registers = str(plan.registers).lower()
    return f"moqc::Plan<{plan.warps}, {plan.tiles}, {plan.stages}, {registers}, {plan.tokens}, {plan.items}>"


def _fitting(plan: RowsPlan, shared: int) -> int:
    if shared > SHARED_BYTES:
        raise InternalError(f"plan {plan} does not fit a block ({shared} bytes of shared memory)")
    return shared


def _check(plan: Plan, rows: int, projections: int, formats: Sequence[Format]) -> int:
    """The shared memory of a block; InternalError for a plan that cannot work."""
    shared = shared_bytes(plan, projections, formats)
    tiles, total = -(-rows // ROWS), projections * plan.tiles
    if (
        tiles % (plan.tiles * plan.items)
        or plan.tokens not in (1, COLUMN_TOKENS)
        or (plan.tokens == 1 and not (plan.registers and plan.items == 1))
        or shared > SHARED_BYTES
        or plan.warps > 32
    ):
        raise InternalError(f"plan {plan} does not fit {tiles} row tiles ({shared} bytes of shared memory)")
    if plan.tokens > 1 and plan.registers and total % plan.stages and plan.tiles % plan.stages:
        raise InternalError(f"plan {plan}: {total} tiles are no whole windows of registers")
    return shared
