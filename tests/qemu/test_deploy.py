"""tiny-moe cross-compiled: the C++ loader and the Python runtime, on x86 and under qemu, say the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import qemu_board
import tvm

import moqc

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "examples" / "deploy" / "cpp"
CORE = qemu_board.CORES["aarch64"]
PROMPTS = [
    "Il était une fois",
    "Hello, world! It's 123\n\n  x",
    "naïve café — 日本",
    "<|endoftext|>def f(x):\n    ",
]
TOKENS = 12
OPTIONS = {"bits": 3.0, "allocator": "uniform", "quantizer": "rtn", "context": 96, "max_batch": 1}
MODES = {"float": 2e-3, "int8": None}
"""Activations -> how far logits may differ. Where activations are rounded, the last bit of a float decides
which way one falls that lies between two codes, and what follows from that is an error of neither machine:
there the texts are compared, and kernels in ``tests/schedules/cpu``."""
RUN = """
import sys, json
sys.modules["torch"] = None
import numpy as np, moqc
model, answers, logits = moqc.load(sys.argv[1]), [], []
for prompt in json.loads(sys.argv[3]):
    answers.append(model.generate(prompt, max_tokens=int(sys.argv[4]), temperature=0.0))
    logits.append(model.forward(model.encode(prompt))[-1])
np.save(sys.argv[2], np.stack(logits))
print(json.dumps(answers))
"""
pytestmark = pytest.mark.qemu


@dataclass
class Answers:
    """For each of the prompts: the greedy text, and the logits [prompts, V] after it."""

    texts: list[str]
    logits: np.ndarray


@pytest.fixture(scope="module", params=list(MODES))
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def artifacts(mode: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    model = ROOT / "examples" / "models" / "tiny-moe"
    targets = ["x86-64-v3", "aarch64"]
    moqc.compile_each(model, folder, targets=targets, activations=mode, cache=folder / "cache", **OPTIONS)
    return {target: folder / target for target in targets}


def by_python(command: list[str], artifact: Path, folder: Path, env: dict[str, str] | None) -> Answers:
    arguments = [artifact, folder / "logits.npy", json.dumps(PROMPTS), str(TOKENS)]
    done = subprocess.run(
        [*command, "-c", RUN, *map(str, arguments)], env=env, capture_output=True, text=True, check=True
    )
    return Answers(json.loads(done.stdout), np.load(folder / "logits.npy"))


@pytest.fixture(scope="module")
def expected(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return by_python([sys.executable], artifacts["x86-64-v3"], tmp_path_factory.mktemp("x86"), None)


def build(folder: Path, *options: str) -> Path:
    for command in (["cmake", "-S", SOURCES, "-B", folder, *options], ["cmake", "--build", folder]):
        subprocess.run(command, check=True, capture_output=True)
    return folder / "moqc-run"


def by_loader(
    run: Callable[..., list[str]], artifact: Path, folder: Path, env: dict[str, str] | None
) -> Answers:
    texts, logits = [], []
    for prompt in PROMPTS:
        options = ["--prompt", prompt, "--max-tokens", TOKENS, "--logits", folder / "logits"]
        command = run(artifact, *options)
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        texts.append(done.stdout.removesuffix("\n"))
        vocabulary = json.loads((artifact / "moqc.json").read_text())["vocabulary"]
        logits.append(np.fromfile(folder / "logits", np.float32)[:vocabulary])
    return Answers(texts, np.stack(logits))


def agree(found: Answers, expected: Answers, mode: str) -> None:
    assert found.texts == expected.texts
    limit = MODES[mode]
    assert limit is None or np.abs(found.logits - expected.logits).max() <= limit


def test_weights_are_shared(artifacts: dict[str, Path]) -> None:
    """One file of weights serves every CPU: the packed layout is the same."""
    first, second = (path / "params-00001.safetensors" for path in artifacts.values())
    assert first.samefile(second)


def test_the_library_is_for_arm(artifacts: dict[str, Path], mode: str) -> None:
    described = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", artifacts["aarch64"] / "model.so"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "elf64-littleaarch64" in described
    assert mode == "float" or described.count("\tsdot\t") > 100


def test_loader_on_x86(artifacts: dict[str, Path], expected: Answers, tmp_path: Path, mode: str) -> None:
    site = Path(tvm.__file__).parents[1]
    program = build(tmp_path / "build", f"-DSITE={site}")

    def run(*words: object) -> list[str]:
        return [str(program), *map(str, words)]

    agree(by_loader(run, artifacts["x86-64-v3"], tmp_path, None), expected, mode)


def test_loader_on_arm(artifacts: dict[str, Path], expected: Answers, tmp_path: Path, mode: str) -> None:
    root = qemu_board.userland()
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={SOURCES / 'aarch64.cmake'}"
    program = build(tmp_path / "build", toolchain, f"-DROOT={root}", f"-DSITE={root / 'site'}")

    def run(*words: object) -> list[str]:
        return qemu_board.emulated([program, *map(str, words)], CORE)

    agree(by_loader(run, artifacts["aarch64"], tmp_path, qemu_board.environment()), expected, mode)


def test_python_runtime_on_arm(
    artifacts: dict[str, Path], expected: Answers, tmp_path: Path, mode: str
) -> None:
    found = by_python(qemu_board.python(CORE), artifacts["aarch64"], tmp_path, qemu_board.environment())
    agree(found, expected, mode)
