"""What runs at which number of tokens."""

from __future__ import annotations

from moqc.quant.formats import Format
from moqc.schedules.cuda.ladder import Rung, ladder
from moqc.schedules.cuda.plan import SHARED_BYTES, ExpertsShape
from moqc.schedules.cuda.quads import QuadsPlan
from moqc.schedules.cuda.records import plans
from moqc.schedules.cuda.rows import RowsPlan

INT8 = (Format.parse("int8-g128-sym"),)
INT2 = (Format.parse("int2-g128-sym"),)
OWN = ExpertsShape(10, 2, 1024, 512, INT2, INT2, INT2)
"""A shape without records."""
WIDE = ExpertsShape(10, 2, 1024, 512, INT8, INT8, INT8)
"""One for which slots are as fast as the int8 kernels."""


def test_slots_below_and_the_grouped_product_above():
    cut, recorded = plans(WIDE, SHARED_BYTES)
    slots = cut["gate_up_8"], cut["down_many"]
    assert recorded == {}
    assert ladder(cut, None) == [Rung(None, *slots)]
    assert ladder(cut, 60) == [Rung(59, *slots), Rung(None)]
    assert ladder(cut, 9) == [Rung(None)]


def test_int8_where_experts_have_few_tokens():
    cut, _ = plans(OWN, SHARED_BYTES)
    few, slots = (cut["gate_up_8"], cut["down_8"]), (cut["gate_up_many"], cut["down_many"])
    assert isinstance(few[0], QuadsPlan)
    assert ladder(cut, 500, 0.01) == [Rung(181, *few), Rung(499, *slots), Rung(None)]
    assert ladder(cut, 60, 0.05) == [Rung(59, *few), Rung(None)]
    assert ladder(cut, 60, 0.1) == [Rung(32, *few), Rung(59, *slots), Rung(None)]
    assert ladder(cut, None, 0.2) == [Rung(None, *slots)]


def test_recorded_pairs_have_their_rungs():
    cut, _ = plans(WIDE, SHARED_BYTES)
    slots = cut["gate_up_8"], cut["down_many"]
    pair = RowsPlan(8, 4, 4, 1, 1, 24), RowsPlan(8, 4, 2, 1, 1, 24)
    cut |= {"gate_up_64": pair[0], "down_64": pair[1], "gate_up_512": pair[0]}
    assert ladder(cut, 100) == [Rung(32, *slots), Rung(181, *pair), Rung(None)]
    assert ladder(cut, 20) == [Rung(19, *slots), Rung(32), Rung(181, *pair), Rung(None)]
    assert ladder(cut | {"down_512": pair[1]}, 100)[1] == Rung(1448, *pair)
