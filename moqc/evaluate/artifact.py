"""Score an artifact: its own logits, through the runtime, on windows of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moqc.errors import UserError
from moqc.evaluate.metrics import Accumulator, Scores, evaluation_windows, mean_scores
from moqc.log import track
from moqc.runtime.artifact import Artifact

if TYPE_CHECKING:
    from moqc.frontend.checkpoint import Checkpoint

DEFAULT_WINDOW = 512

BATCH_TOKENS = 2048
"""Tokens whose logits are in memory at once."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of each file, by name, and of all of them."""

    files: dict[str, Scores]

    @property
    def scores(self) -> Scores:
        """All files, each with the same weight."""
        return mean_scores(list(self.files.values()))

    def to_dict(self) -> dict[str, Any]:
        """JSON form: loss, perplexity, tokens, kld_mean, kld_p99, top1_agreement; and the same by file."""
        return {**asdict(self.scores), "files": {name: asdict(scores) for name, scores in self.files.items()}}

    def table(self) -> list[tuple[str, tuple[float | None, ...]]]:
        """Rows of scores, in the order of the fields of `Scores`; the last is all files together."""
        rows = [(name, tuple(asdict(scores).values())) for name, scores in self.files.items()]
        return rows if len(rows) == 1 else [*rows, ("all", tuple(asdict(self.scores).values()))]


def evaluate_artifact(
    artifact: Artifact,
    files: Sequence[Path | str],
    *,
    reference: Checkpoint | None = None,
    tokens: int | None = None,
    window: int | None = None,
) -> Evaluation:
    """Score `artifact` on text files, against the unquantized model `reference` where one is given.

    `window` is 512 or the artifact's context if that is shorter. Raises UserError for unusable text, a window
    longer than the context, or a reference with another vocabulary.
    """
    if reference is not None:
        _check_vocabulary(artifact, reference)
    context = artifact.manifest.cache.context
    window = min(DEFAULT_WINDOW, context) if window is None else window
    if window > context:
        raise UserError(
            f"window {window} is longer than the artifact's context of {context}: give a smaller --window"
        )
    found = evaluation_windows(files, artifact.path / "tokenizer.json", tokens=tokens, window=window)
    scores = {}
    for name, windows in found.items():
        accumulator = Accumulator()
        batches = _batches(windows)
        for ids, expected in zip(
            track(batches, f"scoring {name}"), _reference_logits(reference, batches), strict=True
        ):
            accumulator.add(ids, artifact.forward(ids), expected)
        scores[name] = accumulator.scores()
    return Evaluation(scores)


def _batches(windows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    rows = max(1, BATCH_TOKENS // windows.shape[1])
    return [windows[at : at + rows] for at in range(0, len(windows), rows)]


def _reference_logits(
    reference: Checkpoint | None, batches: Iterable[NDArray[np.int64]]
) -> Iterator[NDArray[np.float32] | None]:
    """Logits of the original model for each of `batches`, or None for each."""
    if reference is None:
        yield from (None for _ in batches)
        return
    import torch

    from moqc.calibrate.layers import LayeredModel

    # All batches go through a layer while its weights are in memory.
    model = LayeredModel(reference)
    stream = model.forward([torch.from_numpy(np.ascontiguousarray(ids)) for ids in batches])
    for logits in model.logits(stream):
        yield logits.cpu().numpy()


def _check_vocabulary(artifact: Artifact, reference: Checkpoint) -> None:
    size = reference.config.get_text_config().vocab_size
    if size != artifact.manifest.vocabulary:
        raise UserError(
            f"{reference.path}: has {size} tokens, the artifact {artifact.manifest.vocabulary}: "
            f"it is another model; give {artifact.manifest.source.path}"
        )
