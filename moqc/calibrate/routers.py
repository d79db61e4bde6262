"""Routers that follow the original model's routing although earlier layers are quantized.

Two streams run side by side: the original model, and the one with quantized experts and the routers changed
so far. In each layer the router is moved, in closed form (`moqc.quant.ridge`), to give the original's logits
for the inputs that it really sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moqc.calibrate.capture import Batches
from moqc.calibrate.forward import experts_function
from moqc.calibrate.layers import LayeredModel, LoadedLayer
from moqc.calibrate.store import ExpertStore
from moqc.calibrate.stream import ExpertsCall, ExpertsFunction, Stream
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace, digest
from moqc.errors import PipelineError
from moqc.frontend.checkpoint import Checkpoint
from moqc.log import track
from moqc.quant.ridge import boundary_shares, ridge_update

VERSION = 1
"""Of the procedure; part of the cache key."""


@dataclass(frozen=True)
class RouterUpdate:
    """A new router weight, float16 [E, H].

    `before` and `after`: share of the experts chosen by the original model that are chosen with quantized
    experts too, with the old and with the new weight of this router.
    """

    weight: Tensor
    before: float
    after: float


def recalibrate_routers(
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    workspace: Workspace,
    store: ExpertStore,
    routers: Sequence[str],
    *,
    damping: float,
) -> dict[str, RouterUpdate]:
    """The updates of `routers` (module names such as ``model.layers.0.mlp.gate``) for the experts of `store`.

    Cached in the workspace. Raises PipelineError for a router that is not a module with a weight [E, H].
    """
    key = digest(
        "routers",
        VERSION,
        [checkpoint.fingerprint, calibration.fingerprint],
        list(store.keys.values()),
        list(routers),
        damping,
    )
    if not workspace.has(key):
        model = LayeredModel(checkpoint)
        found = _Walk(model, store, damping).run(calibration, routers)
        tensors = {f"{name}.weight": update.weight for name, update in found.items()}
        shares = {f"{n}.agreement": torch.tensor([u.before, u.after]) for n, u in found.items()}
        workspace.save_tensors(key, tensors | shares)
    stored = workspace.load_tensors(key)
    return {
        name: RouterUpdate(stored[f"{name}.weight"], *stored[f"{name}.agreement"].tolist())
        for name in routers
    }


@dataclass
class RouterProbe:
    """An experts function that notes the routing of its calls, and a hook that notes a router's input."""

    experts: ExpertsFunction
    ids: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)

    def __call__(self, call: ExpertsCall) -> Tensor:
        """Note the experts chosen, int64 [T, k], and compute their output."""
        self.ids.append(call.ids)
        return self.experts(call)

    def hook(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note the router's input, float32 [T, H]."""
        self.inputs.append(args[0].reshape(-1, args[0].shape[-1]).float())


def observe(layer: LoadedLayer, router: nn.Module, stream: Stream, experts: ExpertsFunction) -> RouterProbe:
    """What the layer routes, without moving `stream` on."""
    probe = RouterProbe(experts)
    handle = router.register_forward_pre_hook(probe.hook)
    try:
        layer.run(stream, probe, keep=False)
    finally:
        handle.remove()
    return probe


def router_weight(layer: LoadedLayer, name: str, user: str) -> Tensor:
    """The weight [E, H] of the router `name`; PipelineError, in the name of the pass `user`, without one."""
    weight = getattr(layer.submodule(name), "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise PipelineError(f"{user}: {name} has no weight [experts, hidden]")
    return weight


@dataclass
class _Walk:
    model: LayeredModel
    store: ExpertStore
    damping: float

    @torch.no_grad()
    def run(self, calibration: CalibrationSet, routers: Sequence[str]) -> dict[str, RouterUpdate]:
        model = self.model
        clean = model.start(Batches.of(calibration).tokens)
        quantized = clean.fork()
        updates: dict[str, RouterUpdate] = {}
        for index in track(range(model.layer_count), "recalibrating routers"):
            original = model.original_experts(index)
            experts = experts_function(model, index, self.store, "float")
            with model.layer(index) as layer:
                for name in routers:
                    if model.owns(index, name):
                        updates[name] = self._update(layer, name, clean, quantized, original, experts)
                layer.run(quantized, experts)
            # The weights of the layer are the original ones again.
            with model.layer(index) as layer:
                layer.run(clean, original)
        missing = [name for name in routers if name not in updates]
        if missing:
            raise PipelineError(f"recalibrate-router: {missing[0]} is in no decoder layer")
        return updates

    def _update(
        self,
        layer: LoadedLayer,
        name: str,
        clean: Stream,
        quantized: Stream,
        original: ExpertsFunction,
        experts: ExpertsFunction,
    ) -> RouterUpdate:
        module, weight = layer.submodule(name), router_weight(layer, name, "recalibrate-router")
        right = observe(layer, module, clean, original)
        before = observe(layer, module, quantized, experts)
        wanted = torch.cat(right.inputs) @ weight.T
        shares = boundary_shares(wanted, right.ids[0].shape[1])
        new = ridge_update(weight, torch.cat(before.inputs), wanted, shares, self.damping).half()
        module.weight = nn.Parameter(new.float(), requires_grad=False)
        after = observe(layer, module, quantized, experts)
        agreements = [_agreement(right.ids, found.ids) for found in (before, after)]
        return RouterUpdate(new.cpu(), *agreements)


def _agreement(right: list[Tensor], found: list[Tensor]) -> float:
    """Mean share of a token's right experts [T, k] that are among those found."""
    hits, pairs = 0, 0
    for wanted, given in zip(right, found, strict=True):
        hits += int((wanted[:, :, None] == given[:, None, :]).any(2).sum())
        pairs += wanted.numel()
    return hits / max(pairs, 1)
