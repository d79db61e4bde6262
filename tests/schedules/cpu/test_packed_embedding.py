from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from moqc.ir import ops
from moqc.schedules.cpu.lower import lower_embedding

CASES = {
    "one_bit": ("int1-g32", 20, 64),
    "two_bits": ("int2-g64-sym", 33, 70),
    "three_bits": ("int3-g64", 40, 101),
    "four_bits": ("int4-g128-sym", 16, 160),
    "eight_bits": ("int8-g32", 50, 96),
    "trellis_one_bit": ("tcq1-g32", 33, 70),
    "trellis_two_bits": ("tcq2-g64", 33, 70),
    "trellis_three_bits": ("tcq3-g128", 40, 101),
    "byte_scales": ("int3-g64-s8", 40, 101),
}


@pytest.fixture(scope="module")
def embeddings(functions, toolbox):
    weights = {}
    for name, (fmt, rows, columns) in CASES.items():
        quantized = toolbox.quantized(fmt, rows, columns)
        operands = toolbox.packed(quantized)
        extents = [tvm.tirx.Var(extent, "int64") for extent in "bs"]
        ids = relax.Var("ids", relax.TensorType(extents, "int64"))

        def call(*arguments, fmt=fmt, columns=columns, names=tuple(operands)):
            return ops.embedding(*arguments, site="e", format=fmt, columns=columns, operands=list(names))

        functions.add(name, [ids], operands, call, lower_embedding)
        weights[name] = (quantized.dequantize().numpy(), operands)
    return functions, weights


@pytest.mark.parametrize("shape", [(1, 1), (2, 5)])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_dequantized_rows(embeddings, name, shape):
    functions, weights = embeddings
    dequantized, operands = weights[name]
    ids = np.random.default_rng(0).integers(0, len(dequantized), shape)
    ids.flat[-1] = len(dequantized) - 1
    actual = functions.run(name, ids, *operands.values())
    np.testing.assert_allclose(actual, dequantized[ids], rtol=1e-5, atol=1e-6)


def test_stays_inside_the_matrix(embeddings):
    functions, weights = embeddings
    dequantized, operands = weights["eight_bits"]
    actual = functions.run("eight_bits", np.array([[-7, 1 << 40]]), *operands.values())
    np.testing.assert_allclose(actual[0, 0], dequantized[0], rtol=1e-5, atol=1e-6)
    assert np.isfinite(actual[0, 1]).all()
