"""The examples as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: object, **environment: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    env = os.environ | {key: str(value) for key, value in environment.items()}
    return subprocess.run(command, capture_output=True, check=True, text=True, env=env, timeout=300).stdout


def test_write_a_pass(tmp_path):
    """Two of 16 experts a layer go from 2 to 4 bits: 2 / 16 * 2 bits a weight."""
    out = run("write_a_pass.py", XDG_CACHE_HOME=tmp_path)
    assert "floor-hot-experts                 moqc.profile, moqc.bits -> moqc.bits" in out
    changes = re.findall(r"model\.layers\.(\d)\.mlp\.experts: (\S+) -> (\S+) bits per weight", out)
    assert changes == [(str(layer), "2.375", "2.625") for layer in range(4)]
    assert len((EXAMPLES / "write_a_pass.py").read_text().splitlines()) <= 80


def test_generate(toy):
    """The toy artifact says its text whatever it is asked, at a temperature too."""
    assert run("generate.py", toy.folder, toy.text[0]).startswith(toy.text[1:9])
