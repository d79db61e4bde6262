"""Generation loops: tokens after tokens, and text after text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set

import numpy as np

from moqc.errors import UserError
from moqc.runtime.sampling import Sampler, Sampling
from moqc.runtime.session import Session
from moqc.runtime.stop import StopFilter
from moqc.runtime.tokenizer import Detokenizer, Tokenizer


def generate_tokens(
    session: Session, prompt: Sequence[int], sampling: Sampling, ends: Set[int], max_tokens: int | None
) -> Iterator[int]:
    """Tokens that follow `prompt`, until one of `ends` (left out) or `max_tokens` of them.

    Raises UserError at the call, not at the first token, when prompt and answer do not fit the context.
    """
    count = answer_length(session.context, len(prompt), max_tokens)
    return _tokens(session, prompt, Sampler(sampling), ends, count)


def answer_length(context: int, prompt: int, max_tokens: int | None) -> int:
    """Tokens that may follow a prompt of `prompt` tokens. Raises UserError where `max_tokens` do not fit."""
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max-tokens {max_tokens}: must be at least 1")
    room = context - prompt
    if room < (max_tokens or 1):
        raise UserError(
            f"a prompt of {prompt} tokens and {max_tokens or 1} new ones do not fit the artifact's "
            f"context of {context}: shorten one or compile with a larger --context"
        )
    return max_tokens or room


def _tokens(
    session: Session, prompt: Sequence[int], sampler: Sampler, ends: Set[int], count: int
) -> Iterator[int]:
    pending = list(prompt)
    for _ in range(count):
        ids = np.array([pending], dtype=np.int64)
        if sampler.sampling.temperature == 0.0:
            token = int(session.extend_greedy(ids)[0])
        else:
            token = sampler.choose(session.extend_last(ids)[0])
        if token in ends:
            return
        yield token
        pending = [token]


def generate_text(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int], stops: Sequence[str]
) -> Iterator[str]:
    """Text of `tokens` in whole characters, ending before the first of the `stops`."""
    return _text(TextBuilder(tokenizer, prompt, stops), tokens)


def _text(builder: TextBuilder, tokens: Iterable[int]) -> Iterator[str]:
    for token in tokens:
        if piece := builder.push(token):
            yield piece
        if builder.stopped:
            return
    if piece := builder.finish():
        yield piece


class TextBuilder:
    """Turns the tokens after `prompt` into text that ends before the first of the `stops`."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._detokenizer, self._stop = Detokenizer(tokenizer, prompt), StopFilter(stops)

    @property
    def stopped(self) -> bool:
        """Whether one of the stops was met; nothing follows then."""
        return self._stop.stopped

    def push(self, token: int) -> str:
        """The text that became certain with `token`."""
        return self._stop.push(self._detokenizer.push(token))

    def finish(self) -> str:
        """What is left when no token follows."""
        piece = self._stop.push(self._detokenizer.flush())
        return piece if self.stopped else piece + self._stop.flush()
