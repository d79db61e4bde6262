"""Multimodal checkpoints: the language model inside is taken out, what is around it stays where it is.

transformers' wrappers hold a configuration, a decoder and a head of a language model that it also has a class
of its own for. The model that moqc compiles is of that class; the wrapper, without weights, only tells which
stored tensors are whose.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moqc.errors import ModelError
from moqc.frontend.skeleton import CONFIG_ERRORS, first_line


def language_config(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """The configuration of the language model in `config`; `config` itself where that is no wrapper.

    Raises ModelError for a wrapper whose language model has no class of its own.
    """
    if "text_config" not in (config.sub_configs or {}):
        return config
    text = config.get_text_config(decoder=True)
    if text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{config.model_type}: transformers {transformers.__version__} has no language model of its own "
            f"for the text part of this multimodal model ({text.model_type}), so it cannot be taken out"
        )
    text.dtype = text.dtype or config.dtype
    text.tie_word_embeddings = bool(text.tie_word_embeddings or getattr(config, "tie_word_embeddings", False))
    return text


def is_wrapper(config: transformers.PretrainedConfig) -> bool:
    """Whether a checkpoint of `config` holds more than the language model."""
    if language_config(config) is config:
        return False
    own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[language_config(config).model_type]
    return own not in (config.architectures or ())


def build_wrapper(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """The whole multimodal model of `config` on the meta device. Raises ModelError."""
    auto: Any = transformers.AutoModelForImageTextToText
    try:
        with torch.device("meta"):
            wrapper: transformers.PreTrainedModel = auto.from_config(deepcopy(config), dtype=torch.float32)
    except CONFIG_ERRORS as error:
        raise ModelError(
            f"transformers cannot build a {config.model_type} model: {first_line(error)}"
        ) from error
    return wrapper


def names_inside(
    wrapper: transformers.PreTrainedModel, model: transformers.PreTrainedModel
) -> dict[str, str]:
    """Parameter or buffer of the language model `model` -> its name in `wrapper`.

    Raises ModelError where `wrapper` does not have exactly one of each part of `model`.
    """
    found: dict[str, str] = {}
    for name, part in model.named_children():
        places = [
            place
            for place, module in wrapper.named_modules()
            if type(module) is type(part) and (place.rpartition(".")[2] == name or len(part.state_dict()) > 1)
        ]
        if len(places) != 1:
            raise ModelError(
                f"{wrapper.config.model_type}: has {len(places)} parts like {name} of its language model"
            )
        found |= {f"{name}.{leaf}": f"{places[0]}.{leaf}" for leaf in part.state_dict()}
    return found
