"""One compilation for several targets: an artifact each, one file of weights where layouts agree."""

import pytest

import moqc
from moqc.errors import UserError

TINY = "examples/models/tiny-moe"
PLAN = {"bits": 3.0, "allocator": "uniform", "quantizer": "rtn", "max_batch": 1, "context": 64}
WEIGHTS = "params-00001.safetensors"


def test_targets_with_one_layout_share_the_weights(tmp_path):
    made = moqc.compile_each(
        TINY, tmp_path / "out", targets=["x86-64-v3", "opencl"], cache=tmp_path / "cache", **PLAN
    )
    assert list(made) == ["x86-64-v3", "opencl"]
    files = [tmp_path / "out" / name / WEIGHTS for name in made]
    assert files[0].samefile(files[1])
    assert (tmp_path / "out" / "x86-64-v3" / "model.so").exists()
    assert (tmp_path / "out" / "opencl" / "launches.json").exists()
    for name, manifest in made.items():
        assert manifest.recipe["target"] == name
        moqc.inspect(tmp_path / "out" / name)  # a whole artifact: moqc verify's checks
    (tmp_path / "out" / "opencl" / WEIGHTS).unlink()
    assert moqc.load(tmp_path / "out" / "x86-64-v3").generate([5, 6, 7], max_tokens=4)


@pytest.mark.parametrize(
    ("targets", "options", "problem"),
    [
        (["x86-64-v3", "x86-64-v3"], {}, "each once"),
        ([], {}, "at least one"),
        (["x86-64-v3", "vax"], {}, "unknown target 'vax'"),
        (["x86-64-v3", "opencl"], {"formats": "trellis"}, "the kernels of opencl read integers"),
        (["x86-64-v3", "webgpu"], {"max_batch": 10_000}, "webgpu binds at most"),
    ],
)
def test_what_one_cannot_is_refused_before_the_first(tmp_path, targets, options, problem):
    with pytest.raises(UserError, match=problem):
        moqc.compile_each(
            TINY, tmp_path / "out", targets=targets, cache=tmp_path / "cache", **{**PLAN, **options}
        )
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()
