"""What is measured of a model from its logits, on whatever device they are.

A probe has batches of tokens and turns their logits into plain data, which is cached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moqc.calibrate.stream import batch_tokens, split_batches
from moqc.calibrate.workspace import digest
from moqc.errors import InternalError
from moqc.evaluate.tasks import Scored


class Probe(Protocol):
    """Batches of tokens, and what their logits say."""

    @property
    def key(self) -> str:
        """Digest of what is asked."""

    @property
    def batches(self) -> list[Tensor]:
        """Tokens int64 [n, window] of each batch."""

    def measure(self, logits: Iterator[Tensor]) -> Any:
        """Plain data from the logits [n, window, vocabulary] of `batches`, in order."""


@dataclass(frozen=True, eq=False)
class TextProbe:
    """Mean next-token cross entropy in nats of text: ``{"loss": mean over files, "files": {name: loss}}``.

    `windows`: file name -> tokens int64 [n, window].
    """

    windows: Mapping[str, NDArray[np.int64]]

    @property
    def tokens(self) -> int:
        """Predictions scored."""
        return sum(rows.shape[0] * (rows.shape[1] - 1) for rows in self.windows.values())

    @property
    def key(self) -> str:
        """Digest of the windows."""
        return digest("text", list(self.windows), list(self.windows.values()))

    @property
    def batches(self) -> list[Tensor]:
        """Batches of one file each."""
        return [batch for rows in self.windows.values() for batch in split_batches(torch.from_numpy(rows))]

    def measure(self, logits: Iterator[Tensor]) -> dict[str, Any]:
        """Losses, summed in float64."""
        files: dict[str, float] = {}
        for name, rows in self.windows.items():
            total = 0.0
            for tokens in split_batches(torch.from_numpy(rows)):
                for scores, row in zip(next(logits), tokens, strict=True):
                    total -= float(_log_probabilities(scores, row).sum())
            files[name] = total / (rows.shape[0] * (rows.shape[1] - 1))
        loss = float(np.mean(list(files.values())))
        if np.isnan(loss):
            raise InternalError("the model's logits are NaN; please report the model and the command")
        return {"loss": loss, "files": files}


@dataclass(frozen=True, eq=False)
class _Sequences:
    """Sequences in batches of similar length, padded at the end, where causal attention does not see it."""

    sequences: Sequence[Scored]

    @property
    def order(self) -> list[list[int]]:
        """Indices of the sequences of each batch, by length."""
        ranked = sorted(range(len(self.sequences)), key=lambda at: len(self.sequences[at].tokens))
        batches: list[list[int]] = []
        for at in ranked:
            length = len(self.sequences[at].tokens)
            if not batches or (len(batches[-1]) + 1) * length > batch_tokens():
                batches.append([])
            batches[-1].append(at)
        return batches

    @property
    def batches(self) -> list[Tensor]:
        """Tokens of each batch."""
        found = []
        for members in self.order:
            longest = max(len(self.sequences[at].tokens) for at in members)
            rows = torch.zeros(len(members), longest, dtype=torch.int64)
            for row, at in zip(rows, members, strict=True):
                row[: len(self.sequences[at].tokens)] = torch.from_numpy(self.sequences[at].tokens)
            found.append(rows)
        return found

    @property
    def key_parts(self) -> list[Any]:
        """What identifies the sequences."""
        return [[s.tokens for s in self.sequences], [[s.start, s.question] for s in self.sequences]]

    def each(self, logits: Iterator[Tensor]) -> Iterator[tuple[Scored, Tensor]]:
        """Sequences with their logits [n, vocabulary]."""
        for members in self.order:
            for scores, at in zip(next(logits), members, strict=True):
                yield self.sequences[at], scores[: len(self.sequences[at].tokens)]


class ChoiceProbe(_Sequences):
    """The answer to every multiple-choice question: the option of highest mean log probability a token."""

    @property
    def key(self) -> str:
        """Digest of the questions."""
        return digest("choice", *self.key_parts)

    def measure(self, logits: Iterator[Tensor]) -> list[int]:
        """Index of the chosen option of each question."""
        scores: dict[int, dict[int, float]] = {}
        position = {id(sequence): at for at, sequence in enumerate(self.sequences)}
        for sequence, rows in self.each(logits):
            found = _log_probabilities(rows, torch.from_numpy(sequence.tokens))[sequence.start - 1 :]
            scores.setdefault(sequence.question, {})[position[id(sequence)]] = float(found.mean())
        answers = []
        for question in sorted(scores):
            options = sorted(scores[question])
            answers.append(max(range(len(options)), key=lambda at: scores[question][options[at]]))
        return answers


class ExactProbe(_Sequences):
    """Whether greedy decoding would produce every continuation word by word.

    It does exactly if each token is the likeliest after those before it, so one forward pass decides.
    """

    @property
    def key(self) -> str:
        """Digest of the problems."""
        return digest("exact", *self.key_parts)

    def measure(self, logits: Iterator[Tensor]) -> list[bool]:
        """For each problem in order."""
        found: dict[int, bool] = {}
        for sequence, rows in self.each(logits):
            greedy = rows[sequence.start - 1 : -1].argmax(-1).cpu()
            found[sequence.question] = bool(
                (greedy == torch.from_numpy(sequence.tokens)[sequence.start :]).all()
            )
        return [found[question] for question in sorted(found)]


def _log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log probability float64 [n - 1] of each token of [n] but the first; logits [n, vocabulary]."""
    scores = logits[:-1].double().log_softmax(-1)
    return scores.gather(1, tokens[1:].to(scores.device).unsqueeze(1)).squeeze(1)
