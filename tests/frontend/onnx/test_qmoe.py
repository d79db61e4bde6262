from __future__ import annotations

import pytest
import torch

from moqc.frontend.onnx import qmoe
from moqc.quant.formats import Format
from moqc.quant.rtn import quantize_rtn


@pytest.mark.parametrize(
    "name", ["int8-g64-sym", "int4-g64-sym", "int2-g32-sym", "int4-g64", "int2-g32", "int1-g64"]
)
def test_recoding_changes_no_weight(name):
    fmt = Format.parse(name)
    weights = torch.randn(3, 16, 128, generator=torch.Generator().manual_seed(0))
    matrices = [quantize_rtn(matrix, fmt) for matrix in weights]
    block, bits = qmoe.block_size(matrices, "s"), qmoe.width_of(matrices, "s")
    found = qmoe.node_matrix(matrices, block, bits)
    codes, zeros = (torch.from_numpy(array.astype("float64")) for array in (found.codes, found.zeros))
    scales = torch.from_numpy(found.scales).double()
    zeros, scales = (values.repeat_interleave(block, -1) for values in (zeros, scales))
    expected = torch.stack([matrix.dequantize() for matrix in matrices]).double()
    torch.testing.assert_close(
        scales * (codes - zeros), expected, rtol=0, atol=1e-6 * float(expected.abs().max())
    )
    assert found.centered == fmt.symmetric
    assert bits == (4 if fmt.symmetric and fmt.bits <= 4 else 8)
