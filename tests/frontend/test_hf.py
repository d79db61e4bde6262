from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor
from tvm import IRModule
from tvm.ir import assert_structural_equal

from moqc.errors import ModelError
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.hf import check_assertions, export, import_model, import_program, import_torch
from moqc.frontend.hooks import hook
from moqc.frontend.skeleton import build_skeleton
from moqc.ir.annotations import PARAMS, SCHEMA, SCHEMA_VERSION
from moqc.ir.sites import find_experts, find_linears
from moqc.ir.text import parse_module, print_module
from moqc.ir.verify import verify

Config = Callable[..., transformers.PretrainedConfig]


def hooked(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    model = build_skeleton(config)
    hook(model)
    return model


@pytest.fixture(scope="module")
def model(tiny_config: Config) -> transformers.PreTrainedModel:
    return hooked(tiny_config("deepseek_v3", tie_word_embeddings=True))


@pytest.fixture(scope="module")
def program(model: transformers.PreTrainedModel) -> torch.export.ExportedProgram:
    return export(model, max_batch=3, max_chunk=12)


@pytest.fixture(scope="module")
def module(program: torch.export.ExportedProgram, model: transformers.PreTrainedModel) -> IRModule:
    return import_program(program, model)


def test_nothing_is_allocated(program: torch.export.ExportedProgram) -> None:
    assert all(isinstance(parameter, FakeTensor) for parameter in program.parameters())


def test_parameters_are_named(module: IRModule) -> None:
    names = PARAMS.of(module)
    assert len(names) == len(set(names)) == len(module["main"].params) - 2
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names, "a tied weight is one parameter"
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in names
    site = "model.layers.1.mlp.experts"
    shapes = {
        name: [int(size) for size in parameter.ty.shape]
        for name, parameter in zip(names, module["main"].params[2:], strict=True)
    }
    assert shapes[f"{site}.gate"] == shapes[f"{site}.up"] == [8, 16, 32]
    assert shapes[f"{site}.down"] == [8, 32, 16]
    assert SCHEMA.get(module) == SCHEMA_VERSION


def test_sizes_are_symbolic_and_bounded(module: IRModule) -> None:
    main = module["main"]
    assert [str(size) for size in main.params[0].ty.shape] == ["batch", "seq"]
    assert [parameter.name for parameter in main.params[:2]] == ["input_ids", "positions"]
    batch, seq, vocabulary = main.ret_ty.shape
    assert (str(batch), str(seq), int(vocabulary)) == ("batch", "seq", 64)
    assert str(main.ret_ty.dtype) == "float32"


@pytest.mark.parametrize(("batch", "chunk"), [(1, 1), (2, 64)])
def test_bounds_are_for_the_memory_plan_only(batch: int, chunk: int, tiny_config: Config) -> None:
    """Torch would make constants of sizes that can only be 1 or 2."""
    model = hooked(tiny_config("qwen3_moe", num_hidden_layers=1))
    main = import_torch(model, max_batch=batch, max_chunk=chunk)["main"]
    assert [str(size) for size in main.params[0].ty.shape] == ["batch", "seq"]
    assert dict(main.attrs["tir_var_upper_bound"].items()) == {"batch": batch, "seq": chunk}


def test_module_is_valid_and_round_trips(module: IRModule) -> None:
    verify(module)
    assert_structural_equal(parse_module(print_module(module)), module)


def test_sites(module: IRModule) -> None:
    (site,) = find_experts(module)
    assert (site.site, site.experts, site.hidden, site.intermediate) == (
        "model.layers.1.mlp.experts",
        8,
        32,
        16,
    )
    assert (site.activation, site.operands) == ("silu_glu", ("gate", "up", "down"))
    linears = {linear.site: linear for linear in find_linears(module)}
    assert linears["model.embed_tokens"].uses == ("embedding", "linear")
    assert linears["model.layers.1.mlp.gate"].router
    assert not linears["model.layers.0.self_attn.o_proj"].router
    assert "model.layers.1.mlp.shared_experts.down_proj" in linears


def test_import_model_from_a_checkpoint() -> None:
    folder = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"
    checkpoint = Checkpoint.open(folder)
    mod = import_model(checkpoint)
    verify(mod)
    assert [site.site for site in find_experts(mod)] == [layout.site for layout in checkpoint.layouts]
    for name, parameter in zip(PARAMS.of(mod), mod["main"].params[2:], strict=True):
        assert tuple(int(size) for size in parameter.ty.shape) == checkpoint.shape(name)


class _Asserting(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        torch._check(input_ids.shape[1] % 2 == 0)
        return input_ids + positions


def test_conditions_on_sizes_are_refused() -> None:
    inputs = (torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64))
    sizes = {0: torch.export.Dim("batch", min=1, max=4), 1: torch.export.Dim("seq", min=1, max=16)}
    program = torch.export.export(
        _Asserting(),
        inputs,
        dynamic_shapes={"input_ids": sizes, "positions": sizes},
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    with pytest.raises(ModelError, match=r"kind: depends on a condition that moqc cannot check: .*2"):
        check_assertions(program, "kind")


class _Failing(torch.nn.Module):
    config = transformers.MixtralConfig()

    def forward(self, input_ids: torch.Tensor, **_rest: Any) -> torch.Tensor:
        raise TypeError("no mask to index\nsecond line")


def test_models_that_cannot_be_traced_are_refused_in_one_line() -> None:
    with pytest.raises(ModelError, match=r"^mixtral: cannot be exported: TypeError: no mask to index$"):
        export(_Failing(), max_chunk=12)
