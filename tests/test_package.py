import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moqc.errors import InternalError, ModelError, UserError
from moqc.manifest import MANIFEST, Parameter, read_manifest
from moqc.package import check_output, copy_metadata, staged_folder, write_parameters
from moqc.tensorfile import StoredTensor, open_tensors


def parameters(*shapes):
    return [Parameter(name=f"p{at}", shape=shape, dtype="float32") for at, shape in enumerate(shapes)]


def test_shards_hold_every_tensor_once(tmp_path):
    wanted = parameters((10,), (10,), (100,), (5,), (0,), (10,))
    arrays = {p.name: np.full(p.shape, at, np.float32) for at, p in enumerate(wanted)}
    stored = write_parameters(tmp_path, wanted, lambda name: StoredTensor.of(arrays[name]), shard_bytes=80)
    files = [open_tensors(path) for path in sorted(tmp_path.iterdir())]  # p4, empty, is whole lines
    assert [list(file) for file in files] == [["p4", "p0", "p1"], ["p2"], ["p3", "p5"]]
    assert stored == {name: array.nbytes for name, array in arrays.items()}
    for file in files:
        for name, tensor in file.items():
            np.testing.assert_array_equal(tensor.data, arrays[name])


def test_tensors_of_whole_lines_start_at_one(tmp_path):
    shapes = {"odd": (3,), "even": (32,), "more": (5,), "last": (2, 16)}
    parameters = [Parameter(name=name, shape=shape, dtype="float32") for name, shape in shapes.items()]
    write_parameters(tmp_path, parameters, lambda name: StoredTensor.of(np.ones(shapes[name], np.float32)))
    tensors = open_tensors(tmp_path / "params-00001.safetensors")
    assert [tensors[name].data.ctypes.data % 64 for name in ("even", "last")] == [0, 0]
    assert set(tensors) == set(shapes)


def test_one_tensor_at_a_time(tmp_path):
    alive = []

    def load(name):
        import weakref

        assert sum(ref() is not None for ref in alive) <= 1  # the one that was just written
        array = np.zeros(1000, np.float32)
        alive.append(weakref.ref(array))
        return StoredTensor.of(array)

    write_parameters(tmp_path, parameters(*[(1000,)] * 5), load)


def test_a_wrong_shape_is_a_bug(tmp_path):
    with pytest.raises(InternalError, match="p0"):
        write_parameters(tmp_path, parameters((3,)), lambda name: StoredTensor.of(np.zeros(4)))


def test_manifest_counts_everything(toy):
    manifest = read_manifest(toy.folder)
    sizes = manifest.sizes
    assert sizes.artifact_bytes == sum(path.stat().st_size for path in toy.folder.iterdir())
    assert sizes.parameter_bytes == toy.table.nbytes + 2 * toy.tilt.size
    assert sizes.expert_file_bits_per_weight == 32.0
    assert sizes.model_file_bits_per_weight == 8 * sizes.parameter_bytes / (2 * toy.table.size)
    assert set(manifest.files) == {path.name for path in toy.folder.iterdir()} - {MANIFEST}


def test_existing_outputs(toy, tmp_path):
    check_output(tmp_path, force=False)  # empty
    check_output(toy.folder, force=True)
    with pytest.raises(UserError, match="--force"):
        check_output(toy.folder, force=False)
    (tmp_path / "thesis.tex").write_text("years of work")
    beside = shutil.copytree(toy.folder, tmp_path / "artifact")
    shutil.copy(tmp_path / "thesis.tex", beside)
    with pytest.raises(UserError, match=r"thesis\.tex is not part of the artifact"):
        check_output(beside, force=True)
    with pytest.raises(UserError, match="not a moqc artifact"):
        check_output(tmp_path, force=True)
    with pytest.raises(UserError, match="not a folder"):
        check_output(tmp_path / "thesis.tex", force=True)


def test_unwritable_output(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        check_output(Path("/proc/moqc/out"), force=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        check_output(tmp_path / "file" / "out", force=False)


def test_the_folder_appears_complete_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged_folder(out, force=False) as folder:
        (folder / "a").write_text("a")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["a"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def fail(folder, error):
    (folder / MANIFEST).write_text("new")
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failure_keeps_what_was_there(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST).write_text("old")
    with pytest.raises(error), staged_folder(out, force=True) as folder:
        fail(folder, error)
    assert (out / MANIFEST).read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_force_replaces_the_whole_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST).write_text("old")
    (out / "params-00009.safetensors").write_text("old")
    with staged_folder(out, force=True) as folder:
        (folder / MANIFEST).write_text("new")
    assert [path.name for path in out.iterdir()] == [MANIFEST]
    assert (out / MANIFEST).read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_a_checkpoint_without_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer"):
        copy_metadata(tmp_path, tmp_path)


def test_interrupt_signal_leaves_nothing(tmp_path):
    code = (
        "import time, sys\nfrom pathlib import Path\nfrom moqc.package import staged_folder\n"
        f"with staged_folder(Path({str(tmp_path / 'out')!r}), force=False) as f:\n"
        "    (f / 'half').write_text('')\n    print('ready', flush=True)\n    time.sleep(30)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"ready\n"
    os.kill(process.pid, 2)
    deadline = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.stdout.close()
    assert process.returncode not in (None, 0)
    assert list(tmp_path.iterdir()) == []
