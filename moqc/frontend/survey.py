"""The survey: every decoder type of the installed transformers that has experts, through the gate.

The types are found, not listed: those that transformers maps to a causal language model and whose modeling
code has a class of experts. Each is verified on the default configuration of its class, shrunk, with what the
default leaves off (windows, expert layers, hybrid layers) switched on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moqc.errors import ModelError, UserError
from moqc.frontend.gate import Verdict
from moqc.frontend.shrink import WINDOW
from moqc.frontend.skeleton import CONFIG_ERRORS, first_line
from moqc.log import logger

_EXPERTS_CLASS = re.compile(r"^@use_experts_implementation|^class \w*Experts?\w*\(nn", re.MULTILINE)
_TABLE = "models.json"

# What the default configuration of a class leaves off, or cannot be built without.
_SWITCHES: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "dots1": {
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "layer_types": ["full_attention", "sliding_attention"],
        "num_hidden_layers": 2,
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 64, "moe_topk": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_5_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
        }
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
}


@dataclass(frozen=True, slots=True)
class Row:
    """What the gate says about one type: `status` is ``exact`` or ``refused``, `reason` why refused."""

    model_type: str
    status: str
    reason: str


@dataclass(frozen=True, slots=True)
class Survey:
    """Rows of all types, and the version of transformers that they are about."""

    transformers: str
    rows: tuple[Row, ...]

    def dump(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {"transformers": self.transformers, "rows": [asdict(row) for row in self.rows]}


def shipped() -> Survey:
    """The survey that moqc ships, made by ``moqc models --verify all``."""
    content = json.loads(files("moqc.frontend").joinpath(_TABLE).read_text(encoding="utf-8"))
    return Survey(content["transformers"], tuple(Row(**row) for row in content["rows"]))


def decoder_types() -> tuple[str, ...]:
    """Types of causal language models with experts, in alphabetical order; a wrapper by its text model."""
    root = Path(transformers.__file__).parent / "models"
    found = []
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        module = model_type_to_module_name(name)
        file = root / module / f"modeling_{module}.py"
        if file.is_file() and _EXPERTS_CLASS.search(file.read_text(encoding="utf-8")):
            found.append(name)
    return tuple(sorted(name for name in found if f"{name}_text" not in found))


def example_config(model_type: str) -> transformers.PretrainedConfig:
    """The default configuration of a type with its switches on. Raises UserError for a type there is not."""
    if model_type not in CONFIG_MAPPING:
        version = transformers.__version__
        raise UserError(f"unknown model type {model_type!r}: transformers {version} has none called so")
    try:
        config = CONFIG_MAPPING[model_type](**_SWITCHES.get(model_type, {}))
    except CONFIG_ERRORS as error:
        raise ModelError(
            f"{model_type}: transformers cannot build its default configuration: {first_line(error)}"
        ) from error
    if getattr(config, "sliding_window", WINDOW) is None:
        config.sliding_window = WINDOW
    return config


def survey(types: Iterable[str], verify: Callable[[transformers.PretrainedConfig], Verdict]) -> Survey:
    """The rows of `types`, verified now by `verify`, the gate."""
    return Survey(transformers.__version__, tuple(_row(model_type, verify) for model_type in types))


def _row(model_type: str, verify: Callable[[transformers.PretrainedConfig], Verdict]) -> Row:
    logger.info("verifying %s", model_type)
    try:
        verify(example_config(model_type))
    except ModelError as error:
        reason = str(error).removeprefix(f"{model_type}: ").removeprefix("refused: ")
        return Row(model_type, "refused", reason)
    return Row(model_type, "exact", "")
