"""Annotation keys: plain values in and out, the module given is unchanged."""

import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st

from moqc.errors import InternalError, PipelineError
from moqc.ir.annotations import BITS, COSTS, KEYS, PROFILE, SCHEMA
from moqc.ir.text import parse_module, print_module

leaf = st.integers(-(2**62), 2**62) | st.text(max_size=5)
plain = st.recursive(
    leaf, lambda items: st.lists(items, max_size=3) | st.dictionaries(st.text(max_size=4), items, max_size=3)
)


@given(st.dictionaries(st.text(max_size=4), plain, max_size=3))
def test_put_then_of_is_identity(value: dict) -> None:
    mod = tvm.IRModule()
    annotated = COSTS.put(mod, value)
    assert COSTS.of(annotated) == value
    assert COSTS.get(mod) is None


def test_annotations_round_trip_as_text() -> None:
    mod = BITS.put(SCHEMA.put(tvm.IRModule(), 1), {"a.experts": {"up": ["int3-g64", "int2-g64"]}})
    text = print_module(mod)
    assert '"moqc.bits": {"a.experts": {"up": ["int3-g64", "int2-g64"]}}' in text
    tvm.ir.assert_structural_equal(parse_module(text), mod)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 0.5}, r"moqc\.profile\['a'\]: float 0\.5; annotations hold dict, list, int and str"),
        ({"a": [1, None]}, r"moqc\.profile\['a'\]\[1\]: NoneType"),
        ({1: 2}, "key 1 is not a string"),
        ({"a": True}, "bool True"),
    ],
)
def test_values_that_are_not_plain_are_refused(value: dict, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        PROFILE.put(tvm.IRModule(), value)


def test_a_missing_annotation_names_its_writer() -> None:
    with pytest.raises(PipelineError, match=r"the module has no moqc\.costs: run measure-costs before"):
        COSTS.of(tvm.IRModule())


def test_drop() -> None:
    mod = COSTS.put(tvm.IRModule(), {"a": 1})
    assert COSTS.get(COSTS.drop(mod)) is None
    assert COSTS.get(mod) == {"a": 1}
    assert COSTS.get(COSTS.drop(COSTS.drop(mod))) is None


def test_keys_are_named_after_themselves() -> None:
    assert all(
        name == key.name and name.startswith("moqc.") and key.doc and key.writer for name, key in KEYS.items()
    )
