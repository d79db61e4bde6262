"""How close the choices of routers are: quantized layers before a router disturb what it reads.

The margin of a token is the gap between the logits of the last expert chosen and of the first that is not,
``m = (w_k - w_k+1) x``. Gaussian noise in x whose norm is ε ``‖x‖`` moves the gap by a Gaussian of standard
deviation ``ε ‖x‖ ‖w_k - w_k+1‖ / sqrt(H)``, so these two change places with probability
``Φ(-m / (ε ‖x‖ ‖w_k - w_k+1‖ / sqrt(H)))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moqc.calibrate.capture import Batches
from moqc.calibrate.layers import LayeredModel, LoadedLayer
from moqc.calibrate.routers import observe, router_weight
from moqc.calibrate.stream import Stream
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace, digest
from moqc.errors import PipelineError
from moqc.frontend.checkpoint import Checkpoint
from moqc.log import track

VERSION = 1
"""Of what is measured here; part of the cache key."""

AGREEMENT = 0.99
"""Share of the chosen experts that must be those of the largest logits."""


@dataclass(frozen=True)
class Margins:
    """Of one router with E experts on T tokens.

    `margins` float32 [T]; `scales` float32 [T], standard deviation of the gap for noise of the input's own
    norm; `pairs` int64 [T, 2], the last expert chosen and the first that is not; `counts` int64 [E], tokens
    that chose each expert; `spread`: standard deviation of all logits.
    """

    margins: Tensor
    scales: Tensor
    pairs: Tensor
    counts: Tensor
    spread: Tensor

    def flips(self, noise: float) -> Tensor:
        """Probability float64 [T] that the pair changes places for noise of norm ``noise ‖x‖``."""
        deviations = self.margins.double() / (noise * self.scales.double()).clamp(min=1e-300)
        return 0.5 * torch.erfc(deviations / 2**0.5)


def measure_margins(
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    workspace: Workspace,
    routers: Sequence[str],
    *,
    tokens: int = 4096,
) -> dict[str, Margins]:
    """Margins of `routers` (module names) on about `tokens` calibration tokens; cached in the workspace.

    Raises PipelineError for a router that chooses by more than its logits: with a correction, or by groups.
    """
    calibration = calibration.head(tokens)
    key = digest("margins", VERSION, checkpoint.fingerprint, calibration.fingerprint)
    keys = {name: digest(key, name) for name in routers}
    if not all(workspace.has(keys[name]) for name in routers):
        _walk(LayeredModel(checkpoint), calibration, workspace, keys)
    return {name: Margins(**workspace.load_tensors(keys[name])) for name in routers}


@torch.no_grad()
def _walk(
    model: LayeredModel, calibration: CalibrationSet, workspace: Workspace, keys: dict[str, str]
) -> None:
    stream = model.start(Batches.of(calibration).tokens)
    for index in track(range(model.layer_count), "measuring router margins"):
        with model.layer(index) as layer:
            for name in keys:
                if model.owns(index, name):
                    workspace.save_tensors(keys[name], _margins(model, layer, name, stream))
            layer.run(stream, model.original_experts(index))


def _margins(model: LayeredModel, layer: LoadedLayer, name: str, stream: Stream) -> dict[str, Tensor]:
    weight = router_weight(layer, name, "profile-margins")
    probe = observe(layer, layer.submodule(name), stream, model.original_experts(layer.index))
    x, ids = torch.cat(probe.inputs), torch.cat(probe.ids)
    bias = getattr(layer.submodule(name), "bias", None)
    logits = x @ weight.T + (0 if bias is None else bias)
    chosen = ids.shape[1]
    if chosen == logits.shape[1]:
        raise PipelineError(f"profile-margins: {name} chooses all of its {chosen} experts: nothing to flip")
    top = logits.topk(chosen + 1, dim=1)
    same = (top.indices[:, :chosen, None] == ids[:, None, :]).any(2).double().mean()
    if same < AGREEMENT:
        raise PipelineError(
            f"profile-margins: {name} chooses by more than its logits ({float(same):.0%} of its choices "
            "are the largest): leave the pass out"
        )
    pairs = top.indices[:, chosen - 1 :]
    apart = (weight[pairs[:, 0]] - weight[pairs[:, 1]]).norm(dim=1)
    return {
        "margins": top.values[:, chosen - 1] - top.values[:, chosen],
        "scales": x.norm(dim=1) * apart / x.shape[1] ** 0.5,
        "pairs": pairs,
        "counts": torch.bincount(ids.flatten(), minlength=logits.shape[1]),
        "spread": logits.std(),
    }
