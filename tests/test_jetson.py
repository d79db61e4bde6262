"""The kernels of jetson-orin, on machines that are none.

`pytest -m cuda tests/test_jetson.py` runs them, by their PTX, on a newer GPU; `pytest -m slow
tests/test_jetson.py` counts what they take of the one they are for.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moqc

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "models" / "tiny-moe"
RECORD = ROOT / "benchmarks" / "results" / "jetson-kernels.json"
OPTIONS = {"bits": 3.0, "allocator": "uniform", "quantizer": "rtn", "max_batch": 2}
TOLERANCE = 2e-2
"""Relative error of logits of a float16 machine."""


@pytest.mark.cuda
def test_its_kernels_compute_what_the_cpu_does(tmp_path):
    for target in ("cuda:compute_87@x86-64-v3", "native"):
        options = {**OPTIONS, "target": target, "activations": "float", "cache": tmp_path / "cache"}
        moqc.compile(MODEL, tmp_path / target, **options)
    gpu, cpu = (moqc.load(tmp_path / target) for target in ("cuda:compute_87@x86-64-v3", "native"))
    ids = np.random.default_rng(0).integers(2, 16_000, (2, 70))
    expected, session = cpu.forward(ids), gpu.session()
    decoded = np.concatenate([session.extend(part) for part in np.split(ids, [64, 65, 66], axis=1)], axis=1)
    for found in (gpu.forward(ids), decoded):
        assert np.linalg.norm(found - expected) < TOLERANCE * np.linalg.norm(expected)


@pytest.mark.slow
def test_they_take_no_more_registers_and_shared_memory_than_recorded(tmp_path):
    program, output = ROOT / "benchmarks" / "jetson_counts.py", tmp_path / "counts.json"
    subprocess.run([sys.executable, program, "-o", output], check=True, capture_output=True)
    found, recorded = (json.loads(path.read_text())["kernels"] for path in (output, RECORD))
    assert found.keys() == recorded.keys()
    for name, counts in found.items():
        for what, number in counts.items():
            assert number <= 1.1 * recorded[name][what], (name, what)  # another nvcc takes a few more
