"""Speed of a compiled model: prompts (pp) and generation (tg), in the manner of llama-bench."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moqc.errors import UserError
from moqc.keywords import keywords
from moqc.log import track
from moqc.options import BenchOptions
from moqc.runtime.artifact import Artifact, load
from moqc.runtime.tvm_runtime import use_threads


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """One test: `test` is ``pp512`` (a prompt of 512 tokens) or ``tg128`` (128 tokens, one at a time).

    `tokens_per_s` is the median over the repetitions of all sequences together, `low` and `high` their range.
    """

    test: str
    batch: int
    repetitions: int
    tokens_per_s: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """A row of ``--json``."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class SpeedResult:
    """All tests of one artifact; `load_seconds` is what loading it took in this process."""

    artifact: str
    model_type: str
    target: str
    threads: int
    artifact_bytes: int
    load_seconds: float
    rows: tuple[SpeedRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """The document of ``--json``."""
        return {**dataclasses.asdict(self), "rows": [row.to_dict() for row in self.rows]}


@keywords(BenchOptions)
def bench_artifact(path: Path, options: BenchOptions) -> SpeedResult:
    """Time prompts of these lengths and generations of these lengths, after one warm-up each.

    Raises UserError for tests that do not fit the artifact's context or batch.
    """
    prompts, generated, batch = options.prompts, options.generated, options.batch
    repetitions = options.repetitions
    for name, value in (("repetitions", repetitions), ("batch", batch)):
        if value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
    if min([*prompts, *generated], default=0) < 1:
        raise UserError("bench: give lengths of at least 1 with --prompt or --generate")
    count = use_threads(options.threads)
    start = time.perf_counter()
    artifact = load(path)
    seconds = time.perf_counter() - start
    longest, context = max([*prompts, *(length + 1 for length in generated)]), artifact.manifest.cache.context
    if longest > context:
        raise UserError(f"{path}: {longest} tokens do not fit its context of {context}; give shorter tests")
    tests = [(f"pp{length}", length, _prompt) for length in prompts]
    tests += [(f"tg{length}", length, _generate) for length in generated]
    rows = [
        _row(name, batch, [run(artifact, batch, length) for _ in range(repetitions + 1)][1:])
        for name, length, run in track(tests, "tests")
    ]
    manifest = artifact.manifest
    return SpeedResult(
        artifact=str(path),
        model_type=manifest.source.model_type,
        target=manifest.target.name,
        threads=count,
        artifact_bytes=manifest.sizes.artifact_bytes,
        load_seconds=seconds,
        rows=tuple(rows),
    )


def _row(name: str, batch: int, speeds: list[float]) -> SpeedRow:
    return SpeedRow(name, batch, len(speeds), statistics.median(speeds), min(speeds), max(speeds))


def _ids(artifact: Artifact, batch: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Random tokens: real text would route to fewer experts than a vocabulary can, never to more."""
    vocabulary = artifact.manifest.vocabulary
    return np.random.default_rng(0).integers(0, vocabulary, (batch, count), dtype=np.int64)


def _prompt(artifact: Artifact, batch: int, count: int) -> float:
    """Tokens per second of a prompt, up to the logits of its last token."""
    session, ids = artifact.session(), _ids(artifact, batch, count)
    start = time.perf_counter()
    session.extend_last(ids)
    return batch * count / (time.perf_counter() - start)


def _generate(artifact: Artifact, batch: int, count: int) -> float:
    """Tokens per second of greedy decoding after one token."""
    session = artifact.session()
    logits = session.extend_last(_ids(artifact, batch, 1))
    start = time.perf_counter()
    for _ in range(count):
        logits = session.extend_last(logits.argmax(-1)[:, None])
    return batch * count / (time.perf_counter() - start)
