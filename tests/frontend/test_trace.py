"""The outline of a model equals what an export of it finds."""

import pytest
import transformers
from transformers import AutoConfig

from moqc.errors import ModelError
from moqc.frontend.hf import import_torch
from moqc.frontend.hooks import hook
from moqc.frontend.shrink import shrink
from moqc.frontend.skeleton import build_skeleton
from moqc.frontend.trace import outline
from moqc.ir.sites import find_experts, find_linears

ARCHITECTURES = ("qwen3_moe", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outline_equals_the_import(name):
    config = shrink(AutoConfig.for_model(name))
    found = outline(config)
    model = build_skeleton(config)
    hook(model)
    mod = import_torch(model)
    assert [use.layout.site for use in found.experts] == [site.site for site in find_experts(mod)]
    assert {use.top_k for use in found.experts} == {2}
    linears = {site.site: site for site in find_linears(mod)}
    assert {matrix.names[0].removesuffix(".weight") for matrix in found.matrices} == set(linears)
    for matrix in found.matrices:
        site = linears[matrix.names[0].removesuffix(".weight")]
        assert (matrix.rows, matrix.columns, matrix.router) == (site.rows, site.columns, site.router)
        assert matrix.embedding == ("embedding" in site.uses)
        assert matrix.linear == ("linear" in site.uses)


def test_all_weights_are_counted_once():
    config = AutoConfig.for_model("mixtral")
    found = outline(config)
    model = build_skeleton(config)
    matrices = sum(matrix.rows * matrix.columns for matrix in found.matrices)
    experts = sum(
        layout.experts * 3 * layout.hidden * layout.intermediate
        for layout in (use.layout for use in found.experts)
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    assert matrices + experts + found.other_weights == total
    assert 46e9 < total < 47e9


def test_attention_is_described():
    config = transformers.GptOssConfig()
    windows = [use.window for use in outline(config).attention]
    assert len(windows) == config.num_hidden_layers
    assert set(windows) == {0, config.sliding_window}
    first = outline(config).attention[0]
    assert (first.heads, first.kv_heads, first.key_width) == (64, 8, 64)
    assert first.element_count == 8 * (64 + 64)


def test_dense_models_are_refused():
    with pytest.raises(ModelError, match="no experts blocks"):
        outline(AutoConfig.for_model("qwen3", num_hidden_layers=2))
