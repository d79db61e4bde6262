"""Running on GPUs: what is refused on a machine without one."""

import types

import pytest

from moqc.errors import TargetError
from moqc.runtime import cuda


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90", (9, 0), True),
        ("sm_90", (10, 0), False),
        ("compute_87", (8, 6), False),
        ("compute_87", (9, 0), True),
    ],
)
def test_which_code_runs_where(architecture, capability, runs):
    assert cuda.runs_on(architecture, *capability) == runs


def test_no_driver_is_one_clear_line(monkeypatch):
    def load(name, mode=0):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", load)
    with pytest.raises(TargetError, match=r"NVIDIA GPUs \(sm_90\), and there is no driver here"):
        cuda.load_cuda(types.ModuleType("tvm"), ["sm_90"])


def test_no_runtime_of_cuda_says_what_to_install(monkeypatch):
    def load(name, mode=0):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda, "absent_gpu", lambda: None)
    monkeypatch.setattr(cuda.ctypes, "CDLL", load)
    with pytest.raises(
        TargetError, match=r"no libcudart\.so\.13 .*nvidia-cuda-runtime`, on a Jetson JetPack 7"
    ):
        cuda.load_cuda(types.ModuleType("tvm"), ["sm_87"])
