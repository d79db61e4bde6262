from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from moqc.ir import ops
from moqc.quant import reference
from moqc.schedules.cpu.lower import lower_linear

# Name -> format, rows, columns, activations, bias. Rows and columns are ragged against tiles and groups, and
# a row has fewer, exactly and more columns than groups hold.
CASES = {
    "one_bit": ("int1-g64", 40, 100, "int8", False),
    "one_bit_symmetric": ("int1-g32-sym", 16, 72, "int8", False),
    "two_bits": ("int2-g64", 33, 96, "int8", True),
    "two_bits_symmetric": ("int2-g128-sym", 48, 130, "int8", False),
    "three_bits": ("int3-g64", 40, 100, "int8", True),
    "three_bits_symmetric": ("int3-g32-sym", 7, 64, "int8", False),
    "four_bits": ("int4-g128", 32, 320, "int8", False),
    "four_bits_symmetric": ("int4-g64-sym", 17, 33, "int8", True),
    "eight_bits": ("int8-g32", 33, 97, "int8", False),
    "eight_bits_symmetric": ("int8-g128-sym", 32, 256, "int8", True),
    "byte_scales": ("int2-g32-s8", 33, 96, "int8", False),
    "byte_scales_symmetric": ("int4-g64-sym-s8", 40, 100, "int8", True),
    "trellis_one_bit": ("tcq1-g64", 33, 100, "int8", False),
    "trellis_two_bits": ("tcq2-g32", 40, 130, "int8", True),
    "trellis_three_bits": ("tcq3-g64", 47, 160, "int8", False),
    "float_trellis": ("tcq3-g64", 18, 70, "float", False),
    "float_three_bits": ("int3-g64", 40, 100, "float", True),
    "float_eight_bits": ("int8-g128", 16, 160, "float", False),
    "float_one_bit": ("int1-g32-sym", 20, 31, "float", False),
}


@pytest.fixture(scope="module")
def linears(functions, toolbox):
    weights = {}
    for name, (fmt, rows, columns, mode, has_bias) in CASES.items():
        quantized = toolbox.quantized(fmt, rows, columns)
        bias = toolbox.normal(rows) if has_bias else None
        operands = toolbox.packed(quantized) | ({"bias": bias.numpy()} if has_bias else {})
        x = relax.Var("x", relax.TensorType([tvm.tirx.Var("m", "int64"), columns], "float32"))

        def call(*arguments, fmt=fmt, rows=rows, mode=mode, names=tuple(operands)):
            return ops.linear(
                *arguments, site="l", format=fmt, rows=rows, activations=mode, operands=list(names)
            )

        functions.add(name, [x], operands, call, lower_linear)
        weights[name] = (quantized.dequantize(), bias, operands)
    return functions, weights


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 21])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(linears, toolbox, relative_error, name, tokens):
    functions, weights = linears
    dequantized, bias, operands = weights[name]
    mode = CASES[name][3]
    x = toolbox.normal(tokens, dequantized.shape[1])
    actual = functions.run(name, x.numpy(), *operands.values())
    assert actual.shape == (tokens, dequantized.shape[0])
    assert relative_error(actual, reference.linear(x, dequantized, bias, mode)) < 2e-6


@pytest.mark.parametrize("tokens", [1, 5])
def test_rows_do_not_touch_each_other(linears, toolbox, tokens):
    """A token's result depends on that token alone."""
    functions, weights = linears
    _, _, operands = weights["three_bits"]
    x = toolbox.normal(tokens, 100).numpy()
    before = functions.run("three_bits", x, *operands.values())
    x[-1] = np.nan
    after = functions.run("three_bits", x, *operands.values())
    np.testing.assert_array_equal(after[:-1], before[:-1])
    assert np.isnan(after[-1]).all()
