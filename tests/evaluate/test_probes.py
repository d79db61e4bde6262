from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moqc.errors import InternalError, UserError
from moqc.evaluate.metrics import Accumulator
from moqc.evaluate.probes import ChoiceProbe, ExactProbe, TextProbe
from moqc.evaluate.tasks import LONGEST, Scored, multiple_choice, worked_problems

VOCABULARY = 11


def random_logits(batches: list[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*batch.shape, VOCABULARY, generator=generator) for batch in batches]


def windows(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, 1500))


def test_text_agrees_with_the_accumulator_of_artifacts() -> None:
    probe = TextProbe({"a": windows(5, 0), "b": windows(2, 1)})
    logits = random_logits(probe.batches)  # files are not mixed in a batch: 2 + 2 + 1 and 2 windows
    assert [len(batch) for batch in probe.batches] == [2, 2, 1, 2]
    found = probe.measure(iter(logits))
    for name, parts in (("a", logits[:3]), ("b", logits[3:])):
        accumulator = Accumulator()
        accumulator.add(probe.windows[name], torch.cat(parts).numpy())
        assert found["files"][name] == pytest.approx(accumulator.scores().loss, rel=1e-12)
    assert found["loss"] == pytest.approx((found["files"]["a"] + found["files"]["b"]) / 2)
    assert probe.tokens == 7 * 1499
    with pytest.raises(InternalError, match="NaN"):
        probe.measure(iter([part * float("nan") for part in logits]))


def sequence(tokens: list[int], start: int, question: int) -> Scored:
    return Scored(np.array(tokens), start, question)


def test_choices_take_the_likeliest_option_a_token() -> None:
    options = [
        sequence([1, 2, 3], 1, 0),
        sequence([1, 4, 5, 6, 7, 8, 9], 1, 0),
        sequence([5, 6, 2], 2, 1),
        sequence([5, 6, 3], 2, 1),
    ]
    probe = ChoiceProbe(options)
    (batch,) = probe.batches
    assert batch.shape == (4, 7)
    logits = random_logits(probe.batches)
    scores = []
    for number, option in enumerate(options):
        row = probe.order[0].index(number)
        log_p = logits[0][row].double().log_softmax(-1)
        picked = [float(log_p[at - 1, token]) for at, token in enumerate(option.tokens) if at >= option.start]
        scores.append(sum(picked) / len(picked))
    expected = [int(scores[1] > scores[0]), int(scores[3] > scores[2])]
    assert probe.measure(iter(logits)) == expected


def test_exact_means_that_greedy_decoding_produces_it() -> None:
    sequences = [sequence([1, 2, 3, 4], 2, 0), sequence([1, 2, 3, 4], 2, 1), sequence([9, 9, 9], 1, 2)]
    probe = ExactProbe(sequences)
    logits = torch.zeros(3, 4, VOCABULARY)
    rows = {at: row for row, at in enumerate(probe.order[0])}
    logits[rows[0], 1, 3] = logits[rows[0], 2, 4] = 1.0
    logits[rows[1], 1, 3] = logits[rows[1], 2, 5] = 1.0  # the second token is wrong
    logits[rows[2], 0, 9] = logits[rows[2], 1, 9] = 1.0
    assert probe.measure(iter([logits])) == [True, False, True]


def test_keys_tell_probes_apart() -> None:
    one, other = [sequence([1, 2, 3], 1, 0)], [sequence([1, 2, 3], 2, 0)]
    keys = {probe(rows).key for probe in (ChoiceProbe, ExactProbe) for rows in (one, other)}
    assert len(keys) == 4


@pytest.fixture
def tokenizer(tmp_path: Path, write_tokenizer) -> Path:
    write_tokenizer(tmp_path)  # a token a byte
    return tmp_path / "tokenizer.json"


def test_multiple_choice_files(tmp_path: Path, tokenizer: Path) -> None:
    rows = [
        {"query": "2 + 2 = ", "choices": ["four", "5"], "gold": 0},
        {"query": "x" * LONGEST, "choices": ["too", "long"], "gold": 0},
        {"context_options": ["He", "She"], "continuation": "said so.", "gold": 1},
        {"query": "not", "choices": ["asked", "any more"]},
    ]
    file = tmp_path / "task.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    found = multiple_choice([file], tokenizer, 2)
    assert [one.question for one in found] == [0, 0, 1, 1]
    assert len(found[0].tokens) == len("2 + 2 = four")
    assert found[0].start == len("2 + 2 =")
    assert found[3].start == len("She")
    assert len(found[3].tokens) == len("She said so.")


@pytest.mark.parametrize("line", ["{", "[]", '{"query": "a"}', '{"query": 1, "choices": ["a"]}'])
def test_bad_task_files(tmp_path: Path, tokenizer: Path, line: str) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(line)
    with pytest.raises(UserError, match=r"task\.jsonl: line 1 is no question"):
        multiple_choice([file], tokenizer, 10)


def test_files_without_questions_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(json.dumps({"query": "x" * LONGEST, "choices": ["too", "long"]}))
    with pytest.raises(UserError, match="no question of at most"):
        multiple_choice([file], tokenizer, 10)
    with pytest.raises(UserError, match="no block 'Problem"):
        worked_problems(file, tokenizer, 10)


def test_worked_problems(tmp_path: Path, tokenizer: Path) -> None:
    file = tmp_path / "math.txt"
    file.write_text(
        "Intro.\n\nProblem: 1 + 1?\nSolution: 1 + 1 = 2.\n\nProblem: no solution\n\nProblem: 3?\nSolution: 3"
    )
    found = worked_problems(file, tokenizer, 10)
    assert [one.question for one in found] == [0, 1]
    assert found[0].start == len("Problem: 1 + 1?\nSolution: 1 + 1 =")
    assert found[1].start == len("Problem: 3?\nSolution:")
    # The blank line that ends a block belongs to it: its tokens may be one with the full stop.
    assert len(found[0].tokens) == len("Problem: 1 + 1?\nSolution: 1 + 1 = 2.\n\n")
