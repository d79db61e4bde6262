"""What the kernels of a layer leave for each other: the sections of one buffer; no TVM here."""

from __future__ import annotations

from typing import Any

from moqc.quant.pack_mma import COLUMNS, ROWS
from moqc.schedules.cuda.plan import COLUMN_TOKENS, ExpertsShape

ALIGNMENT = 256
"""Of every section of the workspace, in bytes."""
SLOT_MULTIPLE = 64
"""Slots are counted in multiples of this, so that sections of 4 bytes a slot are aligned too."""


def image_bytes(columns: int) -> int:
    """Bytes of a slot's image (``prefill.cu``): 8 tokens of `columns` columns, padded to whole units."""
    return -(-columns // COLUMNS) * COLUMNS * COLUMN_TOKENS * 2


def sections(shape: ExpertsShape) -> dict[str, int]:
    """Bytes of a slot in each section of the workspace, in their order."""
    shifts = -(-shape.intermediate // COLUMNS) * (COLUMNS // ROWS)
    return {
        "slots": 4,
        "members": 4 * COLUMN_TOKENS,
        "shares": 4 * COLUMN_TOKENS,
        "shifts": shifts * COLUMN_TOKENS,
        "hidden": image_bytes(shape.intermediate),
        "images": image_bytes(shape.hidden),
        "facts": image_bytes(shape.hidden) // 32,
        "factors": 4 * COLUMN_TOKENS,
        "over": 4 * COLUMN_TOKENS,
        "tiles": 20,
    }


def capacity_of(shape: ExpertsShape, tokens: Any) -> Any:
    """Slots for which the workspace has room; `tokens` and the result are ints or int64 expressions."""
    slots = shape.experts + tokens * shape.top_k // COLUMN_TOKENS
    return (slots + (SLOT_MULTIPLE - 1)) // SLOT_MULTIPLE * SLOT_MULTIPLE


def workspace_bytes(shape: ExpertsShape, tokens: Any) -> Any:
    """Size of the workspace for `tokens` tokens, an int or an int64 expression; so is the result."""
    return ALIGNMENT + capacity_of(shape, tokens) * sum(sections(shape).values())
