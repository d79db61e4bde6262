"""Static counts of the portable kernels: what they are is recorded, so that a regression shows."""

import json
from pathlib import Path

import pytest

from moqc import schedules
from moqc.bench.launched import count_format
from moqc.quant.formats import Format

RECORDED = json.loads((Path(schedules.__file__).parent / "portable" / "counts.json").read_text())


def instructions(counts):
    return sum(value for name, value in counts.items() if name != "shared_bytes")


@pytest.mark.parametrize("name", ["int2-g64", "int3-g64"])
def test_counts_are_as_recorded(name):
    assert count_format(Format.parse(name)) == RECORDED[name]


def test_two_bits_cost_no_more_instructions_than_four():
    assert instructions(RECORDED["int2-g64"]) <= 1.15 * instructions(RECORDED["int4-g64"])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_weight_is_read_once(bits):
    # Its bits of a word, one activation, and a word each of the group's scales and zeros.
    assert RECORDED[f"int{bits}-g64"]["loads"] == pytest.approx(bits / 32 + 1 + 2 / 32, abs=1e-4)
