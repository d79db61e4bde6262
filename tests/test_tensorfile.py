import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from safetensors.torch import load_file, save_file

from moqc.errors import ArtifactError
from moqc.package import from_torch
from moqc.tensorfile import DTYPES, StoredTensor, create_tensors, open_tensors


@settings(deadline=None, max_examples=30)
@given(
    entries=st.lists(
        st.tuples(
            st.sampled_from(sorted(DTYPES)), array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
        ),
        max_size=6,
    )
)
def test_written_files_read_back_bit_for_bit(tmp_path_factory, entries):
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    tensors = {}
    for at, (name, shape) in enumerate(entries):
        dtype = DTYPES[name]
        data = random.integers(0, 2, (*shape, dtype.itemsize), dtype=np.uint8)
        tensors[f"é.{at}"] = StoredTensor(name, data.view(dtype).reshape(shape))
    with create_tensors(path, [*tensors, "never written"]) as writer:
        for name, tensor in tensors.items():
            assert writer.add(name, tensor) == tensor.data.nbytes
    read = open_tensors(path)
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].data.tobytes() == tensor.data.tobytes()
        assert read[name].data.shape == tensor.data.shape
    assert {name: tuple(tensor.shape) for name, tensor in load_file(path).items()} == {
        name: tensor.data.shape for name, tensor in tensors.items()
    }  # the reference implementation accepts the file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floats_become_float32_exactly(tmp_path, dtype):
    tensor = torch.randn(3, 5).to(dtype)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    for stored in (open_tensors(tmp_path / "x.safetensors")["x"], from_torch(tensor)):
        out = np.empty((3, 5), np.float32)
        stored.copy_to(out)
        np.testing.assert_array_equal(out, tensor.float().numpy())


@pytest.mark.parametrize(("dtype", "out"), [("F32", np.int8), ("BF16", np.float16), ("F32", np.float16)])
def test_lossy_conversions_are_refused(dtype, out):
    with pytest.raises(ArtifactError, match="cannot be used"):
        StoredTensor(dtype, np.zeros(3, DTYPES[dtype])).copy_to(np.empty(3, out))


@pytest.mark.parametrize("content", [b"", b"\x05\0\0\0\0\0\0\0{}", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]"])
def test_damaged_files(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="not a valid safetensors"):
        open_tensors(path)


def test_truncated_data(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="not a valid safetensors"):
        open_tensors(path)


def test_a_failing_writer_leaves_no_readable_file(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ZeroDivisionError), create_tensors(path, ["x"]) as writer:
        writer.add("x", StoredTensor.of(np.zeros(3 // writer.add("y", StoredTensor.of(np.zeros(0))))))
    with pytest.raises(ArtifactError):
        open_tensors(path)
