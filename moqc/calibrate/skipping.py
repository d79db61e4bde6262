"""From calibration text to a pruning of every experts block: samples, rules, the share for a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moqc.calibrate.routing import collect_samples, measure_losses
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace, digest
from moqc.errors import UserError
from moqc.frontend.checkpoint import Checkpoint
from moqc.quant.routing import Pruning
from moqc.quant.skips import RoutingSample, calibrate, most_share

VERSION = 4
"""Of the calibration of rules; part of the key of losses."""


@dataclass(frozen=True)
class Skipping:
    """What the pruning of one model on one calibration text is made of.

    `samples`: by site. `key` names all of it in caches.
    """

    checkpoint: Checkpoint
    calibration: CalibrationSet
    workspace: Workspace
    samples: dict[str, RoutingSample]
    key: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, calibration: CalibrationSet, workspace: Workspace) -> Skipping:
        """Measure, or take from the workspace. Raises UserError where every token has one expert only."""
        samples = collect_samples(checkpoint, calibration, workspace)
        if most_share(samples) == 0:
            raise UserError("every token of this model uses a single expert: there is none to skip")
        key = digest("skipping", VERSION, checkpoint.fingerprint, calibration.fingerprint)
        return cls(checkpoint, calibration, workspace, samples, key)

    def prunings(self, rule: str, share: float) -> dict[str, Pruning]:
        """Site -> the pruning with which `rule` skips `share` of all pairs."""
        return calibrate(rule, self.samples, share)

    def share_for(self, rule: str, loss: float, shares: Sequence[float]) -> float:
        """The largest share at which the loss on calibration text rises by at most `loss` nats.

        Measured at those of `shares` that are in reach, in one pass over the weights, and interpolated.
        Raises UserError when even the smallest costs more.
        """
        reachable = [share for share in shares if share <= 0.95 * most_share(self.samples)]
        candidates: list[Mapping[str, Pruning]] = [self.prunings(rule, share) for share in reachable]
        key = digest("shares", self.key, rule, reachable)
        rises = measure_losses(self.checkpoint, self.calibration, self.workspace, candidates, key)
        # More skipped work never counts as cheaper: what a small text gains by chance is no gain.
        rising = np.maximum.accumulate(np.maximum(rises, 0.0))
        if rising[0] > loss:
            raise UserError(
                f"a loss of {loss:g} nats is exceeded by skipping {reachable[0]:.0%} of the experts' work "
                f"({rising[0]:.4f}); allow more, or do not prune"
            )
        at = int(np.searchsorted(rising, loss, side="right"))
        if at == len(reachable):
            return reachable[-1]
        low, high = rising[at - 1], rising[at]
        return float(reachable[at - 1] + (reachable[at] - reachable[at - 1]) * (loss - low) / (high - low))
