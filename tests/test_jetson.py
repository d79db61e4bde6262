"""tiny-moe for Jetson Orin, on machines that are none.

`pytest -m slow tests/test_jetson.py` looks at the library; `pytest -m cuda tests/test_jetson.py` runs the
same kernels, by their PTX, on a newer GPU.
"""

import struct
from pathlib import Path

import numpy as np
import pytest

import moqc

MODEL = Path(__file__).parents[1] / "examples" / "models" / "tiny-moe"
EM_AARCH64, EM_CUDA = 183, 190
MAGIC = b"\x7fELF"
OPTIONS = {"bits": 3.0, "allocator": "uniform", "quantizer": "rtn", "max_batch": 2}
TOLERANCE = 2e-2
"""Relative error of logits of a float16 machine."""


def _elf_files(data: bytes) -> list[tuple[int, int]]:
    """Machine and flags of the ELF file `data` and of those inside it."""
    starts, at = [], data.find(MAGIC)
    while at >= 0:
        starts.append(at)
        at = data.find(MAGIC, at + len(MAGIC))
    return [
        (struct.unpack_from("<H", data, start + 18)[0], struct.unpack_from("<I", data, start + 48)[0])
        for start in starts
    ]


@pytest.mark.slow
def test_library_has_arm_code_and_machine_code_for_sm_87(tmp_path):
    artifact = tmp_path / "jetson"
    moqc.compile(MODEL, artifact, target="jetson-orin", cache=tmp_path / "cache", **OPTIONS)
    (host, _), *devices = _elf_files((artifact / "model.so").read_bytes())
    assert host == EM_AARCH64
    assert [(machine, flags >> 8 & 0xFF) for machine, flags in devices] == [(EM_CUDA, 87)]


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
