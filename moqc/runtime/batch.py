"""Several prompts of any lengths at once, one row of the batch each.

Rows are padded to the right with position -1, which kernels neither store nor attend. A row that is finished
is padding until all are.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np
from numpy.typing import NDArray

from moqc.errors import UserError
from moqc.manifest import Manifest
from moqc.runtime.generate import TextBuilder, answer_length
from moqc.runtime.sampling import Sampler
from moqc.runtime.session import Session

PADDING = -1


class Row:
    """One prompt and what became of it: `text`, and the tokens in it."""

    def __init__(
        self, prompt: Sequence[int], sampler: Sampler, ends: Set[int], count: int, builder: TextBuilder
    ) -> None:
        """At most `count` tokens are drawn with `sampler`; one of `ends` ends the text, left out."""
        self._sampler, self._ends, self._left, self._builder = sampler, ends, count, builder
        self.length = 0
        """Tokens in the cache."""
        self.pending = list(prompt)
        """Tokens to run next; none when the row is finished."""
        self.text = ""

    def take(self, logits: NDArray[np.float32]) -> None:
        """Choose the next token by the `logits` [V] of the last pending one."""
        self.length += len(self.pending)
        token = self._sampler.choose(logits)
        self.pending = []
        if token not in self._ends:
            self.text += self._builder.push(token)
            self._left -= 1
            if self._builder.stopped:
                return
            if self._left:
                self.pending = [token]
                return
        self.text += self._builder.finish()


def run_rows(session: Session, rows: Sequence[Row], chunk: int) -> None:
    """Let every row that is not finished have one more token; long prompts go in chunks."""
    last: dict[int, NDArray[np.float32]] = {}
    for start in range(0, max(len(row.pending) for row in rows), chunk):
        width = min(chunk, max(len(row.pending) for row in rows) - start)
        ids, positions = np.zeros((2, len(rows), width), np.int64)
        positions.fill(PADDING)
        for number, row in enumerate(rows):
            part = row.pending[start : start + width]
            ids[number, : len(part)] = part
            positions[number, : len(part)] = np.arange(len(part)) + row.length + start
        logits = session.run_at(ids, positions)
        for number, row in enumerate(rows):
            if start < len(row.pending) <= start + width:
                last[number] = logits[number, len(row.pending) - 1 - start].copy()
    for number, scores in last.items():
        rows[number].take(scores)


def check_prompts(prompts: Sequence[Sequence[int]], manifest: Manifest, max_tokens: int | None) -> None:
    """Raise UserError for a prompt that does not fit the context, or an id outside of the vocabulary."""
    for number, prompt in enumerate(prompts, 1):
        try:
            answer_length(manifest.cache.context, len(prompt), max_tokens)
        except UserError as error:
            raise UserError(f"prompt {number} of {len(prompts)}: {error}") from None
        if not 0 <= min(prompt) <= max(prompt) < manifest.vocabulary:
            raise UserError(f"prompt {number}: token ids must be in 0..{manifest.vocabulary - 1}")
