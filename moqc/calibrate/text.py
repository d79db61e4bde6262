"""Calibration and evaluation text: files -> token ids -> windows.

One file is one dataset. No beginning-of-sequence token is added, windows are disjoint, and the ragged tail of
a file is dropped, for calibration and evaluation alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moqc.calibrate.workspace import digest
from moqc.errors import ModelError, UserError
from moqc.log import logger

BUILTIN_FOLDER = Path(__file__).parent / "data"


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows of every calibration dataset.

    `names`: one a dataset, unique. `tokens`: int64 arrays [windows, window], one a dataset.
    `fingerprint`: hex digest of names and tokens, for cache keys.
    """

    names: tuple[str, ...]
    tokens: tuple[NDArray[np.int64], ...]
    fingerprint: str

    @classmethod
    def of(cls, datasets: dict[str, NDArray[np.int64]]) -> CalibrationSet:
        """The set of `datasets` (name -> int64 [windows, window]), with its fingerprint."""
        names, tokens = tuple(datasets), tuple(datasets.values())
        return cls(names, tokens, digest("calibration", names, tokens))

    def head(self, tokens: int) -> CalibrationSet:
        """About `tokens` tokens of it: the first windows of every dataset, at least one of each."""
        window = self.tokens[0].shape[1]
        share = max(1, tokens // (window * len(self.tokens)))
        return self.of({name: rows[:share] for name, rows in zip(self.names, self.tokens, strict=True)})

    @property
    def total_tokens(self) -> int:
        """Tokens in all windows of all datasets."""
        return sum(array.size for array in self.tokens)


def read_text(path: Path | str) -> str:
    """The text of a UTF-8 file, byte order mark removed.

    Raises UserError when the file is missing, unreadable, not UTF-8, or holds nothing but white space.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start}); convert it, e.g. with iconv -t UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot read the text file ({error.strerror}); give another path") from error
    if not text.strip():
        raise UserError(f"{path}: the text file is empty; give one with some text in it")
    return text


def tokenize(tokenizer: Path | str, text: str) -> NDArray[np.int64]:
    """Token ids [n] of `text` by the ``tokenizer.json`` at `tokenizer`; no special tokens are added.

    Raises ModelError when that file is missing or damaged.
    """
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_str(Path(tokenizer).read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{tokenizer}: cannot read the tokenizer ({error.strerror}); "
            "the model folder must hold a tokenizer.json"
        ) from error
    except Exception as error:  # the library has no type for its errors
        raise ModelError(f"{tokenizer}: not a tokenizer ({error}); fetch the model's files again") from error
    # Some checkpoints ship the truncation and padding of their training run.
    loaded.no_truncation()
    loaded.no_padding()
    return np.asarray(loaded.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def windows(tokens: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """Disjoint windows [n // window, window] of `tokens` [n], in order; the ragged tail is dropped."""
    if window < 1:
        raise UserError(f"window {window}: must be at least 1")
    count = len(tokens) // window
    return tokens[: count * window].reshape(count, window)


def tokenized_windows(file: Path, tokenizer: Path | str, window: int) -> NDArray[np.int64]:
    """All windows [n, window] of one text file; UserError when it does not fill a single one."""
    tokens = tokenize(tokenizer, read_text(file))
    found = windows(tokens, window)
    if len(found) == 0:
        raise UserError(
            f"{file}: {len(tokens)} tokens do not fill one window of {window}; give a longer text"
        )
    return found


def load_calibration(
    files: Sequence[Path | str] | None,
    tokenizer: Path | str,
    *,
    tokens: int = 32_768,
    window: int = 512,
    seed: int = 0,
) -> CalibrationSet:
    """Windows for calibration: an equal share of `tokens` from every file, drawn with `seed`.

    `files` None takes the text shipped with moqc. A file too short for its share gives all it has. Raises
    UserError for unusable files, or when `tokens` is less than one window a file.
    """
    if files is None:
        paths = sorted(BUILTIN_FOLDER.glob("*.txt"))
        logger.info(
            "no calibration text given: using the built-in one (%s)", ", ".join(p.stem for p in paths)
        )
    else:
        paths = [Path(file) for file in files]
    if not paths:
        raise UserError("no calibration text: name at least one file, or none at all for the built-in text")
    share = tokens // (window * len(paths)) if window > 0 else 1
    if share < 1:
        raise UserError(
            f"{tokens} calibration tokens are less than one window of {window} "
            f"for each of {len(paths)} files; raise the number of tokens"
        )
    chosen: dict[str, NDArray[np.int64]] = {}
    for index, (name, path) in enumerate(zip(dataset_names(paths), paths, strict=True)):
        available = tokenized_windows(path, tokenizer, window)
        if len(available) < share:
            logger.warning(
                "%s: only %d of %d windows of %d tokens available", path, len(available), share, window
            )
        order = np.random.default_rng((seed, index)).permutation(len(available))
        chosen[name] = available[np.sort(order[:share])]
    return CalibrationSet.of(chosen)


def dataset_names(paths: Sequence[Path]) -> list[str]:
    """The stem of every path; the second of the same stem becomes ``stem-2``, and so on."""
    seen: Counter[str] = Counter()
    names: list[str] = []
    for path in paths:
        seen[path.stem] += 1
        names.append(path.stem if seen[path.stem] == 1 else f"{path.stem}-{seen[path.stem]}")
    return names
