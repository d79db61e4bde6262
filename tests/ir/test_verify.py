"""The verifier accepts what the rules allow and names what breaks them."""

import pytest

from moqc.errors import VerifyError
from moqc.ir.annotations import CACHE, PARAMS
from moqc.ir.text import parse_module
from moqc.ir.verify import verify

HEAD = """
tokens = TypeVar("tokens")
batch = TypeVar("batch")
seq = TypeVar("seq")
@I.ir_module
class Module:
    I.module_attrs({ATTRS})
    @R.function
    def main(
        input_ids: R.Tensor((batch, seq), "int64"), positions: R.Tensor((batch, seq), "int64"), PARAMETERS
    ):
        with R.dataflow():
            y = CALL
            R.output(y)
        return y
"""

ROUTED = (
    'x: R.Tensor((tokens, 64), "float32"), ids: R.Tensor((tokens, 2), "int64"), '
    'w: R.Tensor((tokens, 2), "float32")'
)
EXPERTS = (
    f'{ROUTED}, up: R.Tensor((3, 32, 64), "float32"), down: R.Tensor((3, 64, 32), "float32")',
    'R.moqc.experts(x, ids, w, up, down, site="a", activation="relu2", operands=["up", "down"])',
)
MIXED = (
    f'{ROUTED}, table: R.Tensor((3, 3, 2), "int32"), u0c: R.Tensor((3, 2, 2, 3, 64), "uint8"), '
    'u0s: R.Tensor((3, 2, 1, 16), "float16"), u0z: R.Tensor((3, 2, 1, 16), "uint8"), '
    'd0c: R.Tensor((1, 4, 1, 8, 64), "uint8"), d0s: R.Tensor((1, 4, 1, 16), "float16"), '
    'd1c: R.Tensor((2, 4, 1, 1, 64), "uint8"), d1s: R.Tensor((2, 4, 1, 16), "float16"), '
    'd1z: R.Tensor((2, 4, 1, 16), "uint8")',
    "R.moqc.mixed_experts(x, ids, w, table, u0c, u0s, u0z, d0c, d0s, d1c, d1s, d1z, "
    'site="a", activation="relu2", activations="int8", operands=["table", '
    '"up.0.codes", "up.0.scales", "up.0.zeros", "down.0.codes", '
    '"down.0.scales", "down.1.codes", "down.1.scales", "down.1.zeros"], '
    'classes=["up:int3-g64", "down:int8-g64-sym", "down:int1-g64"], intermediate=32)',
)
LINEAR = (
    'x: R.Tensor((batch, seq, 64), "float32"), codes: R.Tensor((3, 2, 4, 64), "uint8"), '
    'scales: R.Tensor((3, 2, 16), "float16"), bias: R.Tensor((40,), "float32")',
    'R.moqc.linear(x, codes, scales, bias, site="q", format="int4-g32-sym", rows=40, activations="float", '
    'operands=["codes", "scales", "bias"])',
)
EMBEDDING = (
    'codes: R.Tensor((3, 2, 8, 64), "uint8"), scales: R.Tensor((3, 1, 16), "float16"), '
    'zeros: R.Tensor((3, 1, 16), "uint8")',
    'R.moqc.embedding(input_ids, codes, scales, zeros, site="e", format="int8-g64", columns=64, '
    'operands=["codes", "scales", "zeros"])',
)
ATTENTION = (
    'q: R.Tensor((batch, 4, seq, 16), "float32"), k: R.Tensor((batch, 2, seq, 16), "float32"), '
    'v: R.Tensor((batch, 2, seq, 8), "float32"), sinks: R.Tensor((4,), "float32")',
    'R.moqc.attention(q, k, v, positions, sinks, site="t", scale="0.25", window=0, softcap="0.0", causal=1, '
    'operands=["sinks"])',
)
CACHED = (
    'q: R.Tensor((batch, 4, seq, 16), "float32"), k: R.Tensor((batch, 2, seq, 16), "float32"), '
    'v: R.Tensor((batch, 2, seq, 8), "float32"), kc: R.Tensor((4, 2, 96, 16), "float32"), '
    'vc: R.Tensor((4, 2, 96, 8), "float32")',
    'R.moqc.cached_attention(q, k, v, positions, kc, vc, site="t", scale="0.25", window=0, softcap="0.0", '
    "causal=1, operands=[])",
)


def module(parameters: str, call: str, attrs: str = ""):
    return parse_module(HEAD.replace("ATTRS", attrs).replace("PARAMETERS", parameters).replace("CALL", call))


@pytest.mark.parametrize(
    "case", [EXPERTS, MIXED, LINEAR, EMBEDDING, ATTENTION, CACHED], ids=lambda case: case[1].partition("(")[0]
)
def test_accepts(case: tuple[str, str]) -> None:
    verify(module(*case))


