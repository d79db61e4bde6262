"""prune-routing: tokens skip the experts that are not worth their work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tvm import IRModule, relax

from moqc.errors import PipelineError
from moqc.ir import ops
from moqc.ir.annotations import BITS, PARAMS, PRUNING, Key
from moqc.ir.sites import bindings
from moqc.log import logger
from moqc.passes.base import Pass, PassContext
from moqc.passes.rewriting import Rewrite, apply_rewrite, bind_before, new_parameter
from moqc.quant.formats import Format
from moqc.quant.routing import SitePruning
from moqc.quant.skips import RULES, RoutingSample

COMPILED = tuple(name for name in RULES if name != "odp-literal")
POLICIES = ("keep", "demote", "remove")
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
"""Where the loss is measured to find the share for a given loss."""


@dataclass(frozen=True)
class PruneRouting(Pass):
    """Let every token skip the experts that are not worth their work.

    `rule` is "mass", "odp" or "topk-threshold". Give either `share`, the part of all (token, expert) pairs
    to skip on the calibration text, or `loss`, by how many nats the loss there may rise. `cold` says what
    becomes of experts that no calibration token keeps: "keep", "demote" to the smallest format of the plan,
    or "remove": their weights are not stored. Writes PRUNING: ``{site: {"rule": str, "skipped_ppm": int,
    "renormalize": 0 or 1, "chosen": [int] * E, "kept": [int] * E, "cold": [expert], "policy": str}}``, with
    the pairs of the sampled calibration tokens before and after.
    """

    name: ClassVar[str] = "prune-routing"
    reads: ClassVar[tuple[Key[Any], ...]] = (PARAMS,)
    writes: ClassVar[tuple[Key[Any], ...]] = (PRUNING,)

    rule: str = "mass"
    share: float = 0.0
    loss: float = 0.0
    cold: str = "keep"

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Calibrate with checkpoint, calibration and workspace of `ctx`; parameters go to its params."""
        self._check_module(mod)
        params = ctx.need("params", self.name)
        samples, prunings = self._calibrate(ctx)
        report: dict[str, Any] = {}
        for site, pruning in prunings.items():
            coverage = _coverage(samples[site], pruning)
            cold = [expert for expert, pairs in enumerate(coverage["kept"]) if pairs == 0]
            report[site] = {**coverage, "cold": cold, "policy": self.cold}
            prunings[site] = pruning = _without(pruning, cold) if self.cold == "remove" else pruning
            report[site] |= {"rule": self.rule, "renormalize": int(pruning.renormalize)}
            limits = np.array([pruning.limit, pruning.peak, pruning.margin], np.float32)
            params.put(f"{_prefix(site)}.strength", pruning.strength.numpy())
            params.put(f"{_prefix(site)}.limits", limits)
            if pruning.slopes is not None:
                params.put(f"{_prefix(site)}.slopes", pruning.slopes.numpy())
        self._report(report)
        if self.cold == "demote":
            mod = _demote(mod, {site: entry["cold"] for site, entry in report.items()})
        return PRUNING.put(_rewrite(mod, prunings), report)

    def check(self) -> None:
        """Refuse rules and policies there are not, and two amounts or none."""
        if self.rule == "odp-literal":
            raise PipelineError(
                f"{self.name}: odp-literal needs the length of the whole prompt, which a compiled model does "
                "not know; it is for `moqc compare` only, compile with odp"
            )
        if self.rule not in COMPILED:
            raise PipelineError(f"{self.name}: rule={self.rule} is not one of {', '.join(COMPILED)}")
        if self.cold not in POLICIES:
            raise PipelineError(f"{self.name}: cold={self.cold} is not one of {', '.join(POLICIES)}")
        if (self.share > 0) == (self.loss > 0):
            raise PipelineError(f"{self.name}: give share or loss, one of them, above 0")

    def _check_module(self, mod: IRModule) -> None:
        if PRUNING.get(mod) is not None:
            raise PipelineError(f"{self.name}: the module has {PRUNING} already")
        if self.cold == "demote" and BITS.get(mod) is None:
            raise PipelineError(f"{self.name}: cold=demote changes {BITS}: run allocate-bits before")

    def _calibrate(self, ctx: PassContext) -> tuple[dict[str, RoutingSample], dict[str, SitePruning]]:
        """The samples and the compiled prunings of all sites."""
        from moqc.calibrate.skipping import Skipping

        skipping = Skipping.of(
            ctx.need("checkpoint", self.name),
            ctx.need("calibration", self.name),
            ctx.need("workspace", self.name),
        )
        share = self.share or skipping.share_for(self.rule, self.loss, SHARES)
        prunings = skipping.prunings(self.rule, share)
        return skipping.samples, {s: p for s, p in prunings.items() if isinstance(p, SitePruning)}

    def _report(self, report: dict[str, Any]) -> None:
        chosen, kept = (sum(sum(entry[name]) for entry in report.values()) for name in ("chosen", "kept"))
        cold = sum(len(entry["cold"]) for entry in report.values())
        logger.info(
            "%s: %.1f %% of the experts' work is skipped on calibration text; %d experts are never kept",
            self.rule,
            100 * (1 - kept / max(chosen, 1)),
            cold,
        )


