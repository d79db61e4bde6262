"""narrow-integers: what was int64 in main is int32, values and shapes unchanged."""

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from moqc.errors import PipelineError
from moqc.passes.base import PassContext
from moqc.passes.narrow_integers import NarrowIntegers


def module(constant):
    seq = tirx.Var("seq", "int64")
    ids = relax.Var("ids", relax.TensorType([seq, 3], "int64"))
    x = relax.Var("x", relax.TensorType([seq, 3], "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [ids, x]):
        with builder.dataflow():
            shifted = builder.emit(relax.op.add(ids, relax.const(np.int64(constant), "int64")))
            wide = builder.emit(relax.op.astype(x, "int64"))
            total = builder.emit(relax.op.add(shifted, wide))
            best = builder.emit(relax.op.topk(x, k=2, ret_type="indices", dtype="int64"))
            result = builder.emit_output(relax.Tuple([total, best]))
        builder.emit_func_output(result)
    return builder.get()


def run(mod, dtype):
    machine = relax.VirtualMachine(tvm.compile(mod, tvm.target.Target({"kind": "llvm"})), tvm.cpu())
    ids, x = np.array([[5, -2, 9]], dtype), np.array([[1.5, -7.0, 3.0]], np.float32)
    return machine["main"](*(tvm.runtime.tensor(array) for array in (ids, x)))[0].numpy()


def test_integers_become_narrow_and_values_stay():
    wide = module(1 << 20)
    narrow = NarrowIntegers()(wide, PassContext())
    assert "int64" not in {str(ty.dtype) for ty in narrow["main"].ret_ty.fields}
    assert str(narrow["main"].params[0].ty.dtype) == "int32"
    assert 'dtype="int64"' not in narrow.script()
    taken = relax.transform.DeadCodeElimination()
    expected, found = (
        run(taken(_first(mod)), dtype) for mod, dtype in ((wide, np.int64), (narrow, np.int32))
    )
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)


def _first(mod):
    """`mod` without the top-k, whose sort TVM's runtime library lacks."""
    main = mod["main"]
    block = main.body.blocks[0]
    variable = block.bindings[2].var
    builder = relax.BlockBuilder()
    with builder.function("main", list(main.params)):
        with builder.dataflow():
            for binding in block.bindings[:3]:
                builder.emit_normalized(relax.VarBinding(binding.var, binding.value))
            result = builder.emit_output(relax.Tuple([variable]))
        builder.emit_func_output(result)
    return builder.get()


def test_a_constant_beyond_32_bits_is_refused():
    with pytest.raises(PipelineError, match="over 32 bits"):
        NarrowIntegers()(module(1 << 40), PassContext())
