from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import special
from tokenizers import Tokenizer, models, pre_tokenizers

from moqc.errors import InternalError, UserError
from moqc.evaluate.metrics import (
    Accumulator,
    Scores,
    divergence,
    evaluation_windows,
    log_softmax,
    mean_scores,
)


def _logits(seed: int, shape: tuple[int, ...] = (6, 9, 50)) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 4).astype(np.float32)


def test_scores_match_scipy() -> None:
    logits, reference = _logits(0), _logits(1)
    tokens = np.random.default_rng(2).integers(0, 50, (6, 9))
    accumulator = Accumulator()
    accumulator.add(tokens, logits, reference)
    scores = accumulator.scores()
    log_q = special.log_softmax(logits.astype(np.float64), axis=-1)[:, :-1]
    p = special.softmax(reference.astype(np.float64), axis=-1)[:, :-1]
    losses = -np.take_along_axis(log_q, tokens[:, 1:, None], axis=-1)
    divergences = special.rel_entr(p, np.exp(log_q)).sum(-1)
    assert scores.tokens == 6 * 8
    assert scores.loss == pytest.approx(losses.mean(), rel=1e-12)
    assert scores.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-12)
    assert scores.kld_mean == pytest.approx(divergences.mean(), rel=1e-9)
    assert scores.kld_p99 == pytest.approx(np.percentile(divergences, 99), rel=1e-9)
    assert scores.top1_agreement == np.mean(p.argmax(-1) == log_q.argmax(-1))


def test_streaming_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, reference = _logits(3), _logits(4)
    tokens = np.random.default_rng(5).integers(0, 50, (6, 9))
    whole, pieces = Accumulator(), Accumulator()
    whole.add(tokens, logits, reference)
    monkeypatch.setattr("moqc.evaluate.metrics._CHUNK", 170)  # three rows at a time
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        pieces.add(tokens[start:stop], logits[start:stop], reference[start:stop])
    assert pieces.scores() == whole.scores()


def test_first_token_and_last_logits_do_not_count() -> None:
    logits, tokens = _logits(6), np.random.default_rng(7).integers(0, 50, (6, 9))
    first, second = Accumulator(), Accumulator()
    first.add(tokens, logits)
    changed, moved = logits.copy(), tokens.copy()
    changed[:, -1], moved[:, 0] = 100.0, 0
    second.add(moved, changed)
    assert first.scores() == second.scores()
    assert first.scores().kld_mean is None


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[3e38, 0.0, -3e38]], dtype=np.float32)
    assert log_softmax(logits)[0, 0] == 0.0
    shifted = log_softmax(_logits(8) + np.float32(2.0**20))
    exact = special.log_softmax((_logits(8) + np.float32(2.0**20)).astype(np.float64), axis=-1)
    assert np.abs(shifted - exact).max() < 1e-9


def test_small_divergences_survive() -> None:
    """KL of a perturbation d is Var(d) / 2: 2e-11 here, far below what float32 would leave of it."""
    logits = _logits(9, (4, 1000)).astype(np.float64)
    change = np.random.default_rng(10).standard_normal((4, 1000)) * 1e-5
    p = special.softmax(logits, axis=-1)
    variance = (p * change**2).sum(-1) - (p * change).sum(-1) ** 2
    measured = divergence(log_softmax(logits), log_softmax(logits + change))
    assert measured == pytest.approx(variance / 2, rel=1e-3)
    assert divergence(log_softmax(logits), log_softmax(logits)).max() == 0.0


def test_impossible_tokens_do_not_poison_the_divergence() -> None:
    logits = np.array([[0.0, 1.0, -np.inf]])
    other = np.array([[1.0, 1.0, -np.inf]])
    two = divergence(log_softmax(logits[:, :2]), log_softmax(other[:, :2]))
    assert divergence(log_softmax(logits), log_softmax(other)) == pytest.approx(two)


def test_bad_input_is_refused() -> None:
    tokens, logits = np.zeros((1, 4), np.int64), np.zeros((1, 4, 5), np.float32)
    accumulator = Accumulator()
    with pytest.raises(ValueError, match="no predictions"):
        accumulator.scores()
    with pytest.raises(ValueError, match="do not match"):
        accumulator.add(tokens, logits[:, :3])
    with pytest.raises(InternalError, match="NaN"):
        accumulator.add(tokens, logits * np.nan)
    accumulator.add(tokens, logits)
    with pytest.raises(ValueError, match="some windows only"):
        accumulator.add(tokens, logits, logits)


def test_files_count_equally() -> None:
    short, long = Scores(1.0, np.e, 10, 0.1, 0.5, 0.9), Scores(3.0, np.e**3, 990, 0.3, 0.7, 0.7)
    mean = mean_scores([short, long])
    assert (mean.loss, mean.tokens) == (2.0, 1000)
    assert mean.perplexity == pytest.approx(np.exp(2.0))
    assert (mean.kld_mean, mean.kld_p99, mean.top1_agreement) == pytest.approx((0.2, 0.6, 0.8))
    assert mean_scores([Scores(1.0, np.e, 1)]).top1_agreement is None
    with pytest.raises(ValueError, match="without a reference"):
        mean_scores([short, Scores(1.0, np.e, 1)])


def test_ruined_model_has_infinite_perplexity() -> None:
    accumulator = Accumulator()
    accumulator.add(np.zeros((1, 2), np.int64), np.array([[[-2000.0, 0.0]] * 2], np.float32))
    assert accumulator.scores().loss == 2000.0
    assert accumulator.scores().perplexity == np.inf


def test_windows_are_the_first_of_each_file(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tmp_path / "tokenizer.json"
    built.save(str(tokenizer))
    (tmp_path / "a.txt").write_text("abcdefgh" * 4)
    (tmp_path / "b.txt").write_text("abcdefgh" * 2 + "tail")
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    chosen = evaluation_windows(files, tokenizer, tokens=24, window=8)
    assert {name: array.shape for name, array in chosen.items()} == {"a": (3, 8), "b": (2, 8)}
    assert (chosen["a"] == chosen["a"][0]).all()
    assert len(evaluation_windows(files, tokenizer, window=8)["a"]) == 4
    for arguments in ({"tokens": 7, "window": 8}, {"window": 1}):
        with pytest.raises(UserError):
            evaluation_windows(files, tokenizer, **arguments)
    with pytest.raises(UserError, match="at least one file"):
        evaluation_windows([], tokenizer)