def _prefix(site: str) -> str:
    """Parameters of the pruning are not the experts': they have a name beside the block's."""
    return ".".join(part for part in (site.rpartition(".")[0], "pruning") if part)


def _coverage(sample: RoutingSample, pruning: SitePruning) -> dict[str, Any]:
    keep = sample.keep(pruning)
    skipped = 1 - int(keep.sum()) / max(keep.numel(), 1)

    def count(ids: Tensor) -> list[int]:
        found: list[int] = torch.bincount(ids.flatten(), minlength=sample.experts).tolist()
        return found

    return {
        "skipped_ppm": round(skipped * 1e6),
        "chosen": count(sample.ids),
        "kept": count(sample.ids[keep]),
    }


def _without(pruning: SitePruning, cold: list[int]) -> SitePruning:
    """`pruning` that never keeps the experts `cold`."""
    strength = pruning.strength.clone()
    strength[cold] = 0
    return replace(pruning, strength=strength)


def _demote(mod: IRModule, cold: dict[str, list[int]]) -> IRModule:
    """BITS with the experts `cold` in the smallest format that the plan uses."""
    plan = BITS.of(mod)
    used = {name for projections in plan.values() for names in projections.values() for name in names}
    smallest = min(used, key=lambda name: Format.parse(name).stored_bits(1024, 1024))
    for site, experts in cold.items():
        for names in plan[site].values():
            for expert in experts:
                names[expert] = smallest
    return BITS.put(mod, plan)


def _rewrite(mod: IRModule, prunings: dict[str, SitePruning]) -> IRModule:
    """`mod` with the routing of every block in `prunings` pruned."""
    rewrite = Rewrite()
    positions = list(mod["main"].params)[1]
    for variable, call in bindings(mod["main"]):
        if not ops.is_call(call, ops.EXPERTS, ops.MIXED_EXPERTS):
            continue
        site = ops.attributes(call)["site"]
        pruning = prunings[site]
        named = ops.operands(call)
        strength = relax.TensorType([len(pruning.strength)], "float32")
        added = {"strength": strength, "limits": relax.TensorType([3], "float32")}
        if pruning.slopes is not None:
            added["slopes"] = relax.TensorType(list(pruning.slopes.shape), "float16")
        tensors = {f"{_prefix(site)}.{name}": ty for name, ty in added.items()}
        new = {name: new_parameter(name, ty) for name, ty in tensors.items()}
        rewrite.added |= new
        tokens = named["x"].ty.shape[0]
        flat = relax.op.reshape(positions, relax.ShapeExpr([tokens]))
        pruned = ops.prune_routing(
            named["x"],
            named["ids"],
            named["weights"],
            bind_before(rewrite, variable, flat, "places"),
            *new.values(),
            site=site,
            rule=pruning.kind,
            exponent=repr(pruning.exponent),
            renormalize=int(pruning.renormalize),
            first=pruning.first,
            operands=list(added),
        )
        both = bind_before(rewrite, variable, pruned, "pruned")
        routing = [
            bind_before(rewrite, variable, relax.TupleGetItem(both, number), name)
            for number, name in enumerate(("kept_ids", "kept_weights"))
        ]
        rewrite.values[variable] = relax.Call(
            call.op, [named["x"], *routing, *list(call.args)[3:]], attrs=call.attrs
        )
    return apply_rewrite(mod, rewrite)
