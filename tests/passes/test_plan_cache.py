"""plan-cache: caches after the weights, and main returns them."""

import pytest

from moqc.errors import PipelineError
from moqc.ir import ops
from moqc.ir.annotations import CACHE, PARAMS
from moqc.ir.sites import bindings
from moqc.ir.text import parse_module, print_module
from moqc.ir.verify import verify
from moqc.passes.base import PassContext
from moqc.passes.pipeline import Pipeline
from moqc.passes.plan_cache import PlanCache
from moqc.targets import find_target

ATTENTION = """
batch = TypeVar("batch")
seq = TypeVar("seq")
@I.ir_module
class Module:
    I.module_attrs({"moqc.params": ["sinks"], "moqc.schema": 1})
    @R.function
    def main(
        q: R.Tensor((batch, 4, seq, 8), "float32"),
        positions: R.Tensor((batch, seq), "int64"),
        sinks: R.Tensor((4,), "float32"),
    ):
        R.func_attr({"tir_var_upper_bound": {"batch": 2, "seq": 16}})
        with R.dataflow():
            keys = R.strided_slice(q, axes=[1], begin=[0], end=[2])
            values = R.strided_slice(keys, axes=[3], begin=[0], end=[6])
            first = R.moqc.attention(q, keys, values, positions, sinks, causal=1, operands=["sinks"],
                scale="0.5", site="layers.0", softcap="0.0", window=4)
            second = R.moqc.attention(q, keys, keys, positions, causal=1, operands=[],
                scale="0.5", site="layers.1", softcap="0.0", window=0)
            padded = R.concat((first, second), axis=-1)
            R.output(padded)
        return padded
"""


def plan(mod):
    return PlanCache(context=32, batch=3)(mod, PassContext())


def test_caches_are_parameters_and_results():
    mod = parse_module(ATTENTION)
    planned = plan(mod)
    shapes = [[3, 2, 32, 8], [3, 2, 32, 6], [3, 2, 32, 8], [3, 2, 32, 8]]
    assert CACHE.of(planned) == {
        "context": 32,
        "batch": 3,
        "tensors": shapes,
        "dtype": "float32",
        "states": [],
    }
    assert PARAMS.of(planned) == ["sinks"]
    main = planned["main"]
    assert [[int(n) for n in p.ty.shape] for p in main.params[3:]] == shapes
    result, *caches = main.ret_ty.fields
    assert str(result) == str(mod["main"].ret_ty)
    assert [[int(n) for n in cache.shape] for cache in caches] == shapes
    assert dict(main.attrs["tir_var_upper_bound"]) == {"batch": 2, "seq": 16}


def test_calls_keep_their_operands_and_attributes():
    calls = [value for _, value in bindings(plan(parse_module(ATTENTION))["main"])]
    first, second = (call for call in calls if ops.is_call(call, ops.CACHED_ATTENTION))
    assert ops.operand(first, "sinks").name == "sinks"
    assert ops.operand(second, "v_cache").name == "v_cache_1"
    assert ops.attributes(first) == {
        "site": "layers.0", "scale": "0.5", "window": 4, "softcap": "0.0", "causal": 1, "operands": ["sinks"],
    }  # fmt: skip
    assert not any(ops.is_call(call, ops.ATTENTION) for call in calls)


def test_the_result_verifies_and_round_trips():
    planned = plan(parse_module(ATTENTION))
    verify(planned)
    assert print_module(parse_module(print_module(planned))) == print_module(planned)


def test_the_pipeline_text_names_it():
    text = "plan-cache{context=32 batch=3}"
    assert str(Pipeline.parse(text)) == text


@pytest.mark.parametrize(("dtype", "columns"), [("float16", [8, 6]), ("int8", [10, 8])])
def test_rows_have_the_columns_of_their_dtype(dtype, columns):
    planned = PlanCache(context=32, batch=3, dtype=dtype)(
        parse_module(ATTENTION), PassContext(target=find_target("x86-64-v3"))
    )
    cache = CACHE.of(planned)
    assert cache["dtype"] == dtype
    assert [shape[3] for shape in cache["tensors"]] == [*columns, columns[0], columns[0]]
    assert str(planned["main"].params[3].ty.dtype) == dtype
    verify(planned)


def test_a_dtype_without_kernels_is_refused():
    with pytest.raises(PipelineError, match="dtype=int8 is not one of float16"):
        PlanCache(dtype="int8")(parse_module(ATTENTION), PassContext(target=find_target("cuda")))


@pytest.mark.parametrize("options", [{"context": 0}, {"batch": 0}])
def test_sizes_are_positive(options):
    with pytest.raises(PipelineError, match="at least 1"):
        PlanCache(**options)(parse_module(ATTENTION), PassContext())


def test_attention_that_is_not_causal_is_refused():
    mod = parse_module(ATTENTION.replace("causal=1", "causal=0", 1))
    with pytest.raises(PipelineError, match=r"layers\.0 is not causal"):
        plan(mod)


def test_a_second_plan_is_refused():
    with pytest.raises(PipelineError, match=r"has moqc\.cache already"):
        plan(plan(parse_module(ATTENTION)))


def test_a_context_in_which_tokens_would_be_selected_is_refused():
    mod = parse_module(ATTENTION.replace('site="layers.1"', 'most=16, site="layers.1"'))
    with pytest.raises(PipelineError, match=r"layers\.1 selects 16 tokens .* give a context of at most 16"):
        plan(mod)
    assert CACHE.of(PlanCache(context=16, batch=3)(mod, PassContext()))["context"] == 16


def test_latents_are_cached_once():
    latent = ATTENTION.replace("axes=[3], begin=[0], end=[6]", "axes=[3], begin=[0], end=[5]").replace(
        'first = R.moqc.attention(q, keys, values, positions, sinks, causal=1, operands=["sinks"],',
        "rotated = R.strided_slice(keys, axes=[3], begin=[0], end=[3])\n"
        "            first = R.moqc.attention(q, rotated, values, positions, sinks, latent=1, "
        'causal=1, operands=["sinks"],',
    )
    planned = plan(parse_module(latent))
    assert CACHE.of(planned)["tensors"][:2] == [[3, 2, 32, 3], [3, 2, 32, 5]]
    verify(planned)
