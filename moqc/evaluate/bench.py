"""A model on which quantized variants are tried: the reference forward, probed, with everything cached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor
from tvm import IRModule

from moqc.calibrate.forward import reference_logits
from moqc.calibrate.store import ExpertStore
from moqc.calibrate.workspace import Workspace, digest
from moqc.describe import count_weights
from moqc.evaluate.probes import Probe
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.hf import import_model
from moqc.frontend.sizes import kept_bits
from moqc.ir.sites import find_experts
from moqc.package import WeightCounts
from moqc.passes.allocation_problem import TABLE_BITS
from moqc.quant.formats import Format
from moqc.quant.rtn import quantize_rtn
from moqc.quant.tensor import Quantized
from moqc.quant.versions import QUANTIZER_VERSIONS
from moqc.targets import find_target

VERSION = 2
"""Of the evaluation; part of the key of cached results."""

Linears = Mapping[str, Format]
"""Format of matrices outside the experts, by site; the others stay as stored."""


@dataclass
class Bench:
    """One model and what is asked of it; `probes`: name -> probe."""

    checkpoint: Checkpoint
    workspace: Workspace
    mod: IRModule
    counts: WeightCounts
    probes: Mapping[str, Probe]
    _linears: dict[tuple[str, Format], Quantized] = field(default_factory=dict)

    @classmethod
    def open(cls, checkpoint: Checkpoint, workspace: Workspace, probes: Mapping[str, Probe]) -> Bench:
        """Import the model of `checkpoint`, as it is compiled here (its linears depend on the target)."""
        mod = import_model(checkpoint, latent=find_target("native").latent_attention)
        return cls(checkpoint, workspace, mod, count_weights(mod, checkpoint), probes)

    def measure(self, store: ExpertStore | None, linears: Linears) -> dict[str, Any]:
        """Results of all probes by name, with the experts of `store` (None: the original ones)."""
        formats = {site: str(fmt) for site, fmt in linears.items()}
        experts = [] if store is None else list(store.keys.values())
        versions = [VERSION, QUANTIZER_VERSIONS["rtn"]]  # of the linears; the experts' keys have their own
        variant = digest("variant", versions, self.checkpoint.fingerprint, experts, formats)
        keys = {name: digest("probe", variant, probe.key) for name, probe in self.probes.items()}
        missing = [name for name, key in keys.items() if not self.workspace.has(key)]
        if missing:
            batches = {name: self.probes[name].batches for name in missing}
            logits = self._logits([batch for name in missing for batch in batches[name]], store, linears)
            for name in missing:
                result = self.probes[name].measure(islice(logits, len(batches[name])))
                self.workspace.save_json(keys[name], result)
        return {name: self.workspace.load_json(key) for name, key in keys.items()}

    def _logits(self, batches: list[Tensor], store: ExpertStore | None, linears: Linears) -> Iterator[Tensor]:
        return reference_logits(self.checkpoint, batches, store, linears=self.quantized(linears))

    def quantized(self, linears: Linears) -> dict[str, Quantized]:
        """Site -> matrix, made when first used; a tied parameter gets the matrix of the stored one."""
        found: dict[str, Quantized] = {}
        for site, fmt in linears.items():
            if (site, fmt) not in self._linears:
                self._linears[site, fmt] = quantize_rtn(self.checkpoint.load(f"{site}.weight").float(), fmt)
            found[site] = self._linears[site, fmt]
        for name, stored in self.checkpoint.tied.items():
            origin = stored.removesuffix(".weight")
            if origin in found:
                found[name.removesuffix(".weight")] = found[origin]
        return found

    def expert_bits(self, store: ExpertStore) -> int:
        """Stored bits of all routed experts, tables included."""
        return store.stored_bits() + sum(site.experts * TABLE_BITS for site in find_experts(self.mod))

    def other_bits(self, linears: Linears) -> int:
        """Stored bits of everything but the routed experts."""
        names = {f"{site}.weight": fmt for site, fmt in linears.items()}
        packed = sum(fmt.stored_bits(*self.checkpoint.shape(name)) for name, fmt in names.items())
        return packed + kept_bits(self.checkpoint, names)
