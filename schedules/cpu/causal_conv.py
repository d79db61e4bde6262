"""Causal convolutions of channels on CPUs, with and without a state of the latest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.schedules.cpu.emit import Kernel, bind, int64, kernel, load, loop, scratch, store, when
from moqc.schedules.cpu.vector import PARALLEL_WORK, common_lanes, parallel_if, spread, vector_type


@dataclass(frozen=True)
class ConvShape:
    """What is fixed about one convolution: `window` tokens including the current one; `lanes` of a vector."""

    channels: int
    window: int
    bias: bool
    lanes: int


class _Buffers:
    """The kernel's arguments and, inside a task, its registers."""

    def __init__(self, k: Kernel, shape: ConvShape, batch: Any, tokens: Any, rows: Any | None) -> None:
        self.shape, self.batch, self.tokens = shape, int64(batch), int64(tokens)
        self.x = k.parameter("x", [batch, tokens, shape.channels], "float32")
        self.weight = k.parameter("weight", [shape.channels, shape.window], "float32")
        self.positions = k.parameter("positions", [batch, tokens], "int64")
        latest = [rows, shape.window - 1, shape.channels]
        self.state = None if rows is None else k.parameter("state", latest, "float32")
        self.bias = k.parameter("bias", [shape.channels], "float32") if shape.bias else None
        self.out = k.parameter("out", [batch, tokens, shape.channels], "float32")
        self.lanes = common_lanes(shape.lanes, shape.channels)
        self.kind = vector_type(self.lanes)

    def allocate(self) -> None:
        """Registers of one task: its channels' weights, and their latest inputs, oldest first."""
        self.taps = [scratch(self.lanes) for _ in range(self.shape.window)]
        self.latest = [scratch(self.lanes) for _ in range(self.shape.window - 1)]


def causal_conv_kernel(shape: ConvShape, batch: Any, tokens: Any, rows: Any | None) -> tirx.PrimFunc:
    """The kernel of R.moqc.causal_conv (`rows` None) or R.moqc.cached_causal_conv (`rows` of its state).

    Arguments in the operator's order, then out [B,S,C]; the state [rows,W-1,C] is written in place. `batch`
    and `tokens` are ints or int64 variables. The output of a token of position below 0 is 0.
    """
    with kernel("causal_conv", cached=int(rows is not None)) as k:
        buffers = _Buffers(k, shape, batch, tokens, rows)
        vectors = shape.channels // buffers.lanes
        work = buffers.batch * buffers.tokens * (shape.channels * shape.window)

        def task(index: Any) -> None:
            buffers.allocate()
            _task(buffers, bind(index // vectors), bind(index % vectors * buffers.lanes))

        parallel_if(work > PARALLEL_WORK, buffers.batch * vectors, task)
    return k.finish()


def _task(buffers: _Buffers, b: Any, channel: Any) -> None:
    """A vector of channels of one sequence, through all tokens."""
    lanes, kind, latest = buffers.lanes, buffers.kind, buffers.latest
    for tap, register in enumerate(buffers.taps):
        with T.unroll(int64(0), int64(lanes)) as i:
            store(register, [i], load(buffers.weight, [channel + i, tap]))
    for age, register in enumerate(latest):
        before = spread(0.0, lanes) if buffers.state is None else load(buffers.state, [b, age, channel], kind)
        store(register, [0], before)
    with loop(0, buffers.tokens) as s:
        position = bind(load(buffers.positions, [b, s]))
        with when(position == 0):
            for register in latest:
                store(register, [0], spread(0.0, lanes))
        with T.If(position >= 0):
            with T.Then():
                _token(buffers, b, s, channel)
            with T.Else():
                store(buffers.out, [b, s, channel], spread(0.0, lanes))
    if buffers.state is not None:
        for age, register in enumerate(latest):
            store(buffers.state, [b, age, channel], load(register, [0], kind))


def _token(buffers: _Buffers, b: Any, s: Any, channel: Any) -> None:
    """The output of one token; it becomes the youngest of the latest."""
    kind, latest = buffers.kind, buffers.latest
    x = bind(load(buffers.x, [b, s, channel], kind))
    total = x * load(buffers.taps[-1], [0], kind)
    if buffers.bias is not None:
        total = total + load(buffers.bias, [channel], kind)
    for register, tap in zip(latest, buffers.taps, strict=False):
        total = total + load(register, [0], kind) * load(tap, [0], kind)
    store(buffers.out, [b, s, channel], total)
    for older, younger in pairwise(latest):
        store(older, [0], load(younger, [0], kind))
    if latest:
        store(latest[-1], [0], x)
