"""Statistics of every experts block over calibration text: how often, how strongly, on what.

One full-precision run gives for each site

* the pairs (tokens routed to each expert) and the routing weight mass, by dataset;
* the gate-weighted second moments, or Hessians, ``Σ g² x xᵀ`` of the input of gate and up [E, H, H] and of
  the input of down [E, I, I]; g is the weight the model applies. The squared error of the block's output is
  exactly quadratic in the error of down with the latter (exponent 2);
* a uniform sample of routed tokens of each expert, on which candidates are compared.

They are kept a site at a time in the workspace: memory holds one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moqc.calibrate.capture import Batches, Captured, analyze_sites
from moqc.calibrate.experts import ExpertWeights
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace, digest
from moqc.frontend.checkpoint import Checkpoint
from moqc.quant.device import compute_device

VERSION = 1
"""Of what is measured and how it is stored; part of the cache key."""

SAMPLE = 256
"""Routed tokens kept of each expert."""


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of one site with E experts over D datasets.

    `pairs` int64 [D, E]; `weight_mass` float64 [D, E], the sum of routing weights; `input_moments` float32
    [E, H, H] and `hidden_moments` float32 [E, I, I]; `sample_x` float32 [E, S, H] and `sample_weights`
    float32 [E, S]: routed tokens with their routing weights, zero rows where an expert has fewer than S.
    """

    tokens: int
    pairs: Tensor
    weight_mass: Tensor
    input_moments: Tensor
    hidden_moments: Tensor
    sample_x: Tensor
    sample_weights: Tensor

    @property
    def counts(self) -> Tensor:
        """Tokens routed to each expert over all datasets, int64 [E]."""
        return self.pairs.sum(0)

    def hessians(self, projection: str) -> Hessians:
        """Hessians of the input of `projection`, starved experts shrunk."""
        moments = self.hidden_moments if projection == "down" else self.input_moments
        return shrink(moments, self.counts)


@dataclass(frozen=True)
class Hessians:
    """`matrices` float32 [E, K, K], symmetric; `starved`: experts that saw fewer tokens than K."""

    matrices: Tensor
    starved: list[int]


@dataclass(frozen=True)
class Statistics:
    """Statistics of all sites of one model, read from the workspace a site at a time."""

    datasets: tuple[str, ...]
    keys: dict[str, str]
    workspace: Workspace

    @property
    def sites(self) -> list[str]:
        """All sites, in the order of the layers."""
        return list(self.keys)

    def of(self, site: str) -> SiteStatistics:
        """Read the statistics of one site, onto `compute_device()`."""
        device = compute_device()
        tensors = {
            name: tensor.to(device) for name, tensor in self.workspace.load_tensors(self.keys[site]).items()
        }
        return SiteStatistics(tokens=int(tensors.pop("tokens")), **tensors)


def collect_statistics(
    checkpoint: Checkpoint, calibration: CalibrationSet, workspace: Workspace, *, exponent: int = 2
) -> Statistics:
    """Measure, or take from the workspace, the statistics of every site.

    `exponent` of the routing weight in the Hessians: 2 is exact for the block's output, 1 is for ablation.
    """
    model = LayeredModel(checkpoint)
    dataset = Batches.of(calibration).dataset
    key = digest("statistics", VERSION, checkpoint.fingerprint, calibration.fingerprint, exponent, SAMPLE)

    def analyze(site: str, captured: Captured, weights: ExpertWeights) -> dict[str, Tensor]:
        return _measure(captured, weights, dataset, len(calibration.names), exponent)

    keys = analyze_sites(model, calibration, workspace, key, analyze, "collecting statistics")
    return Statistics(calibration.names, keys, workspace)


def _measure(
    captured: Captured, weights: ExpertWeights, dataset: list[int], datasets: int, exponent: int
) -> dict[str, Tensor]:
    experts, columns = weights.expert_count, captured.x.shape[1]
    device = captured.x.device
    of_token = torch.tensor(dataset).repeat_interleave(torch.tensor(captured.batches)).to(device)
    pairs = torch.zeros(datasets, experts, dtype=torch.int64)
    mass = torch.zeros(datasets, experts, dtype=torch.float64)
    sample_x = torch.zeros(experts, SAMPLE, columns)
    sample_weights = torch.zeros(experts, SAMPLE)
    generator = torch.Generator().manual_seed(0)
    for expert, tokens, gates in captured.routed(experts):
        pairs[:, expert] = torch.bincount(of_token[tokens], minlength=datasets)
        mass[:, expert] = torch.bincount(of_token[tokens], gates.double(), minlength=datasets)
        chosen = torch.randperm(len(tokens), generator=generator)[:SAMPLE].to(device)
        sample_x[expert, : len(chosen)] = captured.x[tokens[chosen]]
        sample_weights[expert, : len(chosen)] = gates[chosen]
    return {
        "tokens": torch.tensor(len(captured.x)),
        "pairs": pairs,
        "weight_mass": mass,
        "input_moments": input_moments(captured, experts, exponent),
        "hidden_moments": hidden_moments(captured, weights, exponent),
        "sample_x": sample_x,
        "sample_weights": sample_weights,
    }


def input_moments(captured: Captured, experts: int, exponent: int = 2) -> Tensor:
    """Gate-weighted second moments float32 [E, H, H] of the block's inputs."""
    columns = captured.x.shape[1]
    moments = torch.zeros(experts, columns, columns, device=captured.x.device)
    for expert, tokens, gates in captured.routed(experts):
        moments[expert] = _moment(captured.x[tokens], gates, exponent)
    return moments


def hidden_moments(captured: Captured, weights: ExpertWeights, exponent: int = 2) -> Tensor:
    """Gate-weighted second moments float32 [E, I, I] of the input of down, given the weights before it."""
    columns = weights.down.shape[2]
    moments = torch.zeros(weights.expert_count, columns, columns, device=captured.x.device)
    for expert, tokens, gates in captured.routed(weights.expert_count):
        moments[expert] = _moment(weights.hidden(expert, captured.x[tokens]), gates, exponent)
    return moments


def _moment(x: Tensor, gates: Tensor, exponent: int) -> Tensor:
    """``Σ |g|^exponent x xᵀ``."""
    scaled = x * gates.abs().pow(exponent / 2).unsqueeze(1)
    return scaled.T @ scaled


def shrink(moments: Tensor, counts: Tensor) -> Hessians:
    """Hessians of all experts; those that saw fewer tokens than columns lean on their layer's.

    A starved expert's matrix has not full rank and fits its few tokens only. With n_e tokens, K columns and
    ``a = K / (K + n_e)`` it becomes ``(1 - a) H_e + a H̄``, where H̄ is the mean over all routed tokens of the
    layer, scaled to n_e tokens (to one for an expert that saw none).
    """
    columns = moments.shape[-1]
    per_pair = moments.sum(0) / counts.sum().clamp(min=1)
    starved = torch.nonzero(counts < columns).flatten().tolist()
    matrices = moments.clone() if starved else moments
    for expert in starved:
        count = int(counts[expert])
        share = columns / (columns + count)
        matrices[expert] = (1 - share) * moments[expert] + share * max(count, 1) * per_pair
    return Hessians(matrices, starved)
