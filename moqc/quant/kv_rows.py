"""The reference for stored keys and values (`moqc.quant.kv_cache`): rows in, what a cache holds, rows out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moqc.quant.kv_cache import GROUP


def store_rows(rows: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """What a cache of `dtype` holds for float32 `rows` [..., width]: [..., `stored_columns`]."""
    if dtype != "int8":
        return rows.astype(dtype)
    width = rows.shape[-1]
    parts = [rows[..., first : first + GROUP] for first in range(0, width, GROUP)]
    largest = [np.abs(part).max(axis=-1, keepdims=True) for part in parts]
    scales = np.concatenate([(each / np.float32(127)).astype(np.float16) for each in largest], axis=-1)
    steps = np.where(scales > 0, scales, 1).astype(np.float32).repeat(GROUP, axis=-1)[..., :width]
    codes = np.clip(np.rint(rows / steps), -127, 127).astype(np.int8)
    return np.concatenate([codes, np.ascontiguousarray(scales).view(np.int8)], axis=-1)


def load_rows(stored: NDArray[np.generic], width: int) -> NDArray[np.float32]:
    """The float32 rows [..., width] that kernels compute with; undoes `store_rows` but for rounding."""
    if stored.dtype != np.int8:
        return stored.astype(np.float32)
    scales = np.ascontiguousarray(stored[..., width:]).view(np.float16).astype(np.float32)
    steps = scales.repeat(GROUP, axis=-1)[..., :width]
    return stored[..., :width].astype(np.float32) * steps
