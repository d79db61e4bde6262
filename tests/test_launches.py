"""Launch lists: expressions, and what is read off a compiled module."""

import re
from dataclasses import replace

import pytest

import moqc
from moqc.errors import ArtifactError, TargetError, UserError
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.hf import import_model
from moqc.launch_plan import Planner, plan_launches
from moqc.launches import FILE, evaluate, read_launches
from moqc.limits import check_caches, check_kernels
from moqc.passes.base import PassContext
from moqc.passes.legalize import Legalize
from moqc.passes.narrow_integers import NarrowIntegers
from moqc.passes.schedule import Schedule
from moqc.recipe import Recipe
from moqc.targets import find_target

TINY = "examples/models/tiny-moe"


def test_expressions():
    assert evaluate(["+", ["*", "seq", 3], ["/", ["%", 17, 10], 2]], {"seq": 5}) == 18
    assert evaluate(["and", ["<", 1, 2], ["==", ["max", 1, "n"], 4]], {"n": 4}) == 1


@pytest.fixture(scope="module")
def lowered():
    """A linear and a softmax for OpenCL and for WebGPU."""
    from tvm import relax, tirx

    from moqc.ir import ops
    from moqc.ir.annotations import PARAMS
    from moqc.ir.packed import packed_types
    from moqc.quant.formats import Format

    types = packed_types(Format.parse("int3-g32"), 40, 48)
    seq = tirx.Var("seq", "int64")
    x = relax.Var("x", relax.TensorType([seq, 48], "float32"))
    ids = relax.Var("ids", relax.TensorType([seq, 1], "int64"))
    weights = [relax.Var(name, ty) for name, ty in types.items()]
    builder = relax.BlockBuilder()
    attrs = {"tir_var_upper_bound": {"seq": 16}, "num_input": 2}
    with builder.function("main", [x, ids, *weights], attrs):
        with builder.dataflow():
            call = ops.linear(
                x, *weights, rows=40, format="int3-g32", layout="interleaved16",
                operands=list(types), activations="float", site="here",
            )  # fmt: skip
            shifted = relax.op.add(builder.emit(call), relax.op.astype(ids, "float32"))
            result = builder.emit_output(relax.op.nn.softmax(builder.emit(shifted)))
        builder.emit_func_output(result)
    mod = PARAMS.put(builder.get(), [f"here.{name}" for name in types])

    def lower(name):
        target = find_target(name)
        ctx, found = PassContext(target=target), mod
        for each in (NarrowIntegers(), Legalize(), Schedule()):
            found = each(found, ctx)
        return found, target

    return lower


@pytest.mark.parametrize("name", ["opencl", "webgpu"])
def test_launches_of_a_module(lowered, name):
    mod, target = lowered(name)
    launches = plan_launches(mod, target)
    assert launches.language == name
    (words,) = [buffer for buffer in launches.main.buffers if buffer.weights]
    assert [tensor.name for tensor in words.weights] == ["here.codes", "here.scales", "here.zeros"]
    inputs = [buffer for buffer in launches.main.buffers if buffer.role == "input"]
    assert [(buffer.dtype, buffer.shape) for buffer in inputs] == [
        ("float32", ("seq", 48)),
        ("int32", ("seq", 1)),
    ]
    run = [
        each.kernel for each in launches.main.launches if each.when is None or evaluate(each.when, {"seq": 1})
    ]
    many = [
        each.kernel for each in launches.main.launches if each.when is None or evaluate(each.when, {"seq": 9})
    ]
    assert run != many  # decoding has kernels of its own
    assert len(run) == len(many)
    if name == "webgpu":
        for kernel in launches.kernels.values():
            assert len(re.findall(r"var<storage", kernel.source)) == kernel.buffers <= 8
            assert not re.search(r"\b(i64|u64|f16|f64|u8)\b", kernel.source)


def test_a_buffer_beyond_the_binding_is_refused(lowered):
    mod, target = lowered("opencl")
    planner = Planner(mod, replace(target, largest_binding=500))
    with pytest.raises(TargetError, match=r"[\d,]+ bytes in one buffer, opencl binds at most 500"):
        planner.program("main", 0)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(ArtifactError, match="compile the model again"):
        read_launches(tmp_path)


def test_a_parameter_beyond_the_binding_is_refused_from_headers(tmp_path, monkeypatch):
    """Before the gate, calibration or any pass, whose results would be in the cache."""
    small = replace(find_target("opencl"), largest_binding=1 << 16)
    monkeypatch.setattr("moqc.compiling.find_target", lambda *_: small)
    with pytest.raises(
        TargetError, match=r"experts gate: about 98,304 bytes .* binds at most 65,536; use fewer"
    ):
        moqc.compile(TINY, tmp_path / "out", target="opencl", max_batch=1, cache=tmp_path / "cache")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def test_a_cache_beyond_the_binding_is_refused_before_the_first_pass():
    mod = import_model(Checkpoint.open(TINY), max_batch=4, max_chunk=64)
    small = replace(find_target("opencl"), largest_binding=1 << 16)
    with pytest.raises(TargetError, match=r"the cache of 4 sequences of 1024 tokens: about 1,048,576 bytes"):
        check_caches(mod, small, 1024, 4)
    check_caches(mod, find_target("opencl"), 1024, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": "trellis"}, "read integers"),
        ({"prune": 0.1}, "no kernel for target opencl"),
        ({"activations": "int8"}, "have float"),
        ({"max_batch": 100_000}, "smaller --max-batch"),
    ],
)
def test_what_there_is_no_kernel_for_is_refused_at_once(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        moqc.compile(TINY, tmp_path / "out", target="opencl", cache=tmp_path / "cache", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["cuda", "jetson-orin", "x86-64-v3"])
def test_trellises_have_kernels_on_cuda_and_cpus(target):
    check_kernels(find_target(target), Recipe(formats="trellis"))
