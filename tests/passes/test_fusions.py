"""Groups of operators with one kernel: found in the graph of a real architecture, where they are whole."""

from pathlib import Path

import pytest
from tvm import IRModule, relax

from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.hf import import_model
from moqc.ir import ops
from moqc.ir.ops import is_call
from moqc.ir.sites import bindings
from moqc.passes.base import PassContext
from moqc.passes.fusions import Fusions
from moqc.passes.plan_cache import PlanCache
from moqc.passes.quantize_linears import QuantizeLinears, rewrite_linears
from moqc.targets import find_target

TINY = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"
LAYERS = 4


@pytest.fixture(scope="module")
def mod() -> IRModule:
    imported = import_model(Checkpoint.open(TINY))
    linears = QuantizeLinears(activations="float").plan(imported)
    packed = rewrite_linears(imported, linears, "float", "mma16x256")
    return PlanCache(context=64, batch=2)(packed, PassContext(target=find_target("cuda")))


def calls(mod: IRModule, name: str) -> list[relax.Call]:
    return [value for _, value in bindings(mod["main"]) if is_call(value, name)]


def test_finds_every_group_of_a_layer(mod):
    definitions = dict(bindings(mod["main"]))
    fusions = Fusions(definitions)
    heads = [fusions.heads(call) for call in calls(mod, ops.CACHED_ATTENTION)]
    assert len(heads) == LAYERS
    for found in heads:
        assert found is not None
        assert [int(each.ty.shape[2]) for each in found.inputs] == [128, 64, 64]
        assert len(found.norms) == 2
        assert len(found.rotation) == 2
    routers = [fusions.router(call) for call in calls(mod, "relax.topk")]
    assert [router is not None and router.normalized is not None for router in routers] == [True] * LAYERS
    assert sum(fusions.is_normalization(call) for call in calls(mod, "relax.divide")) == LAYERS
    sums = [call for call in calls(mod, "relax.add") if fusions.residual(call) is not None]
    assert len(sums) == LAYERS  # of o_proj; those of experts are
    assert sum(fusions.added_norm(call) is not None for call in calls(mod, "relax.add")) == 2 * LAYERS
    groups = [len(fusions.siblings(call)) for call in calls(mod, ops.LINEAR)]
    assert groups == [3, 3, 3, 1] * LAYERS + [1]


def test_caches_are_float16_where_the_target_wants_them(mod):
    assert {str(call.args[4].ty.dtype) for call in calls(mod, ops.CACHED_ATTENTION)} == {"float16"}


def test_values_used_elsewhere_are_not_normalized(mod):
    """Another reader of the router's values would get divided ones."""
    definitions = dict(bindings(mod["main"]))
    top = next(variable for variable, value in definitions.items() if is_call(value, "relax.topk"))
    values = next(
        variable
        for variable, value in definitions.items()
        if isinstance(value, relax.TupleGetItem) and value.tuple_value.same_as(top) and value.index == 0
    )
    builder = relax.BlockBuilder()
    reader = builder.normalize(relax.op.multiply(values, values))
    definitions[relax.Var("reader", reader.ty)] = reader
    router = Fusions(definitions).router(definitions[top])
    assert router is not None
    assert router.normalized is None
