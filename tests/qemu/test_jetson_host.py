"""The host part of jetson-orin under qemu, on a CUDA that records launches instead of running them.

What it launches must be what the x86 library of the same kernels launches, which runs on real GPUs
(``tests/test_jetson.py``). Takes nvcc.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import qemu_board

import moqc

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "models" / "tiny-moe"
OPTIONS = {"bits": 3.0, "allocator": "uniform", "quantizer": "rtn", "context": 96, "max_batch": 2}
TARGETS = {"x86_64": "cuda:sm_87@x86-64-v3", "aarch64": "jetson-orin"}
COMPILERS = {"x86_64": "cc", "aarch64": "aarch64-linux-gnu-gcc"}
CORE = qemu_board.CORES["aarch64"]
PROMPT, STEPS = 70, 3
RUN = f"""
import sys
sys.modules["torch"] = None
import numpy as np, moqc
model = moqc.load(sys.argv[1])
for rows in (1, 2):
    session, ids = model.session(), np.full((rows, {PROMPT + STEPS}), 5)
    session.extend(ids[:, :{PROMPT}])
    for at in range({PROMPT}, {PROMPT + STEPS}):
        session.extend_greedy(ids[:, at : at + 1])
"""
LOAD = """
import sys
sys.modules["torch"] = None
import moqc, moqc.errors
try:
    moqc.load(sys.argv[1])
except moqc.errors.TargetError as error:
    print(error)
"""
pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    for machine, target in TARGETS.items():
        moqc.compile(MODEL, folder / machine, target=target, cache=folder / "cache", **OPTIONS)
    return {machine: folder / machine for machine in TARGETS}


def recorder(machine: str, folder: Path, *, runtime: bool = True) -> Path:
    """A folder with the recording libraries for a CPU."""
    folder.mkdir()
    versions = folder / "versions"
    versions.write_text("libcudart.so.13 { global: cuda*; };\n")
    kinds = {"libcuda.so.1": ["-DDRIVER"]}
    if runtime:
        kinds["libcudart.so.13"] = [f"-Wl,--version-script={versions}"]
    for name, options in kinds.items():
        source = Path(__file__).with_name("recording_cuda.c")
        command = [COMPILERS[machine], "-shared", "-fPIC", f"-Wl,-soname,{name}", *options]
        subprocess.run([*command, "-o", folder / name, source], check=True)
    return folder


def run_there(machine: str, program: str, artifact: Path, libraries: Path, record: Path) -> str:
    """What `program` prints; the recording libraries come before all others."""
    env = qemu_board.environment()
    if machine == "x86_64":
        command, env = [sys.executable], {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": ""}
    else:
        command = qemu_board.python(CORE)
    env |= {"MOQC_RECORD": str(record), "LD_LIBRARY_PATH": f"{libraries}:{env['LD_LIBRARY_PATH']}"}
    arguments = [*command, "-c", program, str(artifact)]
    return subprocess.run(arguments, env=env, check=True, capture_output=True, text=True).stdout


def test_it_launches_what_the_library_for_x86_launches(artifacts: dict[str, Path], tmp_path: Path) -> None:
    lines = {}
    for machine, artifact in artifacts.items():
        libraries, record = recorder(machine, tmp_path / machine), tmp_path / f"{machine}.txt"
        run_there(machine, RUN, artifact, libraries, record)
        lines[machine] = record.read_text().splitlines()
    assert lines["aarch64"] == lines["x86_64"]
    names = [line.split()[0] for line in lines["aarch64"]]
    assert names.count("graph") == 2 * (STEPS - 1)  # the first step is not captured, for each number of rows
    launches = sum("kernel" in name for name in names)
    print(f"{len(names)} calls of CUDA, {launches} of them launches")  # shown by -rP
    assert launches > 100


def test_what_is_missing_is_named_with_the_jetpack(artifacts: dict[str, Path], tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    without_runtime = recorder("aarch64", tmp_path / "driver", runtime=False)
    for libraries, message in (
        (nothing, "no driver here (libcuda.so.1)"),
        (without_runtime, "no libcudart.so.13 (CUDA's runtime library)"),
    ):
        said = run_there("aarch64", LOAD, artifacts["aarch64"], libraries, tmp_path / "record")
        assert message in said
    assert "JetPack 7" in said
