"""Sites: experts blocks, linears, tied tables, routers."""

import pytest

from moqc.errors import PipelineError, VerifyError
from moqc.ir.annotations import PARAMS
from moqc.ir.sites import ExpertSite, LinearSite, find_experts, find_linears, find_uses, weight_names
from moqc.ir.text import parse_module

TEXT = """
tokens = TypeVar("tokens")
@I.ir_module
class Module:
    I.module_attrs({"moqc.params": [
        "embed.weight", "first.weight", "router.weight", "a.up", "a.down", "out.weight"]})
    @R.function
    def main(
        input_ids: R.Tensor((tokens,), "int64"), positions: R.Tensor((tokens,), "int64"),
        embed: R.Tensor((40, 64), "float32"), first: R.Tensor((64, 64), "float32"),
        router: R.Tensor((3, 64), "float32"), up: R.Tensor((3, 32, 64), "float32"),
        down: R.Tensor((3, 64, 32), "float32"), out: R.Tensor((64, 40), "float32"),
    ):
        with R.dataflow():
            x = R.take(embed, input_ids, axis=0)
            first_t = R.permute_dims(first)
            h = R.matmul(x, first_t)
            router_t = R.permute_dims(router, axes=[1, 0])
            scores = R.matmul(h, router_t)
            top = R.topk(scores, k=2, ret_type="both", dtype="int64")
            weights = R.nn.softmax(top[0])
            y = R.moqc.experts(
                h, top[1], weights, up, down, site="a", activation="relu2", operands=["up", "down"])
            embed_t = R.permute_dims(embed)
            tied = R.matmul(y, embed_t)
            columns = R.matmul(y, out)
            logits = R.add(tied, columns)
            R.output(logits)
        return logits
"""


def test_find_experts() -> None:
    (site,) = find_experts(parse_module(TEXT))
    assert site == ExpertSite("a", 3, 64, 32, "relu2", ("up", "down"))
    assert (site.has_gate, site.projections) == (False, ("up", "down"))
    assert (site.shape("up"), site.shape("down")) == ((32, 64), (64, 32))


def test_find_linears_tells_tied_tables_and_routers() -> None:
    """`first` feeds the router too, but the walk stops at the router; `out` is not transposed."""
    assert find_linears(parse_module(TEXT)) == [
        LinearSite("embed", 40, 64, ("embedding", "linear"), router=False),
        LinearSite("first", 64, 64, ("linear",), router=False),
        LinearSite("router", 3, 64, ("linear",), router=True),
    ]


def test_find_uses_in_program_order() -> None:
    assert [(use.kind, use.site, use.output.name) for use in find_uses(parse_module(TEXT))] == [
        ("embedding", "embed", "x"),
        ("linear", "first", "h"),
        ("linear", "router", "scores"),
        ("linear", "embed", "tied"),
    ]


def test_weight_names_needs_names() -> None:
    mod = parse_module(TEXT)
    assert list(weight_names(mod).values())[:2] == ["embed.weight", "first.weight"]
    with pytest.raises(VerifyError, match=r"main has 6 weight parameters, moqc\.params names 7"):
        weight_names(PARAMS.put(mod, [*PARAMS.of(mod), "more"]))
    with pytest.raises(PipelineError, match=r"the module has no moqc\.params"):
        weight_names(PARAMS.drop(mod))
