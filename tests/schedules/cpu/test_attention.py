"""The attention kernel against numpy: ragged batches, chunks, windows, soft caps, sinks, shared key heads."""

import functools
import itertools

import numpy as np
import pytest
import tvm
from tvm import tirx

from moqc.quant.kv_cache import stored_columns
from moqc.quant.kv_rows import load_rows, store_rows
from moqc.schedules.cpu.attention import attention_kernel
from moqc.schedules.cpu.attention_shape import AttentionShape
from moqc.targets import TARGETS

SLOTS = 150


def shape_of(**changes):
    fields = {
        "heads": 4, "key_heads": 2, "key_width": 32, "value_width": 32, "scale": 0.2, "window": 0,
        "softcap": 0.0, "causal": True, "sinks": False, "lanes": 16,
    }  # fmt: skip
    return AttentionShape(**{**fields, **changes})


@functools.cache
def compile_kernel(shape, cached, target="x86-64-v4"):
    batch, tokens = tirx.Var("batch", "int64"), tirx.Var("tokens", "int64")
    kernel = attention_kernel(shape, batch, tokens, (3, SLOTS) if cached else None)
    module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    return tvm.compile(module, target=TARGETS[target].tvm)["kernel"]


def expected_row(shape, query, head, keys, values, sinks):
    scores = keys.astype(np.float64) @ query * shape.scale
    if shape.softcap:
        scores = np.tanh(scores / shape.softcap) * shape.softcap
    if sinks is not None:
        scores = np.append(scores, sinks[head])
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum())[: len(values)] @ values


def expected(shape, q, k, v, positions, sinks):
    """Whole sequences at once: q [B,H,S,D], positions [B,S] of which -1 is padding."""
    out = np.zeros((q.shape[0], q.shape[2], shape.heads, shape.value_width), np.float64)
    for b, s in np.ndindex(*positions.shape):
        position = positions[b, s]
        if position < 0:
            continue
        seen = positions[b] >= 0
        if shape.causal:
            seen &= positions[b] <= position
        if shape.window:
            seen &= positions[b] > position - shape.window
        if shape.latent:
            k = np.concatenate([k[..., : shape.own_width], v], -1)
        for head in range(shape.heads):
            keys, values = k[b, head // shape.group][seen], v[b, head // shape.group][seen]
            out[b, s, head] = expected_row(shape, q[b, head, s], head, keys, values, sinks)
    return out


class Sequences:
    """Random q, k, v for three rows of different lengths, and their cache on the device."""

    def __init__(self, shape, lengths, tokens, seed=0):
        random = np.random.default_rng(seed)
        draw = lambda *extents: random.standard_normal(extents).astype(np.float32)  # noqa: E731
        batch = len(lengths)
        self.shape, self.q = shape, draw(batch, shape.heads, tokens, shape.key_width)
        self.k = draw(batch, shape.key_heads, tokens, shape.own_width)
        self.v = draw(batch, shape.key_heads, tokens, shape.value_width)
        self.sinks = draw(shape.heads) if shape.sinks else None
        self.positions = np.where(np.arange(tokens) < np.array(lengths)[:, None], np.arange(tokens), -1)
        self.caches = [
            tvm.runtime.tensor(np.zeros((3, shape.key_heads, SLOTS, columns), shape.stored))
            for columns in (stored_columns(shape.stored, w) for w in (shape.own_width, shape.value_width))
        ]

    def run(self, kernel, start, stop, cached=True):
        piece = [a[:, :, start:stop] for a in (self.q, self.k, self.v)] + [self.positions[:, start:stop]]
        arguments = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in piece]
        arguments += self.caches if cached else []
        arguments += [] if self.sinks is None else [tvm.runtime.tensor(self.sinks)]
        batch, tokens = piece[3].shape
        out = tvm.runtime.empty((batch, tokens, self.shape.heads, self.shape.value_width), "float32")
        kernel(*arguments, out)
        return out.numpy()

    def expected(self):
        """Attention of what the caches can hold."""
        k, v = (load_rows(store_rows(each, self.shape.stored), each.shape[-1]) for each in (self.k, self.v))
        return expected(self.shape, self.q, k, v, self.positions, self.sinks)


VARIANTS = {
    "plain": {},
    "window": {"window": 7, "key_heads": 4, "key_width": 64, "value_width": 64},
    "sinks-softcap": {"sinks": True, "softcap": 5.0},
    "one-key-head": {"heads": 6, "key_heads": 1, "key_width": 96, "value_width": 96, "window": 70},
    "wide-keys": {"key_width": 48, "value_width": 32, "heads": 2, "key_heads": 2},
    "latent": {"key_width": 96, "value_width": 64, "heads": 6, "key_heads": 1, "latent": True},
    "latent-odd": {"key_width": 20, "value_width": 12, "key_heads": 1, "window": 9, "latent": True},
    "odd": {"key_width": 6, "value_width": 5},
    "avx2": {"window": 33, "softcap": 4.0, "sinks": True, "heads": 8, "value_width": 40, "lanes": 8},
}


STORED = [
    *((name, "float32") for name in VARIANTS),
    *itertools.product(("sinks-softcap", "wide-keys", "latent-odd", "odd", "avx2"), ("float16", "int8")),
]


@pytest.mark.parametrize(("name", "stored"), STORED, ids="-".join)
def test_cached_chunks_equal_one_shot(name, stored):
    shape = shape_of(**VARIANTS[name], stored=stored)
    kernel = compile_kernel(shape, cached=True, target="x86-64-v3" if shape.lanes == 8 else "x86-64-v4")
    sequences = Sequences(shape, lengths=(140, 1, 77), tokens=140)
    # A prefill, single tokens, an odd chunk and the rest: every cut must give what one call gives.
    cuts = [0, 50, 51, 52, 95, 140]
    chunks = [sequences.run(kernel, *cut) for cut in itertools.pairwise(cuts)]
    reference = sequences.expected()
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), reference, atol=2e-6)
    sequences.caches = Sequences(shape, lengths=(140, 1, 77), tokens=140).caches
    np.testing.assert_allclose(sequences.run(kernel, 0, 140), reference, atol=2e-6)


@pytest.mark.parametrize("changes", [{"causal": False}, {"window": 9, "sinks": True}], ids=str)
def test_stateless_attention(changes):
    shape = shape_of(**changes)
    kernel = compile_kernel(shape, cached=False)
    sequences = Sequences(shape, lengths=(90, 3, 41), tokens=90)
    # Padding on the left too: positions, not places, decide.
    sequences.positions[2] = np.roll(sequences.positions[2], 20)
    np.testing.assert_allclose(sequences.run(kernel, 0, 90, cached=False), sequences.expected(), atol=2e-6)


def test_padding_writes_no_cache():
    shape = shape_of()
    sequences = Sequences(shape, lengths=(2, 0, 1), tokens=4)
    sequences.run(compile_kernel(shape, cached=True), 0, 4)
    filled = np.abs(sequences.caches[0].numpy()).sum((1, 3)) > 0
    assert filled.sum(1).tolist() == [2, 0, 1]


def test_a_position_past_the_cache_writes_nothing():
    shape = shape_of()
    sequences = Sequences(shape, lengths=(2, 2, 2), tokens=2)
    sequences.positions[:, 1] = SLOTS
    out = sequences.run(compile_kernel(shape, cached=True), 0, 2)
    assert np.isfinite(out).all()
    filled = np.abs(sequences.caches[0].numpy()).sum((1, 3)) > 0
    assert filled.sum(1).tolist() == [1, 1, 1]
