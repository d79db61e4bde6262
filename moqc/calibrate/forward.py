"""The reference run of a quantized model, a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.store import ExpertStore
from moqc.calibrate.stream import ExpertsFunction, computed, split_batches
from moqc.frontend.checkpoint import Checkpoint
from moqc.quant.reference import Activations
from moqc.quant.tensor import Quantized


def reference_forward(
    checkpoint: Checkpoint,
    tokens: Tensor,
    store: ExpertStore | None = None,
    *,
    activations: Activations = "float",
    linears: Mapping[str, Quantized] | None = None,
) -> Iterator[Tensor]:
    """Logits float32 [n, window, vocabulary] of batches of `tokens` int64 [N, window], in order, on the CPU.

    Experts come from `store` (None: the original ones), other linears and embeddings from `linears` (site ->
    matrix) where given. `activations` "int8" quantizes the inputs of what is quantized, and of nothing else.
    """
    batches = split_batches(tokens)
    for logits in reference_logits(checkpoint, batches, store, activations=activations, linears=linears):
        yield logits.cpu()


def reference_logits(
    checkpoint: Checkpoint,
    batches: Sequence[Tensor],
    store: ExpertStore | None = None,
    *,
    activations: Activations = "float",
    linears: Mapping[str, Quantized] | None = None,
) -> Iterator[Tensor]:
    """As `reference_forward`, for batches of any windows, on `compute_device()`."""
    model = overridden(checkpoint, linears or {}, activations)
    stream = model.start(batches)
    for index in range(model.layer_count):
        experts = experts_function(model, index, store, activations)
        with model.layer(index) as layer:
            layer.run(stream, experts)
    yield from model.logits(stream)


def overridden(
    checkpoint: Checkpoint, linears: Mapping[str, Quantized], activations: Activations = "float"
) -> LayeredModel:
    """The model with the matrices `linears` (site -> matrix) in place of its own."""
    replaced = {f"{site}.weight": matrix for site, matrix in linears.items()}

    def override(name: str) -> Tensor | None:
        return replaced[name].dequantize() if name in replaced else None

    return LayeredModel(checkpoint, override=override, activations=activations)


def experts_function(
    model: LayeredModel, index: int, store: ExpertStore | None, activations: Activations
) -> ExpertsFunction:
    """Layer `index` with the experts of `store`, or with the original ones."""
    if store is None:
        return model.original_experts(index)
    blocks = {site: store.block(site, model.experts(site)) for site in model.sites(index)}
    return computed(blocks, activations)
