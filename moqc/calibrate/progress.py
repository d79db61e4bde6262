"""What is said about an experts block once it is quantized."""

from __future__ import annotations

import torch

from moqc.calibrate.capture import Captured
from moqc.calibrate.experts import ExpertWeights
from moqc.log import event

SAMPLE = 512
"""Tokens on which the block's error is measured."""


@torch.inference_mode()
def report_site(
    site: str, exact: ExpertWeights, quantized: ExpertWeights, captured: Captured, seconds: float
) -> None:
    """Log the relative error of the block's output on a sample of its inputs, and tokens an expert had."""
    chosen = slice(None, None, max(1, len(captured.x) // SAMPLE))
    inputs = captured.x[chosen], captured.ids[chosen], captured.weights[chosen]
    output = exact.apply(*inputs)
    error = float((quantized.apply(*inputs) - output).norm() / output.norm().clamp(min=1e-30))
    tokens = torch.bincount(captured.ids.flatten(), minlength=exact.expert_count).sort().values
    least, middle, most = (int(tokens[at]) for at in (0, len(tokens) // 2, -1))
    event(
        "layer",
        f"{site}: relative error {error:.4f}, tokens an expert {least} to {most}, {seconds:.1f} s",
        site=site,
        relative_error=round(error, 6),
        tokens_least=least,
        tokens_median=middle,
        tokens_most=most,
        seconds=round(seconds, 3),
    )
