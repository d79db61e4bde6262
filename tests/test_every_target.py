"""tiny-moe compiles for every target on one machine, in minutes: `pytest -m slow tests/test_every_target.py`.

Takes what `moqc targets` names: gcc, `apt install g++-aarch64-linux-gnu`, nvcc.
"""

import os
import struct
from pathlib import Path

import pytest

import moqc
from moqc.launches import read_launches
from moqc.targets import TARGETS

pytestmark = pytest.mark.slow
MODEL = Path(__file__).parents[1] / "examples" / "models" / "tiny-moe"
SECONDS = 180
MACHINES = {"x86_64": 62, "aarch64": 183}
"""What `file` reads an ELF header's machine from (elf.h)."""
EM_CUDA = 190
MAGIC = b"\x7fELF"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The first target pays for measuring and quantizing, as far as the next ones agree with it."""
    return tmp_path_factory.mktemp("cache")


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


@pytest.mark.parametrize("name", TARGETS)
def test_compiles_to_what_the_target_is(name, cache, tmp_path):
    target, artifact, begin = TARGETS[name], tmp_path / "model", os.times()
    moqc.compile(MODEL, artifact, target=name, bits=2.5, cache=cache)
    seconds = sum(os.times()[:4]) - sum(begin[:4])  # with compilers that were called
    print(f"{name}: {seconds:.0f} s of CPU")  # shown by -rP
    assert seconds < SECONDS
    if target.launched:
        assert read_launches(artifact).language == target.device
        return
    (host, _), *devices = _elf_files((artifact / "model.so").read_bytes())
    assert host == MACHINES[target.machine]
    architectures = [(EM_CUDA, int(name.removeprefix("sm_"))) for name in target.architectures]
    assert [(machine, flags >> 8 & 0xFF) for machine, flags in devices] == architectures
