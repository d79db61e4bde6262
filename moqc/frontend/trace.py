"""What a model's blocks and matrices are, from its configuration alone: one token through fake tensors.

The hooked skeleton is run once without data, and the calls of moqc's operators and of torch's linear and
embedding functions are noted with the shapes of their operands. That takes a second or two for models of
hundreds of gigabytes, and knows no architecture: what is seen is what an export would see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from moqc.errors import ModelError
from moqc.frontend import masks
from moqc.frontend.experts import ExpertLayout
from moqc.frontend.hooks import hook
from moqc.frontend.skeleton import build_skeleton, fake_parameters, first_line
from moqc.quant.kv_cache import stored_bytes


@dataclass(frozen=True, slots=True)
class ExpertsUse:
    """One experts block and how many of its experts a token takes."""

    layout: ExpertLayout
    top_k: int


@dataclass(frozen=True, slots=True)
class AttentionUse:
    """One attention block: key/value heads with their widths, query heads, and the window (0: none)."""

    site: str
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    window: int

    @property
    def element_count(self) -> int:
        """Elements that a token adds to the key and value caches."""
        return self.kv_heads * (self.key_width + self.value_width)

    def cache_bytes(self, dtype: str) -> int:
        """Bytes that a token adds to caches of `dtype`."""
        return self.kv_heads * (stored_bytes(dtype, self.key_width) + stored_bytes(dtype, self.value_width))


@dataclass(frozen=True, slots=True)
class MatrixUse:
    """A two-dimensional weight that linears or embeddings read; `names` are all names it is tied to.

    `router` tells that it decides which experts run.
    """

    names: tuple[str, ...]
    rows: int
    columns: int
    linear: bool
    embedding: bool
    router: bool


@dataclass(frozen=True, slots=True)
class Outline:
    """A model without its weights. `other_weights` counts what is neither in an expert nor in a matrix."""

    model_type: str
    layers: int
    experts: tuple[ExpertsUse, ...]
    attention: tuple[AttentionUse, ...]
    matrices: tuple[MatrixUse, ...]
    other_weights: int
    vocabulary: int
    hidden: int
    context: int | None
    dtype: str
    """The dtype the configuration states for stored weights; float32 where it states none."""


def outline(config: transformers.PretrainedConfig, *, latent: bool = False) -> Outline:
    """The outline of the model of `config`, with its attention `latent` as in `moqc.frontend.hooks.hook`.

    Raises ModelError for a model moqc cannot hook or trace.
    """
    model = build_skeleton(config)
    layouts = {layout.site: layout for layout in hook(model, latent=latent)}
    fake_parameters(model)
    names = _names(model)
    calls = _run(model)
    experts = tuple(ExpertsUse(layouts[site], top_k) for site, top_k in calls.experts.items())
    blocks = {site.rpartition(".")[0]: layout.experts for site, layout in layouts.items()}
    matrices = tuple(_matrix(names[weight], weight, calls, blocks) for weight in calls.weights)
    counted = {weight for weight in calls.weights} | {
        parameter
        for layout in layouts.values()
        for operand in layout.projections
        for parameter in (model.get_parameter(f"{layout.site}.{operand}"),)
    }
    text = config.get_text_config()
    return Outline(
        model_type=config.model_type,
        layers=int(text.num_hidden_layers),
        experts=experts,
        attention=tuple(calls.attention.values()),
        matrices=matrices,
        other_weights=sum(parameter.numel() for parameter in names if parameter not in counted),
        vocabulary=int(text.vocab_size),
        hidden=int(text.hidden_size),
        context=getattr(text, "max_position_embeddings", None),
        dtype=_dtype(config),
    )


def _dtype(config: transformers.PretrainedConfig) -> str:
    stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return str(stated or torch.float32).removeprefix("torch.")


def _names(model: torch.nn.Module) -> dict[torch.nn.Parameter, list[str]]:
    """Parameter -> its names; a tied one has several."""
    found: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    return found


def _matrix(names: list[str], weight: torch.nn.Parameter, calls: _Calls, blocks: dict[str, int]) -> MatrixUse:
    """A router is told by its place beside an experts module and by one row for each expert."""
    rows, columns = weight.shape
    router = any(
        rows == experts and names[0].startswith(f"{block}.") and "shared" not in names[0]
        for block, experts in blocks.items()
    )
    return MatrixUse(tuple(names), rows, columns, weight in calls.linears, weight in calls.embeddings, router)


class _Calls(TorchFunctionMode):
    """Notes the calls of interest that are made inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linears: set[torch.nn.Parameter] = set()
        self.embeddings: set[torch.nn.Parameter] = set()
        self.weights: dict[torch.nn.Parameter, None] = {}
        self.experts: dict[str, int] = {}
        self.attention: dict[str, AttentionUse] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note the call, then make it."""
        if function is torch.nn.functional.linear:
            self._note(args[1], self.linears)
        elif function is torch.nn.functional.embedding:
            self._note(args[1], self.embeddings)
        elif function is torch.ops.moqc.experts:
            self.experts[args[9]] = int(args[1].shape[-1])
        elif function is torch.ops.moqc.attention:
            q, k, v, _, site, _, window = args[:7]
            self.attention[site] = AttentionUse(
                site, q.shape[1], k.shape[1], k.shape[3], v.shape[3], int(window)
            )
        return function(*args, **(kwargs or {}))

    def _note(self, weight: Any, group: set[torch.nn.Parameter]) -> None:
        if isinstance(weight, torch.nn.Parameter) and weight.dim() == 2:
            group.add(weight)
            self.weights[weight] = None


def _run(model: transformers.PreTrainedModel) -> _Calls:
    """One token through `model`, whose parameters are fake. Raises ModelError where its code fails."""
    calls = _Calls()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ids, positions = (torch.zeros(1, 1, dtype=torch.int64) for _ in range(2))
        try:
            with calls, masks.unpacked():
                model(input_ids=ids, position_ids=positions, use_cache=False)
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise ModelError(f"{model.config.model_type}: cannot be traced: {first_line(error)}") from error
    return calls
