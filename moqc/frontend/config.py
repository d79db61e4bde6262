"""Read the configuration of a model folder."""

from __future__ import annotations

from pathlib import Path

import transformers
from huggingface_hub.errors import StrictDataclassError

from moqc.errors import ModelError
from moqc.frontend.coded import read_coding
from moqc.frontend.shards import read_json
from moqc.frontend.skeleton import first_line
from moqc.frontend.wrappers import is_wrapper, language_config


def read_config(path: Path) -> transformers.PretrainedConfig:
    """The configuration of a model folder. Raises ModelError; also for weights in a coding not known."""
    if path.suffix == ".gguf" or (
        path.is_dir() and not list(path.glob("*.safetensors")) and list(path.glob("*.gguf"))
    ):
        raise ModelError(
            f"{path}: GGUF files are not read; give the folder with the safetensors files they were made from"
        )
    if not path.is_dir():
        what = "not a folder" if path.exists() else "no such folder"
        raise ModelError(f"{path}: {what}; a model is a folder with config.json and safetensors files")
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(
            f"{path}: no config.json; a model is a folder with config.json and safetensors files"
        )
    read_coding(path)
    return parse_config(path, str(file))


def parse_config(folder: Path, origin: str) -> transformers.PretrainedConfig:
    """The ``config.json`` of `folder`, whatever else is there; of a multimodal model, its language model's.

    Raises ModelError, naming `origin`.
    """
    return language_config(_parse(folder, origin))


def wrapper_config(folder: Path) -> transformers.PretrainedConfig | None:
    """The whole configuration where `folder` holds a multimodal model, else None. Raises ModelError."""
    config = _parse(folder, str(folder))
    return config if is_wrapper(config) else None


def _parse(folder: Path, origin: str) -> transformers.PretrainedConfig:
    try:
        config: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        # Weights are decoded as they are read: the model itself is an ordinary one.
        config.__dict__.pop("quantization_config", None)
        return config
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OSError,
        ImportError,
        StrictDataclassError,
    ) as error:
        kind = read_json(folder / "config.json").get("model_type", "an unnamed model_type")
        raise ModelError(
            f"{origin}: transformers {transformers.__version__} cannot read this configuration of {kind}: "
            f"{first_line(error)}"
        ) from error
