"""tiny-moe for Jetson Orin, on a machine that is neither: `pytest -m slow tests/test_jetson.py`."""

import struct
from pathlib import Path

import pytest

import moqc

pytestmark = pytest.mark.slow
MODEL = Path(__file__).parents[1] / "examples" / "models" / "tiny-moe"
EM_AARCH64, EM_CUDA = 183, 190
MAGIC = b"\x7fELF"


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


def test_library_has_arm_code_and_machine_code_for_sm_87(tmp_path):
    artifact = tmp_path / "jetson"
    moqc.compile(
        MODEL,
        artifact,
        target="jetson-orin",
        bits=3.0,
        allocator="uniform",
        quantizer="rtn",
        cache=tmp_path / "cache",
    )
    (host, _), *devices = _elf_files((artifact / "model.so").read_bytes())
    assert host == EM_AARCH64
    assert [(machine, flags >> 8 & 0xFF) for machine, flags in devices] == [(EM_CUDA, 87)]
