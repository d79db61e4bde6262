from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moqc.errors import UserError
from moqc.quant.formats import ALL_FORMATS, Format
from moqc.schedules.cuda.plan import SHARED_BYTES, ExpertsShape, Plan, down_rule, gate_up_rule, shared_bytes

formats = st.lists(st.sampled_from(ALL_FORMATS), min_size=1)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 1024), st.integers(1, 1800), st.integers(1, 300), formats, formats, st.sampled_from([1, 8])
)
def test_every_layer_has_plans_that_fit(hidden, intermediate, experts, up, down, tokens):
    shape = ExpertsShape(
        experts, min(8, experts), 8 * hidden, 8 * intermediate, tuple(up), tuple(up), tuple(down)
    )
    for plan, rows, projections, lists in (
        (gate_up_rule(shape, tokens), intermediate, 2, up),
        (down_rule(shape, tokens), hidden, 1, down),
    ):
        assert -(-rows // 2) % (plan.tiles * plan.items) == 0
        assert shared_bytes(plan, projections, lists) <= SHARED_BYTES
        total = projections * plan.tiles
        assert not plan.registers or total % plan.stages == 0
        assert plan.tokens == tokens
    assert gate_up_rule(shape, tokens).warps == -(-hidden // 32)


def test_plans_of_a_large_and_a_small_layer():
    four, mixed = (Format.parse("int4-g128-sym"),), tuple(map(Format.parse, ("int4-g64", "int2-g64")))
    mixtral = ExpertsShape(8, 2, 4096, 14336, four, four, four)
    assert gate_up_rule(mixtral, 1) == Plan(16, 14, 2, True, 1)
    assert gate_up_rule(mixtral, 8) == Plan(16, 4, 2, True, 8, items=14)
    qwen3 = ExpertsShape(128, 8, 2048, 768, mixed, mixed, mixed)
    assert gate_up_rule(qwen3, 8) == Plan(8, 4, 3, False, 8)
    assert str(down_rule(qwen3, 1)) == "w6t2r2m1i1"


def test_refuses_sizes_it_cannot_take():
    with pytest.raises(UserError, match="multiples of 8"):
        ExpertsShape(4, 2, 100, 64, (), (Format(2),), (Format(2),))
    with pytest.raises(UserError, match="no CUDA kernel reads 6 bits"):
        ExpertsShape(4, 2, 64, 64, (), (Format.parse("int6-g64"),), (Format(2),))
    with pytest.raises(UserError, match="up to 8192"):
        ExpertsShape(4, 2, 16384, 64, (), (Format(2),), (Format(2),))
