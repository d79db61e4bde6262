"""The arguments of the attention kernel and, inside a task, its scratch."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from moqc.quant.kv_cache import stored_columns
from moqc.schedules.cpu.attention_shape import AttentionShape
from moqc.schedules.cpu.emit import Kernel, int64, loop
from moqc.schedules.cpu.kv_rows import read_row
from moqc.schedules.cpu.vector import common_lanes, vector_type

ROWS, ROWS_UNPACKED = 16, 64
"""Rows of a task; more where they share the work of unpacking keys and values."""
KEYS = 64
"""Slots of a block."""
REGISTER_ROWS = 4
REGISTER_VECTORS = 4


class AttentionBuffers:
    """The kernel's arguments and, inside a task, its scratch."""

    def __init__(
        self, k: Kernel, shape: AttentionShape, batch: Any, tokens: Any, cache: tuple[Any, Any] | None
    ) -> None:
        key_heads, own_width, value_width = shape.key_heads, shape.own_width, shape.value_width
        self.shape, self.batch, self.tokens = shape, int64(batch), int64(tokens)
        self.q = k.parameter("q", [batch, shape.heads, tokens, shape.key_width], "float32")
        self.k = k.parameter("k", [batch, key_heads, tokens, own_width], "float32")
        self.v = k.parameter("v", [batch, key_heads, tokens, value_width], "float32")
        self.positions = k.parameter("positions", [batch, tokens], "int64")
        self.keys, self.values, self.cached = self.k, self.v, cache is not None
        self.slots = tokens if cache is None else cache[1]
        self.unpacked = shape.stored != "float32"
        self.rows = ROWS_UNPACKED if self.unpacked else ROWS
        if cache is not None:
            columns = [stored_columns(shape.stored, width) for width in (own_width, value_width)]
            self.keys, self.values = (
                k.parameter(name, [cache[0], key_heads, cache[1], count], shape.stored)
                for name, count in zip(("k_cache", "v_cache"), columns, strict=True)
            )
        self.sinks = k.parameter("sinks", [shape.heads], "float32") if shape.sinks else None
        self.out = k.parameter("out", [batch, tokens, shape.heads, value_width], "float32")
        self.lanes, self.value_lanes = (
            common_lanes(shape.lanes, own_width, shape.key_width),
            common_lanes(shape.lanes, value_width),
        )
        self.kind, self.value_kind = vector_type(self.lanes), vector_type(self.value_lanes)

    def key_parts(self) -> list[tuple[Any, int, int]]:
        """Float32 buffers that hold a key's columns, with the first column and the number of them."""
        own = self.shape.own_width
        keys, values = self.blocks if self.unpacked else (self.keys, self.values)
        latents = [(values, own, self.shape.value_width)] if self.shape.latent else []
        return [(keys, 0, own), *latents]

    def at(self, where: tuple[Any, Any], start: Any, key: Any) -> tuple[Any, ...]:
        """Where slot ``start + key`` of the block from `start` on is, in `key_parts` and `value_rows`."""
        return (key,) if self.unpacked else (*where, start + key)

    @property
    def value_rows(self) -> Any:
        """The float32 buffer of values."""
        return self.blocks[1] if self.unpacked else self.values

    def unpack(self, where: tuple[Any, Any], start: Any, keys: Any) -> None:
        """Make `keys` slots from `start` on float32, if they are not."""
        if not self.unpacked:
            return
        shape = self.shape
        parts = ((self.keys, shape.own_width, self.lanes), (self.values, shape.value_width, self.value_lanes))
        with loop(0, keys) as key:
            for block, (cache, width, lanes) in zip(self.blocks, parts, strict=True):
                read_row((block, [key]), (cache, [*where, start + key]), width, lanes)

    def allocate(self) -> None:
        """Scratch of one task."""

        def local(*extents: int, dtype: str = "float32") -> Any:
            return T.alloc_buffer(extents, dtype)

        self.scaled, self.sums = (
            local(self.rows, self.shape.key_width),
            local(self.rows, self.shape.value_width),
        )
        self.scores = local(self.rows, KEYS)
        if self.unpacked:
            self.blocks = local(KEYS, self.shape.own_width), local(KEYS, self.shape.value_width)
        self.top, self.total = local(self.rows), local(self.rows, self.lanes)
        self.place, self.bounds = local(self.rows, dtype="int32"), local(2, dtype="int32")
        self.reach = local(self.rows, dtype="int32")
        self.best, self.gathered = local(self.lanes), local(self.lanes, dtype="int32")
        # What shall be in registers is small: TVM takes buffers from 1 KiB on from a pool.
        self.tile = [local(self.lanes) for _ in range(self.lanes)]
        self.registers = [local(REGISTER_VECTORS * self.value_lanes) for _ in range(REGISTER_ROWS)]
