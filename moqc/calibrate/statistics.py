"""Statistics of every experts block over calibration text: how often, how strongly, on what.

One full-precision run gives for each site

* the pairs (tokens routed to each expert), the routing weight mass, and the energy of every channel, by
  dataset;
* the gate-weighted second moments, or Hessians, ``Σ g² x xᵀ`` of the input of gate and up [E, H, H] and of
  the input of down [E, I, I]; g is the weight the model applies. The squared error of the block's output is
  exactly quadratic in the error of down with the latter (exponent 2);
* a uniform sample of routed tokens of each expert, on which candidates are compared.

They are kept a site at a time in the workspace: memory holds one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moqc.calibrate.capture import Batches, Captured, analyze_sites
from moqc.calibrate.experts import ExpertWeights
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace, digest
from moqc.frontend.checkpoint import Checkpoint
from moqc.quant.device import compute_device
from moqc.quant.hadamard import rotate_moments

VERSION = 2
"""Of what is measured and how it is stored; part of the cache key."""

SAMPLE = 256
"""Routed tokens kept of each expert."""

PRIOR_PAIRS = 16
"""Pairs' worth of the site's mean error in the estimate of one expert's, where routing is taken as even."""

_MEASURED = (
    "pairs",
    "weight_mass",
    "input_energy",
    "hidden_energy",
    "input_moments",
    "hidden_moments",
)


