"""What a weight costs in the inner loop of aarch64's decoding, counted in the disassembly."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moqc.pipelines import CANDIDATES, DEFAULT_CANDIDATES
from moqc.quant.formats import ALL_FORMATS, Format

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "aarch64-instructions.json"
FORMATS = ["int2-g64", "int4-g64", "tcq2-g64"]
PRODUCTS = {"aarch64": "sdot", "aarch64-i8mm": "usdot", "aarch64-neon": "smlal"}
"""Target -> the instruction that most products of its loops are."""


@pytest.mark.qemu
def test_the_record_is_what_is_compiled(tmp_path: Path) -> None:
    program = ROOT / "benchmarks" / "aarch64_instructions.py"
    options = ["--formats", ",".join(FORMATS), "-o", tmp_path / "counts.json"]
    subprocess.run([sys.executable, program, *options], check=True, capture_output=True)
    counts = json.loads((tmp_path / "counts.json").read_text())["targets"]
    recorded = json.loads(RECORD.read_text())["targets"]
    for target, formats in counts.items():
        assert formats == {name: recorded[target][name] for name in FORMATS}


def test_every_format_is_recorded_with_the_targets_instruction() -> None:
    for target, counts in json.loads(RECORD.read_text())["targets"].items():
        assert list(counts) == [str(fmt) for fmt in ALL_FORMATS]
        assert all(each["product"].startswith(PRODUCTS[target]) for each in counts.values()), target


def test_two_bits_take_few_more_instructions_than_four() -> None:
    """At half the bytes: where memory is the limit they are twice as fast, elsewhere hardly slower."""
    for target, counts in json.loads(RECORD.read_text())["targets"].items():
        kinds = itertools.product((32, 64, 128), ("", "-sym", "-s8", "-sym-s8"))
        pairs = [[f"int{bits}-g{group}{suffix}" for bits in (2, 4)] for group, suffix in kinds]
        defaults = {Format.parse(name).bits: name for name in CANDIDATES[DEFAULT_CANDIDATES]}
        for two, four in (*pairs, [defaults[2], defaults[4]]):
            assert counts[two]["per_weight"] <= 1.15 * counts[four]["per_weight"], (target, two, four)
