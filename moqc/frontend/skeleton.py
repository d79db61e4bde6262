"""A transformers model without its weights: parameters on the meta device, computed buffers real."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch._subclasses.fake_tensor import FakeTensorMode

from moqc.errors import ModelError

CONFIG_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ImportError,
    RuntimeError,
    IndexError,
    ZeroDivisionError,
    StrictDataclassError,
)
"""What the code of a configuration or of a model's constructor raises at fields that do not fit together."""


def build_skeleton(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """The causal language model of `config` in float32, eval mode, with meta parameters.

    Buffers that are not in checkpoints (rotary frequencies) get their values from the model's own
    initializer, as in `from_pretrained`. Raises ModelError when transformers cannot build the model.
    """
    try:
        with torch.device("meta"):
            model = build_eager(config)
    except CONFIG_ERRORS as error:
        raise ModelError(
            f"transformers cannot build a {config.model_type} model: {first_line(error)}"
        ) from error
    _compute_buffers(model)
    return model


def build_eager(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """Transformers' own model of `config` as written, without caches, in float32 and eval mode."""
    # A copy: a model changes its configuration (hooks, caches).
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(
        deepcopy(config), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    model.config.use_cache = False
    eager: transformers.PreTrainedModel = model.eval()
    return eager


def fake_parameters(model: torch.nn.Module) -> None:
    """Replace meta parameters by fake ones on the CPU: traced code sees ordinary tensors, without memory."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if parameter not in made:  # a tied parameter stays one
                with mode:
                    blank = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[parameter] = torch.nn.Parameter(blank, requires_grad=False)
            module.register_parameter(name, made[parameter])


def first_line(error: BaseException) -> str:
    """Type and first line of an error's text, and the second where the first only announces it."""
    lines = str(error).strip().splitlines()
    text = " ".join(line.strip() for line in lines[: 2 if lines and lines[0].endswith(":") else 1])
    owner = "TVM's " if type(error).__module__.startswith("tvm") else ""
    return f"{owner}{type(error).__name__}: {text}" if text else f"{owner}{type(error).__name__}"


@torch.no_grad()
def _compute_buffers(model: transformers.PreTrainedModel) -> None:
    """Move non-persistent buffers off the meta device and let transformers fill them."""
    owners: dict[str, torch.nn.Module] = {}
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        owners[path] = module = model.get_submodule(path)
        # NaN marks what the initializer leaves alone; integers have no such mark, and -1 is no index.
        blank = float("nan") if buffer.is_floating_point() else -1
        if buffer.dtype != torch.bool:
            module._buffers[leaf] = torch.full(buffer.shape, blank, dtype=buffer.dtype, device="cpu")
    for module in owners.values():
        model._init_weights(module)  # type: ignore[no-untyped-call]
    for name, buffer in model.named_non_persistent_buffers():
        if buffer.is_meta or _is_blank(buffer):
            raise ModelError(
                f"{model.config.model_type}: buffer {name} is computed in the model's constructor only; "
                "moqc cannot rebuild it without loading the model"
            )


def _is_blank(buffer: torch.Tensor) -> bool:
    marks = torch.isnan(buffer) if buffer.is_floating_point() else buffer == -1
    return bool(marks.any())
