import pytest
import torch

from moqc.errors import UserError
from moqc.quant.formats import Format
from moqc.quant.layouts import LAYOUTS, find_layout
from moqc.quant.rtn import quantize_rtn


@pytest.mark.parametrize("format", ["int3-g64", "int8-g64-sym"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_shapes_and_inverse(name: str, format: str) -> None:
    layout, fmt, shape = find_layout(name), Format.parse(format), (3, 21, 136)
    matrices = quantize_rtn(torch.randn(shape, generator=torch.Generator().manual_seed(1)), fmt)
    packed = layout.pack(matrices)
    codes, groups = layout.shapes(fmt, *shape[1:])
    assert packed.codes.shape == (3, *codes)
    assert packed.scales.shape == (3, *groups)
    assert (packed.zeros is None) == fmt.symmetric
    assert packed.codes.shape[1] == 2  # rows come in tiles of 16: callers slice along this axis
    back = layout.unpack(packed, fmt, *shape[1:])
    assert torch.equal(back.codes, matrices.codes)
    assert torch.equal(back.scales, matrices.scales)


def test_unknown_layout() -> None:
    with pytest.raises(UserError, match=r"unknown layout 'rows': known are interleaved16, mma16x256"):
        find_layout("rows")
