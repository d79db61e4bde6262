"""Quantized experts of one plan, kept in the workspace a site at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moqc.calibrate.experts import ExpertWeights
from moqc.calibrate.workspace import Workspace
from moqc.errors import InternalError
from moqc.quant.formats import Format
from moqc.quant.protection import Protection
from moqc.quant.tensor import Quantized


@dataclass(frozen=True)
class ProjectionResult:
    """All experts of one projection after quantization.

    `classes`: for each format used, the experts (int64 [n]) in it and their matrices, stacked in that order.
    `simulated`: dequantized weights float32 [E, N, K] of a quantizer whose numbers no format of moqc stores,
    with its own count of `simulated_bits`.
    """

    classes: Mapping[Format, tuple[Tensor, Quantized]] = field(default_factory=dict)
    simulated: Tensor | None = None
    simulated_bits: int = 0

    def dense(self) -> Tensor:
        """Dequantized weights, float32 [E, N, K]."""
        if self.simulated is not None:
            return self.simulated
        experts = torch.cat([chosen for chosen, _ in self.classes.values()])
        stacked = torch.cat([matrices.dequantize() for _, matrices in self.classes.values()])
        return stacked[torch.argsort(experts)]

    @property
    def stored_bits(self) -> int:
        """Bits of all experts: codes, scales, zeros and padding."""
        return self.simulated_bits + sum(matrices.stored_bits for _, matrices in self.classes.values())

    def tensors(self, projection: str) -> dict[str, Tensor]:
        """Named tensors for the workspace; the inverse is `read_projections`."""
        found: dict[str, Tensor] = {}
        for fmt, (experts, matrices) in self.classes.items():
            parts = {"experts": experts, "codes": matrices.codes, "scales": matrices.scales}
            if matrices.zeros is not None:
                parts["zeros"] = matrices.zeros
            found |= {f"{projection}.{fmt}.{part}": tensor for part, tensor in parts.items()}
        if self.simulated is not None:
            found[f"{projection}.simulated.weights"] = self.simulated
            found[f"{projection}.simulated.bits"] = torch.tensor(self.simulated_bits)
        return found


def read_projections(tensors: Mapping[str, Tensor]) -> dict[str, ProjectionResult]:
    """Projection -> result, from the tensors of one site."""
    grouped: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        projection, kind, part = name.split(".")
        grouped.setdefault(projection, {}).setdefault(kind, {})[part] = tensor
    found = {}
    for projection, kinds in grouped.items():
        simulated = kinds.pop("simulated", None)
        if simulated is not None:
            result = ProjectionResult({}, simulated["weights"], int(simulated["bits"]))
        else:
            result = ProjectionResult(
                {Format.parse(kind): _read_class(kind, kinds[kind]) for kind in sorted(kinds)}
            )
        found[projection] = result
    return found


def _read_class(kind: str, parts: dict[str, Tensor]) -> tuple[Tensor, Quantized]:
    matrices = Quantized(Format.parse(kind), parts["codes"], parts["scales"], parts.get("zeros"))
    return parts["experts"], matrices


def substituted(
    weights: ExpertWeights, results: Mapping[str, ProjectionResult], protection: Protection | None = None
) -> ExpertWeights:
    """The block with the dequantized weights of `results`, by projection."""
    device = weights.down.device
    dense = weights.substitute(**{name: part.dense().to(device) for name, part in results.items()})
    return replace(dense, protection=protection)


@dataclass
class ExpertStore:
    """Quantized experts of all sites. `keys`: site -> workspace key; the site read last stays in memory.

    `rotated`: down is that of `ExpertWeights.rotated`. `protections`: site -> the columns that gate and up
    have besides.
    """

    keys: dict[str, str]
    workspace: Workspace
    rotated: bool = False
    protections: Mapping[str, Protection] = field(default_factory=dict)
    _last: tuple[str, dict[str, ProjectionResult]] | None = None

    @property
    def sites(self) -> list[str]:
        """All sites, in the order of the layers."""
        return list(self.keys)

    def site(self, site: str) -> dict[str, ProjectionResult]:
        """Results of one site by projection."""
        if self._last is None or self._last[0] != site:
            self._last = (site, read_projections(self.workspace.load_tensors(self.keys[site])))
        return self._last[1]

    def original(self, weights: ExpertWeights) -> ExpertWeights:
        """A block's original `weights`, rotated or not as they are here."""
        return weights.rotated() if self.rotated else weights

    def block(self, site: str, weights: ExpertWeights) -> ExpertWeights:
        """The block of `site`, whose original `weights` these are, as quantized."""
        return substituted(self.original(weights), self.site(site), self.protections.get(site))

    def get(self, site: str, projection: str, expert: int) -> Quantized:
        """One quantized matrix [N, K]. Raises InternalError when the quantizer only simulates."""
        for experts, matrices in self.site(site)[projection].classes.values():
            position = torch.nonzero(experts == expert).flatten()
            if len(position):
                at = int(position[0])
                zeros = None if matrices.zeros is None else matrices.zeros[at]
                return Quantized(matrices.format, matrices.codes[at], matrices.scales[at], zeros)
        raise InternalError(f"{site}: expert {expert} of {projection} is not stored as codes")

    def dense(self, site: str, projection: str) -> Tensor:
        """Dequantized weights of all experts, float32 [E, N, K]."""
        return self.site(site)[projection].dense()

    def stored_bits(self) -> int:
        """Bits of all routed experts of all sites: codes, scales, zeros and padding."""
        return sum(result.stored_bits for site in self.sites for result in self.site(site).values())
