from pathlib import Path
from typing import Any

import pytest
import torch

from moqc.calibrate.linears import measure_linears
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace
from moqc.quant.formats import Format
from moqc.quant.rtn import quantize_rtn

PROBE, FINE = Format.parse("int2-g32"), Format.parse("int4-g32")


@pytest.mark.parametrize("tied", [False, True])
def test_against_the_whole_model_with_one_matrix_replaced(
    small: Any, calibration: CalibrationSet, tmp_path: Path, tied: bool
) -> None:
    model = small("qwen3_moe", tie_word_embeddings=tied)
    sites = ["model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]
    sites += [] if tied else ["lm_head"]
    workspace = Workspace(tmp_path / "cache")
    found = measure_linears(
        model.checkpoint, calibration, workspace, sites, [PROBE, FINE], probe=PROBE, tokens=10**6
    )
    # The least number of windows of any dataset is what `head` takes of each at most: here all of them.
    windows = [torch.from_numpy(rows) for rows in calibration.tokens]
    clean = [model.logits(tokens).double().log_softmax(-1) for tokens in windows]
    for site in sites:
        parameter = model.model.get_parameter(f"{site}.weight")
        original = parameter.data.clone()
        rounded = {fmt: quantize_rtn(original, fmt).dequantize() for fmt in (PROBE, FINE)}
        parameter.data.copy_(rounded[PROBE])
        noisy = [model.logits(tokens).double().log_softmax(-1) for tokens in windows]
        parameter.data.copy_(original)
        total = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(clean, noisy, strict=True))
        expected = total / sum(tokens.numel() for tokens in windows)
        assert found[site][str(PROBE)] == pytest.approx(expected, rel=1e-3)
        errors = [float((rounded[fmt] - original).square().sum()) for fmt in (PROBE, FINE)]
        assert found[site][str(FINE)] == pytest.approx(expected * errors[1] / errors[0], rel=1e-3)
    assert (
        measure_linears(
            model.checkpoint, calibration, workspace, sites, [PROBE, FINE], probe=PROBE, tokens=10**6
        )
        == found
    )
