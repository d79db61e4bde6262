"""Loss, perplexity, divergence and agreement, streamed over windows of tokens.

The protocol: no beginning-of-sequence token, disjoint windows of `window` tokens, ``window - 1`` predictions
each (position i predicts token i + 1). A file's loss is the mean over its predictions; several files count
equally, whatever their length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moqc.calibrate.text import dataset_names, tokenized_windows
from moqc.errors import InternalError, UserError
from moqc.log import logger

_CHUNK = 1 << 21
"""Logits turned to float64 at a time: 16 MiB, small enough to stay near the processor's cache."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Quality of a model on some text.

    `loss`: mean next-token cross entropy in nats; `perplexity` its exponential; `tokens`: predictions scored.
    Against a reference model, else None: `kld_mean` and `kld_p99`, mean and 99th percentile over predictions
    of KL(reference || model) in nats; `top1_agreement`, the share of predictions with the same most likely
    token.
    """

    loss: float
    perplexity: float
    tokens: int
    kld_mean: float | None = None
    kld_p99: float | None = None
    top1_agreement: float | None = None


def evaluation_windows(
    files: Sequence[Path | str], tokenizer: Path | str, *, tokens: int | None = None, window: int = 512
) -> dict[str, NDArray[np.int64]]:
    """File name (stem) -> its first ``tokens // window`` windows, int64 [n, window]; all for `tokens` None.

    A shorter file gives all it has. Raises UserError for no files, unusable ones, or a bad `tokens`.
    """
    if not files:
        raise UserError("no text to evaluate on: name at least one file")
    if window < 2:
        raise UserError(f"window {window}: must be at least 2, one token to predict from")
    if tokens is not None and tokens < window:
        raise UserError(f"{tokens} tokens are less than one window of {window}; raise the number of tokens")
    paths = [Path(file) for file in files]
    chosen = {}
    for name, path in zip(dataset_names(paths), paths, strict=True):
        found = tokenized_windows(path, tokenizer, window)
        wanted = len(found) if tokens is None else tokens // window
        if len(found) < wanted:
            logger.warning("%s: only %d of %d windows of %d tokens", path, len(found), wanted, window)
        chosen[name] = found[:wanted]
    return chosen


class Accumulator:
    """Collects the logits of windows, a few at a time, into `Scores`."""

    def __init__(self) -> None:
        """Start with no predictions."""
        self._losses: list[NDArray[np.float64]] = []
        self._divergences: list[NDArray[np.float64]] = []
        self._agreements: list[NDArray[np.bool_]] = []

    def add(
        self,
        tokens: NDArray[np.int64],
        logits: NDArray[np.float32],
        reference: NDArray[np.float32] | None = None,
    ) -> None:
        """Count windows: `tokens` [n, S] with the model's `logits` [n, S, V], and those of the reference.

        Give reference logits always or never. Raises ValueError on shapes that do not match, InternalError
        when logits are NaN.
        """
        if logits.shape[:2] != tokens.shape or (reference is not None and reference.shape != logits.shape):
            raise ValueError(
                f"tokens {tokens.shape}, logits {logits.shape}, reference "
                f"{None if reference is None else reference.shape} do not match"
            )
        if self._losses and (reference is not None) != bool(self._divergences):
            raise ValueError("reference logits were given for some windows only")
        vocabulary = logits.shape[2]
        targets = tokens[:, 1:].reshape(-1)
        rows = logits[:, :-1].reshape(-1, vocabulary)
        reference_rows = None if reference is None else reference[:, :-1].reshape(-1, vocabulary)
        for part in _parts(len(rows), vocabulary):
            self._add_rows(
                targets[part], rows[part], None if reference_rows is None else reference_rows[part]
            )

    def _add_rows(
        self, targets: NDArray[np.int64], rows: NDArray[np.float32], reference: NDArray[np.float32] | None
    ) -> None:
        log_q = log_softmax(rows)
        losses = -log_q[np.arange(len(targets)), targets]
        if np.isnan(losses).any():
            raise InternalError("the model's logits are NaN; please report the model and the command")
        self._losses.append(losses)
        if reference is None:
            return
        log_p = log_softmax(reference)
        self._divergences.append(divergence(log_p, log_q))
        self._agreements.append(rows.argmax(axis=-1) == reference.argmax(axis=-1))

    def scores(self) -> Scores:
        """Scores of everything added so far. Raises ValueError when that is nothing."""
        if not self._losses:
            raise ValueError("no predictions were added")
        losses = np.concatenate(self._losses)
        loss = float(losses.mean())
        if not self._divergences:
            return Scores(loss, _exp(loss), len(losses))
        divergences = np.concatenate(self._divergences)
        return Scores(
            loss,
            _exp(loss),
            len(losses),
            float(divergences.mean()),
            float(np.percentile(divergences, 99)),
            float(np.concatenate(self._agreements).mean()),
        )


def mean_scores(files: Sequence[Scores]) -> Scores:
    """Several files as one: unweighted means, the perplexity of the mean loss, the sum of tokens.

    `kld_p99` is the mean of the files' percentiles. Raises ValueError for no files, or a mix with
    and without reference.
    """
    if not files:
        raise ValueError("no scores to average")
    loss = float(np.mean([file.loss for file in files]))
    tokens = sum(file.tokens for file in files)
    rows = [(file.kld_mean, file.kld_p99, file.top1_agreement) for file in files]
    without = [None in row for row in rows]
    if any(without) and not all(without):
        raise ValueError("some files were scored without a reference")
    if any(without):
        return Scores(loss, _exp(loss), tokens)
    kld_mean, kld_p99, agreement = np.asarray(rows, dtype=np.float64).mean(axis=0).tolist()
    return Scores(loss, _exp(loss), tokens, kld_mean, kld_p99, agreement)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithm of the softmax over the last axis, in float64: KL divergences near zero cancel in float32."""
    shifted: NDArray[np.float64] = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p || q) in nats along the last axis; entries with p = 0 count nothing. Rounding below 0 is cut."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):  # -inf - -inf where both give a token no chance
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    total: NDArray[np.float64] = np.maximum(terms.sum(axis=-1), 0.0)
    return total


def _parts(rows: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, _CHUNK // vocabulary)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _exp(loss: float) -> float:
    with np.errstate(over="ignore"):  # a ruined model has a perplexity of infinity, not a traceback
        return float(np.exp(loss))