@dataclass(frozen=True)
class Sample:
    """At most S routed tokens of each of E experts, drawn uniformly; zeros where an expert has fewer.

    `x` float32 [E, S, H]; `weights` float32 [E, S], the routing weights, 0 for no token; `datasets` int64
    [E, S]; `pairs` int64 [D, E], how many there were to draw from; `tokens` seen in all. `curvature` float32
    [E, S, H] or [E, 1, 1]: what a squared error of the block's output costs, None where all count the same.
    """

    x: Tensor
    weights: Tensor
    datasets: Tensor
    pairs: Tensor
    tokens: int
    curvature: Tensor | None = None

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> Sample:
        """From the tensors of `draw_sample`, `count_pairs` and "tokens", onto `compute_device()`."""
        device = compute_device()
        parts = {
            name.removeprefix("sample_"): tensor.to(device)
            for name, tensor in tensors.items()
            if name == "pairs" or name.startswith("sample_")
        }
        return cls(tokens=int(tensors["tokens"]), **parts)

    def totals(self, errors: Tensor) -> Tensor:
        """Sums over all routed tokens by dataset, per token of it: float64 [D, E] of errors [E, S].

        An expert that a dataset used, but of which no token of that dataset was drawn, gets its mean error.
        """
        kept = self.weights != 0
        errors = torch.where(kept, errors, 0.0).double()
        overall = errors.sum(1) / kept.sum(1).clamp(min=1)
        tokens = self.pairs.sum(1).double() * (self.tokens / max(int(self.pairs.sum()), 1))
        rows = []
        for dataset, pairs in enumerate(self.pairs):
            mine = kept & (self.datasets == dataset)
            drawn = mine.sum(1)
            mean = torch.where(drawn > 0, (errors * mine).sum(1) / drawn.clamp(min=1), overall)
            rows.append(mean * pairs / tokens[dataset].clamp(min=1))
        return torch.stack(rows)

    def even(self, errors: Tensor) -> Tensor:
        """The sum a token if the router used all experts alike: float64 [E] of errors [E, S].

        `errors` are those of the experts' own outputs, without routing weights: every pair gets the mean
        square of the site's. An expert's mean error leans on that of all experts by `PRIOR_PAIRS` pairs.
        """
        kept, counts = self.weights != 0, self.pairs.sum(0).double()
        drawn, means = kept.sum(1).double(), self.leaning(errors)
        squares = self.weights.double().square().sum(1) / drawn.clamp(min=1)
        weight = (squares * counts).sum() / counts.sum().clamp(min=1)
        return means * weight * counts.sum() / (self.tokens * len(counts))

    def held_out(self) -> Sample:
        """The part that can be kept from a fit: of each expert's tokens, half of them at most."""
        limits = (self.pairs.sum(0).unsqueeze(1) + 1) // 2
        places = torch.arange(self.weights.shape[1], device=self.weights.device)
        return replace(self, weights=torch.where(places < limits, self.weights, 0.0))

    def moments(self, values: Tensor) -> Tensor:
        """Gate-weighted second moments float32 [E, K, K] of `values` [E, S, K] of the tokens drawn."""
        scaled = values * self.weights.unsqueeze(2)
        return scaled.mT @ scaled

    def leaning(self, values: Tensor) -> Tensor:
        """Mean of each expert, leaning on that of all by `PRIOR_PAIRS` pairs: float64 [E] of [E, S]."""
        kept = self.weights != 0
        drawn, sums = kept.sum(1).double(), torch.where(kept, values, 0.0).double().sum(1)
        overall = sums.sum() / drawn.sum().clamp(min=1)
        return (sums + PRIOR_PAIRS * overall) / (drawn + PRIOR_PAIRS)


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of one site with E experts over D datasets.

    `pairs` int64 [D, E]; `weight_mass` float64 [D, E], the sum of routing weights; `input_energy` float32
    [D, E, H] and `hidden_energy` float32 [D, E, I]: ``Σ g² x²`` of every channel; `input_moments` float32
    [E, H, H] and `hidden_moments` float32 [E, I, I].
    """

    tokens: int
    pairs: Tensor
    weight_mass: Tensor
    input_energy: Tensor
    hidden_energy: Tensor
    input_moments: Tensor
    hidden_moments: Tensor
    sample: Sample

    @property
    def counts(self) -> Tensor:
        """Tokens routed to each expert over all datasets, int64 [E]."""
        return self.pairs.sum(0)

    def hessians(
        self, projection: str, *, rotated: bool = False, without: tuple[Sample, Tensor] | None = None
    ) -> Hessians:
        """Hessians of the input of `projection`; of down's `rotated` input.

        `without`: tokens that are left out, and their inputs [E, S, K] of this projection.
        """
        moments, counts = self.input_moments, self.counts
        if projection == "down":
            moments = rotate_moments(self.hidden_moments) if rotated else self.hidden_moments
        if without is not None:
            sample, values = without
            moments, counts = moments - sample.moments(values), counts - (sample.weights != 0).sum(1)
        return shrink(moments, counts)


@dataclass(frozen=True)
class Hessians:
    """`matrices` float32 [E, K, K], symmetric; `starved`: experts that saw fewer tokens than columns K."""

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
        tensors, device = self.workspace.load_tensors(self.keys[site]), compute_device()
        measured = {name: tensors[name].to(device) for name in _MEASURED}
        return SiteStatistics(tokens=int(tensors["tokens"]), sample=Sample.read(tensors), **measured)


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
    experts, device = weights.expert_count, captured.x.device
    of_token = captured.per_token(torch.tensor(dataset))
    mass = torch.zeros(datasets, experts, dtype=torch.float64)
    columns = {"input": captured.x.shape[1], "hidden": weights.down.shape[2]}
    energy = {name: torch.zeros(datasets, experts, size, device=device) for name, size in columns.items()}
    moments = {name: torch.zeros(experts, size, size, device=device) for name, size in columns.items()}
    for expert, tokens, gates in captured.routed(experts):
        owners, x = of_token[tokens], captured.x[tokens]
        mass[:, expert] = torch.bincount(owners, gates.double(), minlength=datasets)
        for name, values in (("input", x), ("hidden", weights.hidden(expert, x))):
            energy[name][:, expert].index_add_(0, owners, (values * gates.unsqueeze(1)).square())
            moments[name][expert] = _moment(values, gates, exponent)
    return {
        "tokens": torch.tensor(len(captured.x)),
        "pairs": count_pairs(captured, experts, of_token, datasets),
        "weight_mass": mass,
        **{f"{name}_energy": tensor for name, tensor in energy.items()},
        **{f"{name}_moments": tensor for name, tensor in moments.items()},
        **draw_sample(captured, experts, of_token),
    }


def count_pairs(captured: Captured, experts: int, of_token: Tensor, datasets: int) -> Tensor:
    """(token, chosen expert) pairs, int64 [D, E]; `of_token` int64 [T] is the dataset of each token."""
    flat = captured.ids + (of_token * experts).unsqueeze(1)
    return torch.bincount(flat.flatten(), minlength=datasets * experts).reshape(datasets, experts)


def draw_sample(captured: Captured, experts: int, of_token: Tensor, **values: Tensor) -> dict[str, Tensor]:
    """`SAMPLE` routed tokens of each expert, drawn uniformly: the tensors of a `Sample`.

    `of_token` int64 [T] is the dataset of each token. Every [T, n] tensor of `values` is sampled along.
    """
    device = captured.x.device
    rows = {"x": captured.x, **values}
    found = {
        name: torch.zeros(experts, SAMPLE, tensor.shape[1], device=device) for name, tensor in rows.items()
    }
    found["weights"] = torch.zeros(experts, SAMPLE, device=device)
    found["datasets"] = torch.zeros(experts, SAMPLE, dtype=torch.int64, device=device)
    generator = torch.Generator().manual_seed(0)
    for expert, tokens, gates in captured.routed(experts):
        chosen = torch.randperm(len(tokens), generator=generator)[:SAMPLE].to(device)
        for name, tensor in rows.items():
            found[name][expert, : len(chosen)] = tensor[tokens[chosen]]
        found["weights"][expert, : len(chosen)] = gates[chosen]
        found["datasets"][expert, : len(chosen)] = of_token[tokens[chosen]]
    return {f"sample_{name}": tensor for name, tensor in found.items()}


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
    """Hessians of all experts, each leaning on its layer's as far as its own tokens leave it open.

    With n_e tokens, K columns and ``a = K / (K + n_e)``, the matrix of an expert becomes
    ``(1 - a) H_e + a H̄``, where H̄ is the mean over all routed tokens of the layer, scaled to n_e tokens (to
    one for an expert that saw none): the mean of the posterior for a prior worth K tokens of the layer.
    """
    columns = moments.shape[-1]
    per_pair = moments.sum(0) / counts.sum().clamp(min=1)
    share = (columns / (columns + counts)).to(moments).view(-1, 1, 1)
    tokens = counts.clamp(min=1).to(moments).view(-1, 1, 1)
    starved = torch.nonzero(counts < columns).flatten().tolist()
    return Hessians(torch.lerp(moments, tokens * per_pair, share), starved)