@pytest.mark.parametrize(
    ("case", "old", "new", "message"),
    [
        (
            EXPERTS,
            "(3, 64, 32)",
            "(3, 60, 32)",
            r"R\.moqc\.experts of a: x is float32 \[tokens, 64\], expected",
        ),
        (
            EXPERTS,
            "(3, 32, 64)",
            "(3, 30, 64)",
            r"up is float32 \[3, 30, 64\], expected float32 \[3, 32, 64\]",
        ),
        (
            EXPERTS,
            '(tokens, 2), "int64"',
            '(tokens, 2), "float32"',
            r"ids is float32 .*expected int32 or int64",
        ),
        (
            EXPERTS,
            "ids: R.Tensor((tokens, 2)",
            "ids: R.Tensor((batch, 2)",
            r"ids is int64 \[batch, 2\], expected",
        ),
        (EXPERTS, "relu2", "silu_glu", "lacks a gate projection, which does not fit activation silu_glu"),
        (EXPERTS, "relu2", "magic", "unknown activation 'magic'"),
        (EXPERTS, "relu2", "relu2|hadamard32", "only packed experts are rotated"),
        (
            EXPERTS,
            'operands=["up", "down"]',
            'operands=["gate", "down"]',
            "are not up and down among gate, up",
        ),
        (
            MIXED,
            '(3, 2, 2, 3, 64), "uint8"',
            '(3, 2, 2, 4, 64), "uint8"',
            r"up\.0\.codes is uint8 \[3, 2, 2, 4, 64\]",
        ),
        (
            MIXED,
            'd0s: R.Tensor((1, 4, 1, 16), "float16")',
            'd0s: R.Tensor((1, 4, 1, 16), "float32")',
            r"down\.0\.scales",
        ),
        (MIXED, "(3, 3, 2)", "(3, 4, 2)", "up has 3 experts, the table 4"),
        (MIXED, '"int32"', '"int64"', "table is int64"),
        (MIXED, 'activations="int8"', 'activations="int4"', "activations is 'int4', not one of"),
        (MIXED, "down:int8-g64-sym", "down:int8-g64", "its classes need"),
        (MIXED, "up:int3-g64", "up:int5-g64", "no format"),
        (LINEAR, "(40,)", "(41,)", r"bias is float32 \[41\], expected float32 \[40\]"),
        (LINEAR, '"int4-g32-sym"', '"int4-g32"', "a matrix of format int4-g32 needs"),
        (
            LINEAR,
            "(batch, seq, 64)",
            "(batch, seq, 96)",
            r"codes is uint8 \[3, 2, 4, 64\], expected uint8 \[3, 3, 4",
        ),
        (EMBEDDING, "columns=64", "columns=96", "codes is uint8"),
        (ATTENTION, "sinks: R.Tensor((4,)", "sinks: R.Tensor((2,)", r"sinks is float32 \[2\]"),
        (ATTENTION, 'scale="0.25"', 'scale="a"', "scale is 'a', not a number"),
        (
            ATTENTION,
            "k: R.Tensor((batch, 2,",
            "k: R.Tensor((batch, 3,",
            r"k is float32 \[batch, 3, seq, 16\]",
        ),
        (ATTENTION, "(batch, 2, seq,", "(batch, 3, seq,", "4 heads are no multiple of 3 key heads"),
        (CACHED, "(4, 2, 96, 8)", "(4, 2, 95, 8)", "v_cache is float32"),
    ],
)
def test_names_what_is_wrong(case: tuple[str, str], old: str, new: str, message: str) -> None:
    changed = tuple(part.replace(old, new) for part in case)
    assert changed != case
    with pytest.raises(VerifyError, match=message):
        verify(module(*changed))


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ('"moqc.bitz": 1', r"unknown annotation moqc\.bitz: 'moqc\.' is reserved for moqc\.schema"),
        ('"moqc.params": ["a.up"]', r"main has 7 parameters, expected 3: .*1 weights .*and 0 caches"),
        ('"moqc.params": ["a.up", "a.up"]', r"moqc\.params names a\.up twice"),
        ('"moqc.bits": {"a": {"up": ["int2-g64"], "down": ["int2-g64"]}}', "has formats for .*expected"),
        ('"moqc.bits": {"a": {"up": ["int2-g60"]}}', "annotations: no format"),
        ('"moqc.linear_bits": {"q": "int9"}', "annotations: unknown format 'int9'"),
    ],
)
def test_annotations(attrs: str, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify(module(*EXPERTS, attrs))


def test_a_plugins_own_annotation_is_fine() -> None:
    verify(module(*EXPERTS, '"acme.note": 1'))


def test_caches_count_as_parameters() -> None:
    mod = PARAMS.put(module(*CACHED), ["q", "k", "v"])
    with pytest.raises(VerifyError, match=r"3 weights .* and 0 caches"):
        verify(mod)
    verify(CACHE.put(mod, {"context": 96, "batch": 4, "tensors": [[4, 2, 96, 16], [4, 2, 96, 8]]}))


def test_a_site_is_one_block() -> None:
    parameters, call = EXPERTS
    mod = module(parameters, f"{call}\n            z = {call.replace('(x,', '(y,', 1)}")
    with pytest.raises(VerifyError, match=r"R\.moqc\.experts of a: there is another with this site"):
        verify(mod)


def test_needs_main() -> None:
    with pytest.raises(VerifyError, match="no function main"):
        verify(parse_module("@I.ir_module\nclass Module:\n    I.module_attrs({'moqc.schema': 1})\n"))
