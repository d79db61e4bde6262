from __future__ import annotations

import numpy as np
import pytest
import tvm

from moqc.runtime.device import Cpu
from moqc.tensorfile import StoredTensor, create_tensors, open_tensors


@pytest.fixture
def tensors(tmp_path):
    """A line of bytes, three float32 (aligned, being next) and a float16 (not aligned)."""
    arrays = {
        "line": np.arange(64, dtype=np.uint8),
        "floats": np.array([1, 2, 3], np.float32),
        "half": np.array([0.5], np.float16),
    }
    with create_tensors(tmp_path / "t.safetensors", list(arrays)) as writer:
        for name, array in arrays.items():
            writer.add(name, StoredTensor.of(array))
    return open_tensors(tmp_path / "t.safetensors")


def test_aligned_tensors_are_the_pages_of_the_file(tensors):
    for name, dtype in (("line", "uint8"), ("floats", "float32")):
        tensor = Cpu(tvm).stored(tensors[name], dtype)
        assert np.shares_memory(np.from_dlpack(tensor), tensors[name].data)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_others_are_copied(tensors, dtype):
    tensor = Cpu(tvm).stored(tensors["half"], dtype)
    assert str(tensor.dtype) == dtype
    np.testing.assert_array_equal(tensor.numpy(), [0.5])
    assert not np.shares_memory(np.from_dlpack(tensor), tensors["half"].data)


def test_writing_does_not_reach_the_file(tensors, tmp_path):
    before = (tmp_path / "t.safetensors").read_bytes()
    np.from_dlpack(Cpu(tvm).stored(tensors["line"], "uint8"))[:] = 7
    assert (tmp_path / "t.safetensors").read_bytes() == before
