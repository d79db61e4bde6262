"""Questions to ask a model: multiple choice, and worked problems that must come out word by word.

A task file is JSON Lines. A line is ``{"query": str, "choices": [str, ...]}``, answered by the choice the
model finds likeliest after the query, or ``{"context_options": [str, ...], "continuation": str}``, by the
context after which the continuation is likeliest. Other keys, such as "gold", are not read: what is compared
is the answer of the quantized model with the original's.

A file of worked problems is text of blocks ``Problem: ...`` and ``Solution: ...`` between blank lines. Asked
is what follows the last ``=`` of the solution, the result, and the blank line that ends it; of a solution
without one, all of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moqc.calibrate.text import read_text
from moqc.errors import ModelError, UserError

LONGEST = 256
"""Tokens of the longest sequence asked; questions with longer ones are passed over."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Tokens int64 [n], of which those from `start` on are scored; `question` it belongs to."""

    tokens: NDArray[np.int64]
    start: int
    question: int


def multiple_choice(files: Sequence[Path | str], tokenizer: Path | str, count: int) -> list[Scored]:
    """The first `count` questions of each file that are short enough. UserError for a file that has none."""
    encode, found, number = _encoder(tokenizer), [], 0
    for file in files:
        before = number
        for line, text in enumerate(read_text(file).splitlines(), 1):
            if number - before == count or not text.strip():
                continue
            options = [_sequence(encode, *pair, number) for pair in _pairs(file, line, text)]
            if all(option is not None for option in options):
                found += [option for option in options if option is not None]
                number += 1
        if number == before:
            raise UserError(f"{file}: no question of at most {LONGEST} tokens; give a task file with some")
    return found


def worked_problems(file: Path | str, tokenizer: Path | str, count: int) -> list[Scored]:
    """The first `count` problems of `file` that are short enough; results are scored.

    UserError for a file that has none.
    """
    encode = _encoder(tokenizer)
    found: list[Scored] = []
    for block in read_text(file).split("\n\n"):
        problem, mark, solution = block.strip().partition("\nSolution:")
        if len(found) == count or not mark or not problem.startswith("Problem:") or not solution.strip():
            continue
        worked, equals, result = solution.rstrip().rpartition("=")
        sequence = _sequence(encode, f"{problem}\nSolution:{worked}{equals}", f"{result}\n\n", len(found))
        found += [] if sequence is None else [sequence]
    if not found:
        raise UserError(f"{file}: no block 'Problem: ...', 'Solution: ...' of at most {LONGEST} tokens")
    return found


def _pairs(file: Path | str, line: int, text: str) -> list[tuple[str, str]]:
    """(context, continuation) of every choice of one line."""
    try:
        row: Any = json.loads(text)
        if "choices" in row:
            return [(row["query"].rstrip(), f" {choice}") for choice in row["choices"]]
        return [(context.rstrip(), f" {row['continuation']}") for context in row["context_options"]]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: line {line} is no question ({type(error).__name__}: {error}); "
            "expected JSON with query and choices, or context_options and continuation"
        ) from error


def _encoder(tokenizer: Path | str) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_str(Path(tokenizer).read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{tokenizer}: cannot read the tokenizer ({error.strerror})") from error
    loaded.no_truncation()
    loaded.no_padding()
    return lambda text: list(loaded.encode(text, add_special_tokens=False).ids)


def _sequence(
    encode: Callable[[str], list[int]], context: str, continuation: str, question: int
) -> Scored | None:
    """The continuation's tokens behind the context's, or None for a sequence that is too long or empty."""
    tokens, start = encode(context + continuation), len(encode(context))
    if not 0 < start < len(tokens) <= LONGEST:
        return None
    return Scored(np.array(tokens, dtype=np.int64), start, question)
