from __future__ import annotations

from tvm import relax, tirx

from moqc.ir import ops
from moqc.schedules.cpu.lower import lower_linear
from moqc.targets import find_target


def _two_linears(toolbox, formats: tuple[str, str]) -> list[dict]:
    """The descriptions of the kernels that two linears in a row are lowered to."""
    bb, target = relax.BlockBuilder(), find_target("x86-64-v3")
    x = relax.Var("x", relax.TensorType([tirx.Var("m", "int64"), 64], "float32"))
    weights = []
    for number, fmt in enumerate(formats):
        operands = toolbox.packed(toolbox.quantized(fmt, 64, 64))
        types = {k: relax.TensorType(a.shape, str(a.dtype)) for k, a in operands.items()}
        weights.append([relax.Var(f"{name}_{number}", ty) for name, ty in types.items()])
    with bb.function("main", [x, *weights[0], *weights[1]]):
        with bb.dataflow():
            value = x
            for fmt, tensors in zip(formats, weights, strict=True):
                names = ["codes", "scales", "zeros"][: len(tensors)]
                attrs = {"site": fmt, "format": fmt, "rows": 64, "activations": "int8", "operands": names}
                call = bb.normalize(ops.linear(value, *tensors, **attrs))
                value = bb.emit(lower_linear(bb, call, target))
            result = bb.emit_output(value)
        bb.emit_func_output(result)
    functions = bb.get().functions.values()
    return [dict(f.attrs["moqc.kernel"]) for f in functions if isinstance(f, tirx.PrimFunc)]


def test_equal_kernels_are_one_function(toolbox):
    kinds = [kernel["kind"] for kernel in _two_linears(toolbox, ("int4-g64", "int4-g64"))]
    assert sorted(kinds) == ["activations", "linear"]


def test_a_kernel_for_each_format(toolbox):
    kernels = _two_linears(toolbox, ("int4-g64", "int3-g64-sym"))
    assert sorted(kernel["format"] for kernel in kernels if kernel["kind"] == "linear") == [
        "int3-g64-sym",
        "int4-g64",
    ]
