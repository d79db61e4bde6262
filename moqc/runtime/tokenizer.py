"""Text to token ids and back, piece by piece: `tokenizers` without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moqc.errors import ArtifactError, UserError, reason

_PRIMING = 6
"""Prompt tokens a `Detokenizer` sees first: enough for decoders that look at the piece before."""


class Tokenizer:
    """The model's tokenizer, from a ``tokenizer.json``."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library has no type for its errors
            raise ArtifactError(f"{path}: cannot read the tokenizer ({reason(error)})") from error

    @property
    def size(self) -> int:
        """Number of tokens, the added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` adds what the tokenizer's post-processor adds (such as a BOS).

        Raises UserError for text that is not Unicode: bytes of a command line that were not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not UTF-8 (character {error.start}): {error.reason}") from error
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out; bytes that are not UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class Detokenizer:
    """Turns tokens into text as they come, never cutting a character in two.

    The pieces together are the text `Tokenizer.decode` gives for all tokens at once.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_PRIMING:])
        self._start = 0
        self._done = len(self._ids)

    def push(self, token: int) -> str:
        """The text that became certain with `token`: empty while a character is incomplete."""
        self._ids.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """What is left at the end: an incomplete character, as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._done])
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith("\ufffd") and not final:
            return ""
        self._start, self._done = self._done, len(self._ids)
        return text[len(before) :]
