"""Experts that fire together: how often, and whether their quantization errors point the same way.

The error of a block is ``Σ_i ‖D_i‖² + 2 Σ_{i<j} <D_i, D_j>`` over the experts of a token, D_i the error of
one expert's output times its routing weight. Allocators add up the first sum; the second says what that
leaves out. It is measured with experts rounded to nearest in a probe format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moqc.calibrate.capture import Captured, analyze_sites
from moqc.calibrate.experts import ExpertWeights
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace, digest
from moqc.frontend.checkpoint import Checkpoint
from moqc.quant.formats import Format
from moqc.quant.rtn import quantize_rtn
from moqc.quant.versions import QUANTIZER_VERSIONS

VERSION = 1
"""Of what is measured here; part of the cache keys."""


@dataclass(frozen=True)
class Coactivation:
    """Of one site with E experts.

    `together` int64 [E, E]: tokens that chose both (the diagonal: that chose the expert). `products` float64
    [E, E]: summed inner products of the errors of both where they fired together.
    """

    together: Tensor
    products: Tensor

    @property
    def correlation(self) -> Tensor:
        """``Σ <D_i, D_j> / sqrt(Σ ‖D_i‖² Σ ‖D_j‖²)``, the latter over all tokens of each: float64 [E, E]."""
        norms = self.products.diagonal().clamp(min=1e-300).sqrt()
        return self.products / norms.unsqueeze(0) / norms.unsqueeze(1)

    @property
    def cross_share(self) -> float:
        """The second sum over the first: by how much errors of experts of a token add up or cancel."""
        own = float(self.products.diagonal().sum())
        return (float(self.products.sum()) - own) / own if own else 0.0


def measure_coactivation(
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    workspace: Workspace,
    *,
    probe: Format | None,
    tokens: int = 4096,
) -> dict[str, Coactivation]:
    """Results by site on about `tokens` calibration tokens; experts are rounded to `probe` for the errors.

    None: errors are not measured, their products are 0.
    """
    calibration = calibration.head(tokens)
    versions = [VERSION, QUANTIZER_VERSIONS["rtn"]]
    key = digest("coactivation", versions, checkpoint.fingerprint, calibration.fingerprint, str(probe))

    def analyze(site: str, captured: Captured, weights: ExpertWeights) -> dict[str, Tensor]:
        return _analyze(captured, weights, probe)

    model = LayeredModel(checkpoint)
    keys = analyze_sites(model, calibration, workspace, key, analyze, "measuring co-activation")
    return {site: Coactivation(**workspace.load_tensors(keys[site])) for site in keys}


def _analyze(captured: Captured, weights: ExpertWeights, probe: Format | None) -> dict[str, Tensor]:
    experts = weights.expert_count
    pairs = captured.ids.unsqueeze(2) * experts + captured.ids.unsqueeze(1)
    products = torch.zeros(experts * experts, dtype=torch.float64, device=captured.x.device)
    if probe is not None:
        errors = _errors(captured, weights, probe)
        products.index_add_(0, pairs.flatten(), (errors @ errors.mT).double().flatten())
    together = torch.bincount(pairs.flatten(), minlength=experts * experts)
    shape = (experts, experts)
    return {"together": together.reshape(shape), "products": products.reshape(shape)}


def _errors(captured: Captured, weights: ExpertWeights, probe: Format) -> Tensor:
    """What rounding to `probe` changes in the outputs of each token's experts, weighted: [T, k, H]."""
    rounded = weights.substitute(
        **{name: quantize_rtn(weights.matrices(name), probe).dequantize() for name in weights.projections}
    )
    errors = torch.zeros(*captured.ids.shape, captured.x.shape[1], device=captured.x.device)
    for expert, tokens, gates in captured.routed(weights.expert_count):
        x = captured.x[tokens]
        change = (rounded.output(expert, x) - weights.output(expert, x)) * gates.unsqueeze(1)
        slots = (captured.ids[tokens] == expert).float().argmax(1)
        errors[tokens, slots] = change
    return errors
