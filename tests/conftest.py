"""A toy artifact: a hand-built Relax module that recites a text, packaged like a compiled model."""

from __future__ import annotations

import importlib.metadata
import json
import os
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from moqc.manifest import CacheSpec, Generation, Manifest, Parameter, Sizes, Source, TargetRecord, Versions
from moqc.package import WeightCounts, write_artifact
from moqc.tensorfile import StoredTensor

# Tests run in one process a core (pytest-xdist); more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes depends on what else runs on the machine.
hypothesis.settings.register_profile("moqc", deadline=None)
hypothesis.settings.load_profile("moqc")

TEXT = "Il était une fois — 🦊 naïve fox. The end."
CONTEXT, BATCH, CHUNK = 64, 2, 8


@dataclass(frozen=True)
class Toy:
    """The toy's artifact folder, its weights, and what it is made to say."""

    folder: Path
    table: np.ndarray
    tilt: np.ndarray
    text: str
    eos: int

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """The reference: table[position] + tilt * (sum of the ids so far)."""
        sums = np.cumsum(ids, axis=1, dtype=np.float32)
        return self.table[: ids.shape[1]][None] + sums[:, :, None] * self.tilt


def write_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer of 256 bytes and an end token; returns the end token's id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: at for at, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.token_to_id("<end>")


def build_library(vocabulary: int):  # tvm has no types
    """main(ids, positions, (table, tilt), (cache,)) -> (logits, cache), the cache written in place."""
    import tvm
    from tvm import relax
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def remember(pos: T.handle, ids: T.handle, cache: T.Buffer((BATCH, CONTEXT), "float32")):
        T.func_attr({"tirx.noalias": True})
        b, s = T.int64(), T.int64()
        p = T.match_buffer(pos, (b, s), "int64")
        x = T.match_buffer(ids, (b, s), "int64")
        for i, j in T.grid(b, s):
            with T.sblock("remember"):
                vi, vj = T.axis.remap("SS", [i, j])
                T.reads(p[vi, vj], x[vi, vj])
                T.writes(cache[0:BATCH, 0:CONTEXT])
                if p[vi, vj] >= T.int64(0):
                    cache[vi, p[vi, vj]] = T.Cast("float32", x[vi, vj])

    @T.prim_func(s_tir=True)
    def score(
        pos: T.handle,
        table: T.Buffer((CONTEXT, vocabulary), "float32"),
        tilt: T.Buffer((vocabulary,), "float32"),
        cache: T.Buffer((BATCH, CONTEXT), "float32"),
        out: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        b, s = T.int64(), T.int64()
        p = T.match_buffer(pos, (b, s), "int64")
        y = T.match_buffer(out, (b, s, vocabulary), "float32")
        for i, j, v, k in T.grid(b, s, T.int64(vocabulary), T.int64(CONTEXT)):
            with T.sblock("score"):
                vi, vj, vv, vk = T.axis.remap("SSSR", [i, j, v, k])
                with T.init():
                    y[vi, vj, vv] = table[T.max(p[vi, vj], T.int64(0)), vv]
                y[vi, vj, vv] = y[vi, vj, vv] + T.if_then_else(
                    vk <= p[vi, vj], cache[vi, vk] * tilt[vv], T.float32(0)
                )

    tensor, builder = relax.TensorType, relax.BlockBuilder()
    b, s = tvm.tirx.Var("b", "int64"), tvm.tirx.Var("s", "int64")
    cache = tensor([BATCH, CONTEXT], "float32")
    ids = relax.Var("ids", tensor([b, s], "int64"))
    positions = relax.Var("positions", tensor([b, s], "int64"))
    table = tensor([CONTEXT, vocabulary], "float32")
    weights = relax.Var("weights", relax.TupleType([table, tensor([vocabulary], "float32")]))
    caches = relax.Var("caches", relax.TupleType([cache]))
    remember_gv, score_gv = builder.add_func(remember, "remember"), builder.add_func(score, "score")
    with builder.function("main", [ids, positions, weights, caches]):
        old = builder.emit(relax.TupleGetItem(caches, 0))
        arguments = relax.Tuple([positions, ids, old])
        new = builder.emit(relax.op.call_tir_inplace(remember_gv, arguments, [2], [cache]))
        parts = [builder.emit(relax.TupleGetItem(weights, at)) for at in range(2)]
        out = tensor([b, s, vocabulary], "float32")
        logits = builder.emit(relax.op.call_tir(score_gv, relax.Tuple([positions, *parts, new]), out))
        builder.emit_func_output(relax.Tuple([logits, new]))
    return tvm.compile(builder.finalize(), tvm.target.Target({"kind": "llvm"}))


def toy_manifest(vocabulary: int, eos: int) -> Manifest:
    """The toy's manifest, without files and sizes."""
    version = importlib.metadata.version
    return Manifest(
        source=Source(path="toy", model_type="toy_moe", fingerprint="0" * 64),
        target=TargetRecord(name="x86-64-v3", features=()),
        versions=Versions(moqc="0", tvm=version("apache-tvm"), tvm_ffi=version("apache-tvm-ffi"), llvm="22"),
        pipeline="",
        bits={"layers.0.experts": {"up": ("int2-g64", "int3-g64"), "down": ("int2-g64", "int2-g64")}},
        linear_bits={},
        activations="float",
        sizes=Sizes(
            expert_file_bits_per_weight=0, model_file_bits_per_weight=0, parameter_bytes=0, artifact_bytes=0
        ),
        parameters=(
            Parameter(name="table", shape=(CONTEXT, vocabulary), dtype="float32"),
            Parameter(name="tilt", shape=(vocabulary,), dtype="float32"),
        ),
        cache=CacheSpec(context=CONTEXT, batch=BATCH, chunk=CHUNK, tensors=((BATCH, CONTEXT),)),
        vocabulary=vocabulary,
        generation=Generation(eos_token_ids=(eos,)),
        numerics={},
        files={},
    )


@pytest.fixture(scope="session", name="write_tokenizer")
def _write_tokenizer():
    """`write_tokenizer`, for other test files."""
    return write_tokenizer


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """An artifact that says TEXT from position 0 on, whatever it is asked, then its end token."""
    source = tmp_path_factory.mktemp("toy-source")
    eos = write_tokenizer(source)
    (source / "config.json").write_text(json.dumps({"model_type": "toy_moe"}))
    vocabulary = eos + 1
    from moqc.runtime.tokenizer import Tokenizer

    script = [*Tokenizer(source / "tokenizer.json").encode(TEXT), eos]
    table = np.random.default_rng(0).normal(size=(CONTEXT, vocabulary)).astype(np.float32)
    for position, token in enumerate(script[1:]):
        table[position, token] += 12.0
    tilt = np.linspace(-1e-5, 1e-5, vocabulary, dtype=np.float32)
    bits = (tilt.view(np.uint32) >> 16).astype(np.uint16)
    stored = {"table": StoredTensor.of(table), "tilt": StoredTensor("BF16", bits)}
    folder = tmp_path_factory.mktemp("toy") / "artifact"
    write_artifact(
        folder,
        toy_manifest(vocabulary, eos),
        write_code=lambda folder: build_library(vocabulary).export_library(str(folder / "model.so")),
        load=stored.__getitem__,
        counts=WeightCounts(frozenset({"table"}), expert_weights=table.size, model_weights=2 * table.size),
        source=source,
    )
    exact = (bits.astype(np.uint32) << 16).view(np.float32)
    return Toy(folder, table, exact, TEXT, eos)
