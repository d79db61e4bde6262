import numpy as np
import pytest
import torch

from moqc.quant import draw
from moqc.quant.draw import random_packed
from moqc.quant.formats import Format
from moqc.quant.layouts import LAYOUTS
from moqc.quant.tensor import Quantized


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "name", ["int1-g64", "int3-g64", "int4-g128-sym", "int8-g32", "int3-g64-s8", "tcq2-g64"]
)
@pytest.mark.parametrize("rows", [40, 100])
def test_drawn_parts_are_packed_matrices(layout, name, rows, monkeypatch):
    """What is drawn unpacks to weights of the promised size, and padding has no scales."""
    monkeypatch.setattr(draw, "SLAB", 48)  # 100 rows: two slabs and a rest
    format, shape = Format.parse(name), (3, rows, 200)
    names = ("codes", "scales") if format.symmetric else ("codes", "scales", "zeros")
    parts = {part: random_packed(layout, format, shape, part, 5) for part in names}
    codes, groups = layout.shapes(format, rows, 200)
    assert parts["codes"].shape == (3, *codes)
    assert parts["scales"].shape == (3, *groups)
    matrices = layout.unpack(type(layout.pack(_blank(format)))(**{"zeros": None, **parts}), format, rows, 200)
    weights = matrices.dequantize()
    assert 0.015 < weights.std() < 0.03
    assert abs(weights.mean()) < 0.003  # a symmetric zero is half a code off
    assert np.array_equal(layout.pack(matrices).scales, parts["scales"])


def _blank(format):
    groups = torch.zeros(16, format.groups(256))
    zeros = None if format.symmetric else groups.to(torch.uint8)
    return Quantized(format, torch.zeros(16, 256, dtype=torch.uint8), groups.half(), zeros)


def test_seeds():
    layout, format = LAYOUTS["interleaved16"], Format(3)
    first, again, other = (random_packed(layout, format, (32, 64), "codes", seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
