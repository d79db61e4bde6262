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
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max-tokens {max_tokens}: must be at least 1")
    room = session.context - len(prompt)
    if room < (max_tokens or 1):
        raise UserError(
            f"a prompt of {len(prompt)} tokens and {max_tokens or 1} new ones do not fit the artifact's "
            f"context of {session.context}: shorten one or compile with a larger --context"
        )
    return _tokens(session, prompt, Sampler(sampling), ends, max_tokens or room)


def _tokens(
    session: Session, prompt: Sequence[int], sampler: Sampler, ends: Set[int], count: int
) -> Iterator[int]:
    pending = list(prompt)
    for _ in range(count):
        logits = session.extend_last(np.array([pending], dtype=np.int64))
        token = sampler.choose(logits[0])
        if token in ends:
            return
        yield token
        pending = [token]


def generate_text(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int], stops: Sequence[str]
) -> Iterator[str]:
    """Text of `tokens` in whole characters, ending before the first of the `stops`."""
    return _text(Detokenizer(tokenizer, prompt), tokens, StopFilter(stops))


def _text(detokenizer: Detokenizer, tokens: Iterable[int], stop: StopFilter) -> Iterator[str]:
    for token in tokens:
        if piece := stop.push(detokenizer.push(token)):
            yield piece
        if stop.stopped:
            return
    if piece := stop.push(detokenizer.flush()):
        yield piece
    if not stop.stopped and (piece := stop.flush()):
        yield piece
