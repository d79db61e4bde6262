"""The source model, run one decoder layer at a time with its weights streamed from the checkpoint.

`LayeredModel` keeps the Hugging Face model on the meta device. Only the layer being run has real weights
(float32), so a model of any size needs the memory of one layer plus the activations of the calibration
tokens. The experts blocks are not run by transformers: they are calls to a function given by the caller,
which is how inputs are captured and quantized weights are tried. Everything else is the model's own eager
code, the oracle for the rest of moqc.

How the arguments of a layer are found without knowing the architecture: the model runs once with every layer
replaced by a stub that hands its input through and keeps the other arguments (masks, rotary embeddings, ...).
The head works the same way: the last stub returns the final hidden states, and the model does what it does
after its last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from moqc.calibrate.experts import ExpertWeights
from moqc.calibrate.stream import ExpertsCall, ExpertsFunction, Stream, computed
from moqc.calibrate.stubs import ExpertsStub, LayerStub
from moqc.errors import ModelError
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.skeleton import build_skeleton
from moqc.quant import reference
from moqc.quant.device import compute_device
from moqc.quant.reference import Activations

Override: TypeAlias = Callable[[str], "Tensor | None"]
"""In-model parameter name -> float32 tensor to use instead of the checkpoint's, or None."""


class LayeredModel:
    """A checkpoint's model, layer by layer, in float32, on `compute_device()`.

    `override` substitutes weights of anything but the experts, by parameter name. A substituted `nn.Linear`
    is computed by `quant.reference.linear`, with its input quantized too if `activations` is "int8".
    Raises ModelError when the model has no list of decoder layers around its experts blocks.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, override: Override | None = None, activations: Activations = "float"
    ) -> None:
        self.checkpoint = checkpoint
        self.activations = activations
        self.device = compute_device()
        self._override = override or (lambda name: None)
        # Not `checkpoint.meta_model()`: its hooks are for export, the model's own attention is the reference.
        self._model = build_skeleton(checkpoint.config)
        _place_buffers(self._model, self.device)
        self.layouts = {layout.site: layout for layout in checkpoint.layouts}
        self._prefix, self._layers = _decoder_layers(self._model, list(self.layouts))
        self._call: ExpertsFunction | None = None
        self._batch = 0
        for site in self.layouts:
            parent, _, name = site.rpartition(".")
            block = ExpertsStub(self.layouts[site], self._model.get_submodule(site), self._run_experts)
            setattr(self._model.get_submodule(parent), name, block)
        self._real_layers = list(self._layers)

    @property
    def layer_count(self) -> int:
        """Number of decoder layers."""
        return len(self._real_layers)

    def sites(self, layer: int) -> list[str]:
        """Sites of the experts blocks in decoder layer `layer`, in the order of its modules."""
        prefix = f"{self._prefix}.{layer}."
        return [site for site in self.layouts if site.startswith(prefix)]

    def owns(self, layer: int, name: str) -> bool:
        """Whether the module or parameter `name` belongs to decoder layer `layer`."""
        return name.startswith(f"{self._prefix}.{layer}.")

    def experts(self, site: str) -> ExpertWeights:
        """The original weights of one experts block, canonical, float32, on `device`."""
        return ExpertWeights.load(self.checkpoint, self.layouts[site], self.device)

    @torch.no_grad()
    def start(self, batches: Sequence[Tensor]) -> Stream:
        """Embed the token batches (int64 [n, window] each)."""
        stubs = self._stub_layers()
        stream = Stream([tokens.to(self.device) for tokens in batches], [], [])
        base = self._model.base_model
        with self._outer(base):
            for tokens in stream.tokens:
                base(**_inputs(tokens))
                stream.hidden.append(stubs[0].hidden)
                stream.arguments.append([stub.arguments for stub in stubs])
        return stream

    @contextmanager
    def layer(self, index: int) -> Iterator[LoadedLayer]:
        """Load decoder layer `index` for the duration of the block."""
        module = self._real_layers[index]
        with self._materialized(f"{self._prefix}.{index}", module):
            yield LoadedLayer(self, index, module)

    @torch.no_grad()
    def logits(self, stream: Stream) -> Iterator[Tensor]:
        """Logits float32 [n, window, vocabulary] of each batch, after all layers have run."""
        stubs = self._stub_layers()
        with self._outer(self._model):
            for tokens, hidden in zip(stream.tokens, stream.hidden, strict=True):
                stubs[-1].output = hidden
                yield self._model(**_inputs(tokens)).logits.float()

    def loss_gradients(self, stream: Stream) -> list[Tensor]:
        """Gradients of the summed next-token cross entropy with respect to the final `stream.hidden`."""
        stubs = self._stub_layers()
        found: list[Tensor] = []
        with self._outer(self._model), torch.enable_grad():
            for tokens, hidden in zip(stream.tokens, stream.hidden, strict=True):
                leaf = hidden.detach().requires_grad_()
                stubs[-1].output = leaf
                logits = self._model(**_inputs(tokens)).logits.float()[:, :-1].flatten(0, 1)
                loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
                found += torch.autograd.grad(loss, [leaf])
        return found

    def forward(self, batches: Sequence[Tensor], experts: ExpertsFunction | None = None) -> Stream:
        """Run all layers; `experts` defaults to the original weights."""
        stream = self.start(batches)
        for index in range(self.layer_count):
            with self.layer(index) as layer:
                layer.run(stream, experts or self.original_experts(index))
        return stream

    def original_experts(self, index: int) -> ExpertsFunction:
        """An experts function with the original weights of the sites of layer `index`."""
        return computed({site: self.experts(site) for site in self.sites(index)})

    def _run_experts(self, site: str, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self._call is None:
            raise ModelError(f"{site}: an experts block outside the decoder layers is not supported")
        return self._call(ExpertsCall(site, self._batch, x, ids, weights))

    def _stub_layers(self) -> list[LayerStub]:
        stubs = [LayerStub(layer) for layer in self._real_layers]
        for index, stub in enumerate(stubs):
            self._layers[index] = stub
        return stubs

    @contextmanager
    def _outer(self, module: nn.Module) -> Iterator[None]:
        """Real weights for `module` except its decoder layers, which are stubs at this point."""
        name = next(name for name, candidate in self._model.named_modules() if candidate is module)
        with self._materialized(name, module):
            yield

    @contextmanager
    def _materialized(self, prefix: str, root: nn.Module) -> Iterator[None]:
        undo: list[Callable[[], None]] = []
        try:
            for path, module in root.named_modules(prefix=prefix):
                for name in _stored(module):
                    undo.append(self._materialize(module, name, f"{path}.{name}" if path else name))
            yield
        finally:
            for restore in undo:
                restore()

    def _materialize(self, module: nn.Module, name: str, full: str) -> Callable[[], None]:
        table: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        before = table[name]
        substitute = self._override(full)
        tensor = self.checkpoint.load(full) if substitute is None else substitute
        tensor = (tensor.float() if tensor.is_floating_point() else tensor).to(self.device)
        is_parameter = table is module._parameters
        table[name] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        if substitute is not None and name == "weight" and isinstance(module, nn.Linear):
            vars(module)["forward"] = partial(_linear, module, self.activations)

        def restore() -> None:
            table[name] = before
            vars(module).pop("forward", None)

        return restore


@dataclass(frozen=True)
class LoadedLayer:
    """A decoder layer whose weights are in memory."""

    model: LayeredModel
    index: int
    module: nn.Module

    def submodule(self, name: str) -> nn.Module:
        """A module inside this layer, by its name in the model."""
        return self.model._model.get_submodule(name)

    @torch.no_grad()
    def run(self, stream: Stream, experts: ExpertsFunction, *, keep: bool = True) -> None:
        """Run all batches of `stream`, experts blocks computed by `experts`.

        The stream advances to the next layer, unless `keep` is False: then only `experts` sees what happens.
        """
        for batch in range(len(stream.hidden)):
            before = stream.hidden[batch]
            self._run_batch(stream, batch, experts)
            if not keep:
                stream.hidden[batch] = before

    def _run_batch(self, stream: Stream, batch: int, experts: ExpertsFunction) -> None:
        self.model._call, self.model._batch = experts, batch
        try:
            args, kwargs = stream.arguments[batch][self.index]
            output = self.module(stream.hidden[batch], *args, **kwargs)
        finally:
            self.model._call = None
        if not isinstance(output, Tensor):
            raise ModelError(
                f"decoder layer {self.index} ({type(self.module).__name__}) returns "
                f"{type(output).__name__}, not one tensor: calibration does not support it"
            )
        stream.hidden[batch] = output

    @contextmanager
    def replaced(self, site: str, weight: Tensor) -> Iterator[None]:
        """The layer with another `weight` in its module `site` (full name), for the duration of the block."""
        module = self.module.get_submodule(site.removeprefix(f"{self.model._prefix}.{self.index}."))
        before = module._parameters["weight"]
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        try:
            yield
        finally:
            module._parameters["weight"] = before

    def pull_back(
        self, stream: Stream, gradients: Sequence[Tensor], experts: ExpertsFunction
    ) -> list[Tensor]:
        """Gradients with respect to the layer's inputs `stream.hidden`, from those of its outputs.

        Tensors that `experts` returns get their gradients too, if they ask for it.
        """
        leaves = [hidden.detach().requires_grad_() for hidden in stream.hidden]
        run = Stream(stream.tokens, list(leaves), stream.arguments)
        found = []
        # A batch at a time, so that memory holds the graph of one.
        for batch, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            with torch.enable_grad():
                self._run_batch(run, batch, experts)
            torch.autograd.backward(run.hidden[batch], gradient)
            run.hidden[batch] = leaf
            if leaf.grad is None:
                raise ModelError(
                    f"decoder layer {self.index} gives no gradient: its output ignores its input"
                )
            found.append(leaf.grad)
        return found


def _inputs(tokens: Tensor) -> dict[str, Any]:
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
    return {"input_ids": tokens, "position_ids": positions, "use_cache": False}


def _place_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers that are computed, not loaded, to `device`; parameters stay on the meta device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def _stored(module: nn.Module) -> list[str]:
    """Names of the parameters and persistent buffers `module` owns itself."""
    parameters = [name for name, value in module._parameters.items() if value is not None]
    buffers = [name for name, value in module._buffers.items() if value is not None]
    return parameters + [name for name in buffers if name not in module._non_persistent_buffers_set]


def _linear(module: nn.Linear, activations: Activations, x: Tensor) -> Tensor:
    return reference.linear(x, module.weight, module.bias, activations=activations)


def _decoder_layers(model: nn.Module, sites: list[str]) -> tuple[str, nn.ModuleList]:
    """Name and module of the list of decoder layers: the outermost list with every experts block inside."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(site.startswith(f"{name}.") for site in sites):
            return name, module
    raise ModelError(f"no list of decoder layers holds every experts block ({sites[0]}, ...)")
