"""The recurrence and the convolution against the oracle: ragged batches, chunks, resets, all operands."""

import functools

import numpy as np
import pytest
import torch
import tvm
from tvm import tirx

from moqc.quant.recurrence import causal_conv, recurrent
from moqc.schedules.cpu.causal_conv import ConvShape, causal_conv_kernel
from moqc.schedules.cpu.recurrent import RecurrentShape, recurrent_kernel
from moqc.targets import TARGETS

ROWS = 3
# Padding in front, in between and at the end; a sequence that starts anew; one that goes on.
POSITIONS = np.array([[-1, -1, 0, 1, 2, 3, 4], [5, 6, -1, 7, 8, -1, -1], [0, 1, 2, 3, 0, 1, 2]])


def recurrent_shape(**changes):
    fields = {"heads": 4, "key_heads": 2, "keys": 16, "columns": 32, "wide_decay": False, "beta": False}
    return RecurrentShape(**{**fields, "rate": False, "lanes": 16, **changes})


@functools.cache
def compile_kernel(build, shape, cached, target):
    extents = [tirx.Var(name, "int64") for name in ("batch", "tokens")]
    kernel = build(shape, *extents, ROWS if cached else None)
    module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    return tvm.compile(module, target=TARGETS[target].tvm)["kernel"]


def tensors(generator, *shapes):
    return [torch.from_numpy(generator.normal(size=shape).astype(np.float32)) for shape in shapes]


SHAPES = [
    recurrent_shape(),  # Mamba-2
    recurrent_shape(beta=True, columns=128),  # gated delta net: two tasks a head
    recurrent_shape(beta=True, wide_decay=True, keys=24, columns=24),  # Kimi delta attention
    recurrent_shape(heads=6, key_heads=1, columns=1, rate=True),  # Mamba: channels are heads
    recurrent_shape(columns=1, keys=5, beta=True),
    recurrent_shape(columns=7, keys=3, rate=True, lanes=8),
]


def run(kernel, inputs, state, out):
    """Call `kernel` (inputs, state?, further inputs, out); new out, and the state after."""
    given = [tvm.runtime.tensor(tensor.numpy()) for tensor in inputs]
    out = tvm.runtime.tensor(np.full(out.shape, np.nan, np.float32))
    kernel(*given, out)
    return torch.from_numpy(out.numpy()), state and torch.from_numpy(given[state].numpy())


def in_chunks(kernel, over_time, state, constant, cut):
    """The same in chunks: `over_time` are [B, S, ...], the constant tensors come after the state."""
    found, count = [], over_time["x"].shape[1]
    for part in (slice(0, cut), slice(cut, count)):
        if part.start == part.stop:
            continue
        pieces = {name: tensor[:, part].contiguous() for name, tensor in over_time.items()}
        beta = [pieces.pop("beta")] if "beta" in pieces else []
        inputs = [constant.get("weight") if name == "weight" else t for name, t in pieces.items()]
        inputs += [state, *beta, *(tensor for name, tensor in constant.items() if name != "weight")]
        out, state = run(kernel, inputs, len(pieces), pieces["x"])
        found.append(out)
    return torch.cat(found, 1), state


@pytest.mark.parametrize("shape", SHAPES)
def test_recurrence(shape):
    generator = np.random.default_rng(0)
    lead, heads = POSITIONS.shape, shape.heads
    wide = (*lead, shape.key_heads, shape.keys)
    q, k, v, decay, beta, rate, state = tensors(
        generator, wide, wide, (*lead, heads, shape.columns),
        (*lead, heads, shape.keys) if shape.wide_decay else (*lead, heads),
        (*lead, heads), (heads, shape.keys), (ROWS, heads, shape.keys, shape.columns),
    )  # fmt: skip
    options = {}
    if shape.beta:
        options["beta"] = beta.sigmoid()
    if shape.rate:
        options["rate"] = rate.abs()
    inputs = {"q": q, "k": k / shape.keys, "x": v, "decay": -decay.abs()}
    positions = torch.from_numpy(POSITIONS)
    expected, after = recurrent(*inputs.values(), positions, **options, state=state)
    kernel = compile_kernel(recurrent_kernel, shape, True, "x86-64-v4" if shape.lanes == 16 else "x86-64-v3")
    over_time = {**inputs, "positions": positions, **{n: t for n, t in options.items() if n == "beta"}}
    constant = {name: tensor for name, tensor in options.items() if name == "rate"}
    for cut in (0, 3):
        found, now = in_chunks(kernel, over_time, state, constant, cut)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(now, after, rtol=1e-4, atol=1e-4)
    expected, _ = recurrent(*inputs.values(), positions, **options)
    kernel = compile_kernel(recurrent_kernel, shape, False, "x86-64-v3")
    out, _ = run(kernel, [*inputs.values(), positions, *options.values()], None, v)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "window", "bias"), [(48, 4, True), (20, 3, False), (7, 2, True)])
def test_convolution(channels, window, bias):
    generator = np.random.default_rng(0)
    x, weight, shift, state = tensors(
        generator, (*POSITIONS.shape, channels), (channels, window), (channels,), (ROWS, window - 1, channels)
    )
    positions, options = torch.from_numpy(POSITIONS), {"bias": shift} if bias else {}
    expected, after = causal_conv(x, weight, positions, **options, state=state)
    kernel = compile_kernel(causal_conv_kernel, ConvShape(channels, window, bias, 16), True, "x86-64-v4")
    over_time = {"x": x, "weight": x, "positions": positions}
    for cut in (0, 1, 4):
        found, now = in_chunks(kernel, over_time, state, {"weight": weight, **options}, cut)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(now, after)
    expected, _ = causal_conv(x, weight, positions, **options)
    kernel = compile_kernel(causal_conv_kernel, ConvShape(channels, window, bias, 16), False, "x86-64-v3")
    out, _ = run(kernel, [x, weight, positions, *options.values()], None, x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
