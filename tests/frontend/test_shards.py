import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moqc.errors import ModelError
from moqc.frontend.shards import Shards

INDEX = "model.safetensors.index.json"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 5, 2, generator=generator),
        "b": torch.randn(7, generator=generator).to(torch.bfloat16),
        "c": torch.randn(4, 4, generator=generator).to(torch.float16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5),
    }


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def test_reads_what_safetensors_wrote(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save(tmp_path, tensors)
    shards = Shards(tmp_path)
    assert shards.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = shards.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_reads_one_row(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save(tmp_path, tensors)
    assert torch.equal(Shards(tmp_path).read("a", row=2), tensors["a"][2])


def test_no_weight_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no safetensors files"):
        Shards(tmp_path)


def test_pickle_is_named_and_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle.*convert it to safetensors"):
        Shards(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_truncated_file(tmp_path: Path, tensors: dict[str, torch.Tensor], kept: int) -> None:
    file = save(tmp_path, tensors)
    data = file.read_bytes()
    file.write_bytes(data[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated"):
        Shards(tmp_path)


def test_overlong_file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = save(tmp_path, tensors)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ModelError, match="longer than its header says"):
        Shards(tmp_path)


def test_shape_and_bytes_disagree(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ModelError, match="a has 8 bytes"):
        Shards(tmp_path)


def test_file_that_shrinks_after_open(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = save(tmp_path, tensors)
    shards = Shards(tmp_path)
    file.write_bytes(file.read_bytes()[: shards.tensors["a"].offset + 4])
    with pytest.raises(ModelError, match="ends inside a"):
        shards.read("a")


def test_dtype_moqc_does_not_read(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.zeros(2, dtype=torch.int8)})
    with pytest.raises(ModelError, match="a is stored as I8; moqc reads F32, F16, BF16 only"):
        Shards(tmp_path).dtype("a")


def write_index(folder: Path, weight_map: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_missing_shard(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save(tmp_path, tensors)
    write_index(tmp_path, {"a": "model.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(ModelError, match=r"model-2\.safetensors is missing"):
        Shards(tmp_path)


def test_index_that_lies(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save(tmp_path, tensors)
    write_index(tmp_path, {"a": "model.safetensors", "z": "model.safetensors"})
    with pytest.raises(ModelError, match=r"says that z is in model\.safetensors, but it is not"):
        Shards(tmp_path)


def test_several_files_need_an_index(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save(tmp_path, tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="2 safetensors files but no"):
        Shards(tmp_path)


def test_unreadable_index(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save(tmp_path, tensors)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ModelError, match="cannot read"):
        Shards(tmp_path)
