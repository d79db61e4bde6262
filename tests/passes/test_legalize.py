"""legalize: which operators become calls of kernels, and which stay TVM's."""

import dataclasses

import pytest
from tvm import relax

from moqc.errors import PipelineError, TargetError
from moqc.ir.annotations import KERNELS
from moqc.ir.sites import bindings
from moqc.ir.text import parse_module
from moqc.passes.base import PassContext
from moqc.passes.legalize import Legalize
from moqc.targets import TARGETS

CONTEXT = PassContext(target=TARGETS["x86-64-v3"])


def called(mod):
    """What each binding of main calls: kernel names without their numbers, operator names of the others."""
    names = []
    for _, value in bindings(Legalize()(mod, CONTEXT)["main"]):
        if isinstance(value, relax.Call) and value.op.name.startswith("relax.call_tir"):
            names.append(value.args[0].name_hint.rstrip("0123456789"))
        elif isinstance(value, relax.Call):
            names.append(value.op.name)
    return names


def test_kernels_take_the_place_of_operators(moe):
    assert called(moe) == [
        "relax.take", "relax.reshape", "moqc_dense_linear", "relax.nn.softmax", "moqc_topk",
        "moqc_route", "moqc_dense_up", "moqc_dense_down", "moqc_dense_linear", "relax.add",
        "moqc_dense_linear",
    ]  # fmt: skip


def test_an_index_out_of_range_is_clipped(moe):
    take = next(value for _, value in bindings(Legalize()(moe, CONTEXT)["main"]))
    assert take.attrs.mode == "clip"


def test_annotations_stay(moe):
    after = Legalize()(moe, CONTEXT)
    assert dict(KERNELS.drop(after).attrs) == dict(moe.attrs)


NORM = """
n = TypeVar("n")
@I.ir_module
class Module:
    @R.function
    def main(x: R.Tensor((n, 16), "float32"), w: R.Tensor((16,), "float32")):
        with R.dataflow():
            square = R.power(x, R.const(2.0, "float32"))
            mean = R.mean(square, axis=[-1], keepdims=True)
            shifted = R.add(mean, R.const(1e-5, "float32"))
            root = R.rsqrt(shifted)
            scaled = R.multiply(x, root)
            y = R.multiply(w, scaled)
            R.output(y)
        return y
"""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "", ["moqc_rms_norm"]),
        ("R.multiply(w, scaled)", "R.multiply(scaled, w)", ["moqc_rms_norm"]),
        ("R.multiply(x, root)", "R.multiply(root, x)", ["moqc_rms_norm"]),
        ('R.power(x, R.const(2.0, "float32"))', "R.multiply(x, x)", ["moqc_rms_norm"]),
        ("R.multiply(w, scaled)", "R.add(w, scaled)", ["moqc_rms_norm", "relax.add"]),
        # Not RMS norms: another power, another axis, another vector under the root.
        ("R.const(2.0", "R.const(3.0", None),
        ("axis=[-1]", "axis=[0]", None),
        ("R.multiply(x, root)", "R.multiply(square, root)", None),
    ],
)
def test_rms_norm(old, new, expected):
    names = called(parse_module(NORM.replace(old, new) if old else NORM))
    if expected is None:
        assert "moqc_rms_norm" not in names
    else:
        assert names == expected


def test_linears_are_products_with_a_transposed_matrix(moe_text):
    # Whether the matrix is a parameter or computed does not matter.
    text = moe_text.replace("R.permute_dims(router)", "R.permute_dims(R.add(router, router))")
    assert called(parse_module(text)).count("moqc_dense_linear") == 3
    text = moe_text.replace(
        "router_t = R.permute_dims(router)", "router_t = R.reshape(router, R.shape([64, 3]))"
    )
    assert "relax.matmul" in called(parse_module(text))


def test_a_target_is_needed(moe):
    with pytest.raises(PipelineError, match="legalize needs a target"):
        Legalize()(moe, PassContext())


def test_a_target_without_kernels_is_refused(moe):
    target = dataclasses.replace(TARGETS["x86-64-v3"], schedules="abacus")
    with pytest.raises(TargetError, match="abacus"):
        Legalize()(moe, PassContext(target=target))
