"""Attention with a float16 key-value cache, for any number of tokens; the device code is ``attention.cu``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.errors import UserError
from moqc.schedules.cuda.emit import Kernel, kernel

FEW_ROWS = 16
"""Rows, (token, head) pairs of a key head, that the kernel for few tokens takes."""
KEYS = 64
WARPS = 4
WAVE = 264
"""Blocks that are worth having: two for each multiprocessor of an H200."""
WIDEST = 256
MOST_SPLITS = 32
"""The last block to finish adds up what all have found."""


@dataclass(frozen=True)
class AttentionShape:
    """What the kernels of one attention depend on.

    `normed`: queries and keys are divided by their root mean square and multiplied by a weight, with
    `epsilon`. `rotary`: so many of a head's first values are rotated, by halves. `head_first`: q, k and v are
    ``[batch, head, token, width]``, else ``[batch, token, head * width]``.
    """

    heads: int
    key_heads: int
    key_width: int
    value_width: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    normed: bool = False
    epsilon: float = 0.0
    rotary: int = 0
    head_first: bool = True

    def __post_init__(self) -> None:
        for width in (self.key_width, self.value_width):
            if width % 16 or width > WIDEST:
                raise UserError(
                    f"attention heads of {width}: the CUDA kernels take multiples of 16 up to {WIDEST}"
                )

    @property
    def group(self) -> int:
        """Heads that share a key head."""
        return self.heads // self.key_heads


def workspace_bytes(shape: AttentionShape, batch: Any, tokens: Any, context: int) -> Any:
    """Bytes of the workspace, an int64 expression: counters, queries in fp16, partial sums."""
    return sum(_sections(shape, batch, tokens, context), tirx.const(0, "int64"))


def _sections(shape: AttentionShape, batch: Any, tokens: Any, context: int) -> list[Any]:
    counters = (batch * shape.key_heads + 63) // 64 * 256
    queries = batch * tokens * (shape.heads * shape.key_width * 2)
    room = FEW_ROWS * (shape.value_width + 2) * 4
    return [counters, queries, batch * shape.key_heads * _splits(shape, batch, context) * room]


def _splits(shape: AttentionShape, batch: Any, context: int) -> Any:
    """Blocks that share the keys of a sequence when there are few rows."""
    wanted = tirx.max(
        (WAVE + shape.key_heads * batch - 1) // (batch * shape.key_heads), tirx.const(1, "int64")
    )
    return tirx.min(wanted, tirx.const(max(1, min(MOST_SPLITS, context // (2 * KEYS))), "int64"))


def attention_function(shape: AttentionShape, slots: int, context: int) -> tirx.PrimFunc:
    """Build the function for caches of `slots` sequences and `context` positions.

    Its parameters: q, k, v float32 (see the shape), positions int64 ``[B, S]``, sinks float32 ``[H]``, norms
    of q and k float32 ``[D]``, cosines and sines float32 ``[B, S, rotary]`` as the shape says, the caches
    float16 ``[slots, Hk, C, D]`` and ``[slots, Hk, C, Dv]``, changed in place; and the outputs workspace
    uint8 ``[workspace_bytes]`` and out float32 ``[B, S, H, Dv]``. Tokens attend as
    `moqc.ir.ops.cached_attention` says.
    """
    with kernel("attention", heads=shape.heads, key_heads=shape.key_heads) as k:
        batch, tokens = tirx.Var("b", "int64"), tirx.Var("s", "int64")
        at: dict[str, Any] = {
            name: k.parameter(name, _input_shape(shape, batch, tokens, heads, width), "float32")
            for name, heads, width in (
                ("q", shape.heads, shape.key_width),
                ("k", shape.key_heads, shape.key_width),
                ("v", shape.key_heads, shape.value_width),
            )
        }
        at["positions"] = k.parameter("positions", [batch, tokens], "int64")
        given = {
            "sinks": (shape.sinks, [shape.heads]),
            "q_norm": (shape.normed, [shape.key_width]),
            "k_norm": (shape.normed, [shape.key_width]),
            "cosine": (shape.rotary, [batch, tokens, shape.rotary]),
            "sine": (shape.rotary, [batch, tokens, shape.rotary]),
        }
        for name, (there, extents) in given.items():
            at[name] = k.parameter(name, extents, "float32") if there else at["q"]  # never read
        for name, width in (("k_cache", shape.key_width), ("v_cache", shape.value_width)):
            at[name] = k.parameter(name, [slots, shape.key_heads, context, width], "float16")
        sections = _sections(shape, batch, tokens, context)
        workspace = k.bytes("workspace", workspace_bytes(shape, batch, tokens, context))
        at["done"], at["queries"] = T.address_of(workspace[0]), T.address_of(workspace[sections[0]])
        at["parts"] = T.address_of(workspace[sections[0] + sections[1]])
        at["out"] = k.parameter("out", [batch, tokens, shape.heads, shape.value_width], "float32")
        _launch_heads(k, shape, at, batch, tokens, context)
        with T.If(tokens * shape.group <= FEW_ROWS):
            with T.Then():
                _launch_attend(k, shape, at, batch, tokens, context, few=True)
            with T.Else():
                _launch_attend(k, shape, at, batch, tokens, context, few=False)
    return k.finish()


def _input_shape(shape: AttentionShape, batch: Any, tokens: Any, heads: int, width: int) -> list[Any]:
    return [batch, heads, tokens, width] if shape.head_first else [batch, tokens, heads * width]


def _launch_heads(
    k: Kernel, shape: AttentionShape, at: dict[str, Any], batch: Any, tokens: Any, context: int
) -> None:
    flags = ", ".join(str(flag).lower() for flag in (shape.normed, shape.head_first))
    facts = f"{shape.heads}, {shape.key_heads}, {shape.key_width}, {shape.value_width}, {shape.rotary}"
    jobs = batch * tokens * (shape.heads + 2 * shape.key_heads)
    names = ("q", "k", "v", "positions", "q_norm", "k_norm")
    arguments = [
        *(at[name] for name in names),
        tirx.const(shape.epsilon, "float32"),
        at["cosine"],
        at["sine"],
    ]
    arguments += [tirx.Cast("int32", batch), tirx.Cast("int32", tokens), tirx.const(context, "int32")]
    arguments += [at[name] for name in ("queries", "k_cache", "v_cache", "done")]
    k.launch((jobs + 3) // 4, 32 * WARPS, 0, f"moqc::heads<{facts}, {flags}>", *arguments)


def _launch_attend(
    k: Kernel, shape: AttentionShape, at: dict[str, Any], batch: Any, tokens: Any, context: int, *, few: bool
) -> None:
    flags = ", ".join(str(flag).lower() for flag in (few, shape.sinks))
    facts = f"{shape.heads}, {shape.key_heads}, {shape.key_width}, {shape.value_width}, {flags}"
    one = tirx.const(1, "int64")
    splits = _splits(shape, batch, context) if few else one
    row_blocks = one if few else (tokens * shape.group + 63) // 64
    stages = 2 * KEYS * (shape.key_width + shape.value_width + 16) * 2
    shared = max(stages, WARPS * FEW_ROWS * (shape.value_width + 2) * 4, 2 * FEW_ROWS * MOST_SPLITS * 4)
    arguments = [at[name] for name in ("queries", "k_cache", "v_cache", "positions", "sinks")]
    arguments += [tirx.Cast("int32", tokens), tirx.const(context, "int32"), tirx.Cast("int32", splits)]
    arguments += [tirx.const(shape.scale, "float32"), tirx.const(shape.window, "int32")]
    arguments += [tirx.const(shape.softcap, "float32"), at["parts"], at["done"], at["out"]]
    blocks = row_blocks * splits * batch * shape.key_heads
    k.launch(blocks, 32 * WARPS, shared, f"moqc::attend<{facts}>", *arguments)
