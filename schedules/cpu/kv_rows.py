"""Rows of key-value caches in kernels, stored as `moqc.quant.kv_cache` says: written, and read as float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.kv_cache import GROUP
from moqc.schedules.cpu.emit import bind, load, store
from moqc.schedules.cpu.quantize_activations import largest
from moqc.schedules.cpu.vector import each_vector, spread, vector_type

Place = tuple[Any, Sequence[Any]]
"""A buffer, and the indices of a row in it but for the last."""


def write_row(target: Place, source: Place, width: int, lanes: int) -> None:
    """Store `width` float32 columns of `source` in the dtype of `target`; `lanes` divides them."""
    (cache, at), (rows, origin) = target, source
    if str(cache.dtype) == "int8":
        for number, first in enumerate(range(0, width, GROUP)):
            columns = range(first, min(first + GROUP, width), lanes)
            vectors = [bind(load(rows, [*origin, d], vector_type(lanes))) for d in columns]
            _write_group(target, columns, vectors, width + 2 * number)
        return
    with each_vector(width, lanes) as d:
        value = load(rows, [*origin, d], vector_type(lanes))
        store(cache, [*at, d], value.astype(vector_type(lanes, str(cache.dtype))))


def _write_group(target: Place, columns: Sequence[int], vectors: list[Any], scale_at: int) -> None:
    """Codes and scale of columns that share one."""
    cache, at = target
    lanes = vectors[0].ty.dtype.lanes
    scale = bind((largest(vectors) / T.float32(127)).astype("float16"))
    step = bind(scale.astype("float32"))
    divisor = spread(bind(T.if_then_else(step > 0, step, T.float32(1))), lanes)
    for d, vector in zip(columns, vectors, strict=True):
        rounded = tirx.nearbyint(vector / divisor).astype(vector_type(lanes, "int32"))
        codes = tirx.max(tirx.min(rounded, spread(127, lanes, "int32")), spread(-127, lanes, "int32"))
        store(cache, [*at, d], codes.astype(vector_type(lanes, "int8")))
    store(cache, [*at, scale_at], T.reinterpret("int8x2", scale))


def read_row(target: Place, source: Place, width: int, lanes: int) -> None:
    """Write `width` columns of a cache's row as float32."""
    (rows, at), (cache, origin) = target, source
    whole = width if str(cache.dtype) != "int8" else GROUP
    for number, first in enumerate(range(0, width, whole)):
        step = None
        if str(cache.dtype) == "int8":
            scale = T.reinterpret("float16", load(cache, [*origin, width + 2 * number], "int8x2"))
            step = bind(spread(scale.astype("float32"), lanes))
        with each_vector(min(whole, width - first), lanes) as d:
            value = load(cache, [*origin, d + first], vector_type(lanes, str(cache.dtype)))
            if step is None:
                value = value.astype(vector_type(lanes))
            else:
                value = value.astype(vector_type(lanes, "int32")).astype(vector_type(lanes)) * step
            store(rows, [*at, d + first], value)
