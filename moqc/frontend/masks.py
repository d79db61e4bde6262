"""Attention masks as rules: transformers' mask functions are recognized, not evaluated.

transformers composes a mask of a few functions of positions (causal, window, chunk, ...) and hands it to an
interface, which for most implementations makes a tensor of it. moqc's reads the composition instead and
returns a mark that carries the rule; the model's code hands it on to attention like any mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import masking_utils


@dataclass(frozen=True, slots=True)
class Rule:
    """A causal mask: a token sees the last `window` positions, and those of its `chunk`; 0 is no limit."""

    window: int = 0
    chunk: int = 0


_CAUSAL = masking_utils.causal_mask_function
_CONJUNCTION = masking_utils.and_masks(_CAUSAL).__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_CHUNK = masking_utils.chunked_overlay(1, torch.zeros(1)).__code__


def mark(
    *,
    mask_function: Callable[..., Any],
    attention_mask: Any = None,
    allow_is_causal_skip: bool = True,
    **_rest: Any,
) -> Any:
    """Transformers' mask interface: None for a plain causal mask, else a tensor that only carries the rule.

    A mask that is no rule gets a tensor that carries none, which attention refuses. Models that read their
    masks ask for a tensor in any case.
    """
    rule = None if attention_mask is not None else read(mask_function)
    if rule == Rule() and allow_is_causal_skip:
        return None
    carrier: Any = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    if rule is not None:
        carrier.moqc_rule = rule
    return carrier


def rule_of(attention_mask: Any) -> Rule | None:
    """The rule of what attention is given as its mask; None for a mask that follows no known rule."""
    return Rule() if attention_mask is None else getattr(attention_mask, "moqc_rule", None)


def reader(error: BaseException) -> str | None:
    """The class of the layer that `error` comes from, if it was given a mark and took it for a mask."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        names = trace.tb_frame.f_locals
        if isinstance(names.get("self"), torch.nn.Module):
            marked = any(hasattr(value, "moqc_rule") for value in names.values())
            found = type(names["self"]).__name__ if marked else None
        trace = trace.tb_next
    return found


def read(function: Callable[..., Any]) -> Rule | None:
    """The rule of a mask function, None when it is not a conjunction of causality, windows and chunks."""
    parts = list(_parts(function))
    windows = [_cell(part, "sliding_window") for part in parts if _code(part) is _WINDOW]
    chunks = [_cell(part, "chunk_size") for part in parts if _code(part) is _CHUNK]
    if _CAUSAL not in parts or len(windows) + len(chunks) + parts.count(_CAUSAL) != len(parts):
        return None
    if len(chunks) > 1:
        return None
    return Rule(min(windows, default=0), *chunks)


def _parts(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The functions that `function` is the conjunction of."""
    if _code(function) is not _CONJUNCTION:
        yield function
        return
    for part in _cell(function, "mask_functions"):
        yield from _parts(part)


def _code(function: Callable[..., Any]) -> Any:
    return getattr(function, "__code__", None)


def _cell(function: Any, name: str) -> Any:
    """The value of a variable that `function` closes over."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _one_sequence(position_ids: torch.Tensor) -> None:
    """Transformers' test for packed sequences, which finds none."""


@contextmanager
def unpacked() -> Iterator[None]:
    """While tracing: positions are those of one sequence a row.

    transformers would take the symbolic positions for those of several sequences packed into a row.
    """
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _one_sequence
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original
