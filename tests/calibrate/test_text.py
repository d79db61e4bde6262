from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from moqc.calibrate.text import (
    BUILTIN_FOLDER,
    CalibrationSet,
    load_calibration,
    read_text,
    tokenize,
    windows,
)
from moqc.errors import ModelError, UserError


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """One token a byte, with the truncation some checkpoints leave in their file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.enable_truncation(4)
    path = tmp_path / "tokenizer.json"
    built.save(str(path))
    return path


def test_read_text_drops_the_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "né\r\n".encode())
    assert read_text(path) == "né\r\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9", "not UTF-8 text .byte 3.; convert"),
        (b"", "empty"),
        (b" \n\t", "empty"),
        (None, "cannot read"),
    ],
)
def test_unusable_text_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_text(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokenize_ignores_truncation(tokenizer: Path) -> None:
    ids = tokenize(tokenizer, "abcabcabc")
    assert ids.dtype == np.int64
    assert len(ids) == 9
    assert ids[:3].tolist() == ids[3:6].tolist()


def test_tokenizer_file_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        tokenize(tmp_path / "absent.json", "x")
    broken = tmp_path / "broken.json"
    broken.write_text('{"model"')
    with pytest.raises(ModelError, match="not a tokenizer"):
        tokenize(broken, "x")


def test_windows_are_disjoint_and_whole() -> None:
    assert windows(np.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert windows(np.arange(2), 3).shape == (0, 3)
    with pytest.raises(UserError, match=r"window .*: must be at least 1"):
        windows(np.arange(2), 0)


def test_files_share_the_tokens_equally(tmp_path: Path, tokenizer: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("".join(chr(97 + i % 26) for i in range(4000)))
    files = [tmp_path / "one.txt", tmp_path / "two.txt", tmp_path / "one.txt"]
    first = load_calibration(files, tokenizer, tokens=960, window=32, seed=3)
    assert first.names == ("one", "two", "one-2")
    assert [array.shape for array in first.tokens] == [(10, 32)] * 3
    assert first.total_tokens == 960
    again = load_calibration(files, tokenizer, tokens=960, window=32, seed=3)
    other = load_calibration(files, tokenizer, tokens=960, window=32, seed=4)
    assert again.fingerprint == first.fingerprint
    assert other.fingerprint != first.fingerprint
    everything = {row.tobytes() for row in windows(tokenize(tokenizer, read_text(files[0])), 32)}
    assert {row.tobytes() for row in first.tokens[0]} <= everything


def test_short_file_gives_what_it_has(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "short.txt").write_text("a" * 70)
    with caplog.at_level(logging.WARNING, "moqc"):
        loaded = load_calibration([tmp_path / "short.txt"], tokenizer, tokens=512, window=32)
    assert loaded.tokens[0].shape == (2, 32)
    assert "only 2 of 16" in caplog.text
    with pytest.raises(UserError, match="do not fill one window"):
        load_calibration([tmp_path / "short.txt"], tokenizer, tokens=512, window=128)


def test_too_few_tokens_or_files(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 100)
    with pytest.raises(UserError, match="less than one window"):
        load_calibration([tmp_path / "a.txt"] * 2, tokenizer, tokens=63, window=32)
    with pytest.raises(UserError, match="at least one file"):
        load_calibration([], tokenizer)


def test_builtin_text_is_used_and_said(tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "moqc"):
        loaded = load_calibration(None, tokenizer, tokens=2048, window=128)
    assert loaded.names == ("en_novels", "fr_novels", "math", "udhr")
    assert "built-in" in caplog.text
    assert loaded.total_tokens == 2048


def test_every_shipped_text_names_its_source() -> None:
    examples = Path(__file__).parents[2] / "examples" / "data"
    sources = (BUILTIN_FOLDER / "SOURCES.md").read_text()
    shipped = sorted(BUILTIN_FOLDER.glob("*.txt"))
    assert len(shipped) == 4
    for path in shipped:
        assert path.name in sources
    if examples.is_dir():  # absent when the installed wheel is tested
        test_lines = set(read_text(examples / "test.txt").splitlines())
        for path in [*shipped, examples / "calib.txt"]:
            shared = {line for line in read_text(path).splitlines() if len(line.strip()) >= 15} & test_lines
            assert not shared


def test_fingerprint_counts_names_and_tokens() -> None:
    ones = np.ones((1, 4), np.int64)
    prints = {
        CalibrationSet.of({"a": ones}).fingerprint,
        CalibrationSet.of({"b": ones}).fingerprint,
        CalibrationSet.of({"a": ones * 2}).fingerprint,
        CalibrationSet.of({"a": ones.reshape(2, 2)}).fingerprint,
    }
    assert len(prints) == 4
