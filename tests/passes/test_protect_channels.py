"""protect-channels: which channels, and that compiled experts read them twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from tvm import IRModule, relax

import moqc
from moqc.calibrate.forward import reference_forward
from moqc.calibrate.quantize import quantize_experts
from moqc.calibrate.statistics import collect_statistics
from moqc.calibrate.workspace import ParamStore, Workspace
from moqc.errors import BudgetError, ModelError, PipelineError, TargetError
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.gate import random_model
from moqc.frontend.hf import import_model
from moqc.ir.annotations import CHANNELS, PROTECTION
from moqc.ir.ops import MIXED_EXPERTS, attributes, is_call, mixed_experts
from moqc.ir.sites import bindings, find_experts
from moqc.ir.verify import verify
from moqc.onnx_export import export_onnx
from moqc.passes.pipeline import Pipeline
from moqc.passes.profile_channels import ProfileChannels
from moqc.passes.protect_channels import ProtectChannels
from moqc.quant.protection import Protection, swing
from moqc.schedules.portable.lower import lower_mixed_experts
from moqc.targets import find_target


@pytest.fixture(scope="module")
def profiled(calibrated):
    return ProfileChannels()(import_model(calibrated.checkpoint), calibrated)


def test_chooses_by_swing_or_energy(profiled: IRModule, calibrated) -> None:
    statistics = collect_statistics(calibrated.checkpoint, calibrated.calibration, calibrated.workspace)
    for by in ("swing", "energy"):
        mod = ProtectChannels(share=0.3, copies=4, by=by)(profiled, calibrated)
        verify(mod)
        for site, found in PROTECTION.of(mod).items():
            energy = statistics.of(site).input_energy.sum(1)
            scores = swing(energy) if by == "swing" else energy.sum(0)
            assert found == {"channels": sorted(scores.topk(16).indices.tolist()), "copies": 4}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"share": 0.0}, "share=0 must be above 0"),
        ({"share": 1.0}, "share=1 must be above 0 and below 1"),
        ({"copies": 0}, "copies=0 must be 1 to 7"),
        ({"by": "luck"}, "by=luck is not one of swing, energy"),
    ],
)
def test_refuses(profiled, calibrated, options, says):
    with pytest.raises(PipelineError, match=says):
        ProtectChannels(**options)(profiled, calibrated)


def test_needs_profile_channels(profiled, calibrated):
    with pytest.raises(PipelineError, match="profile-channels"):
        ProtectChannels()(CHANNELS.drop(profiled), calibrated)


def test_sizes_and_operators_follow(profiled, calibrated, tmp_path):
    ctx = replace(calibrated, params=ParamStore(tmp_path))
    text = "protect-channels,allocate-bits{bits=10 allocator=uniform formats=int4-g32}"
    plan = Pipeline.parse(text).run(profiled, ctx)
    sites = find_experts(plan)
    assert {site.added for site in sites} == {32}
    with pytest.raises(BudgetError):  # without the added columns it would fit
        Pipeline.parse(text.replace("bits=10", "bits=9")).run(profiled, ctx)
    mixed = Pipeline.parse("quantize-experts{quantizer=gptq rotate=true}").run(plan, ctx)
    verify(mixed)
    calls = [value for _, value in bindings(mixed["main"]) if is_call(value, MIXED_EXPERTS)]
    for call, site in zip(calls, sites, strict=True):
        assert attributes(call)["hidden"] == site.hidden
        assert int(call.args[0].ty.shape[1]) == site.hidden + 32
        assert int(call.ty.shape[1]) == site.hidden


def test_targets_without_such_kernels_refuse():
    """CUDA's own refusal is tested with its kernels."""
    arguments = [relax.Var(name, relax.TensorType([1, 1], "float32")) for name in ("x", "ids", "w", "table")]
    call = mixed_experts(
        *arguments,
        site="s",
        activation="silu",
        activations="float",
        operands=["table"],
        classes=["up:int4-g64", "down:int4-g64"],
        intermediate=64,
        hidden=32,
    )
    with pytest.raises(TargetError, match="webgpu has no protected channels"):
        lower_mixed_experts(relax.BlockBuilder(), call, find_target("webgpu"))


CONFIG = {
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "max_position_embeddings": 64,
    "eos_token_id": 256,
    "bos_token_id": None,
    "pad_token_id": None,
}


def test_compiled_model_is_the_reference(tmp_path, write_tokenizer):
    """Logits of the artifact are those of the quantized weights; QMoE nodes have no such experts."""
    folder, text, copies = tmp_path / "model", tmp_path / "text.txt", 2
    random_model(CONFIG_MAPPING["qwen3_moe"](**CONFIG)).save_pretrained(folder)
    write_tokenizer(folder)
    text.write_text("To be, or not to be, that is the question. " * 40)
    passes = (
        f"profile-channels,protect-channels{{copies={copies} by=energy}},"
        "allocate-bits{bits=7 allocator=uniform formats=int3-g32},"
        "quantize-experts{quantizer=rtn activations=float},"
        "plan-cache{context=32 dtype=float32},legalize,schedule"
    )
    options = {"calibration": [text], "calibration_tokens": 256, "cache": tmp_path / "cache"}
    manifest = moqc.compile(folder, tmp_path / "out", pipeline=passes, **options)
    assert {len(added) for added in manifest.protected.values()} == {32}
    chosen = {
        site: Protection(added[: len(added) // copies], copies) for site, added in manifest.protected.items()
    }
    checkpoint, cache = Checkpoint.open(folder), Workspace(tmp_path / "cache")
    store = quantize_experts(checkpoint, manifest.bits, "rtn", None, cache, protections=chosen)
    tokens = np.random.default_rng(0).integers(0, 256, (3, 11))
    expected = torch.cat(list(reference_forward(checkpoint, torch.from_numpy(tokens), store))).numpy()
    found = moqc.load(tmp_path / "out").forward(tokens)
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
    with pytest.raises(ModelError, match="QMoE has no protected channels"):
        export_onnx(tmp_path / "out", tmp_path / "onnx", uniform="int8-g32-sym")
