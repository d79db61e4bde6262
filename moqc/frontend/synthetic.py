"""A model without a checkpoint: configurations by name, and random weights that are made when asked for."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moqc.errors import ModelError
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.config import parse_config
from moqc.frontend.shards import DTYPES, read_json

SHAPES = "moqc.frontend.shapes"
_DEVIATION = 0.02  # of random matrices, where the configuration has no initializer_range


def shape_names() -> list[str]:
    """Names of the configurations that moqc ships."""
    entries = resources.files(SHAPES).iterdir()
    return sorted(entry.name.removesuffix(".json") for entry in entries if entry.name.endswith(".json"))


def read_declared(config: str | Path, layers: int | None = None) -> dict[str, Any]:
    """The content of a ``config.json``: `config` is its path, its folder, or one of `shape_names`.

    `layers` keeps the first so many layers only. What a checkpoint's own quantization would say is left out:
    random weights have none. Raises ModelError.
    """
    if str(config) in shape_names():
        text = resources.files(SHAPES).joinpath(f"{config}.json").read_text(encoding="utf-8")
        declared: dict[str, Any] = json.loads(text)
    else:
        path = Path(config)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            names = ", ".join(shape_names())
            raise ModelError(f"{config}: no such configuration; give a config.json, its folder, or {names}")
        declared = read_json(file)
    declared.pop("quantization_config", None)
    if layers is not None:
        _cut(declared.get("text_config", declared), layers, str(config))
    return declared


def _cut(declared: dict[str, Any], layers: int, origin: str) -> None:
    """Keep `layers` layers of a configuration, in place."""
    total = declared.get("num_hidden_layers")
    if not isinstance(total, int) or not 1 <= layers <= total:
        raise ModelError(f"{origin}: has {total} layers; it cannot be cut to {layers}")
    for name, value in declared.items():
        if isinstance(value, list) and len(value) == total:
            declared[name] = value[:layers]
    declared["num_hidden_layers"] = layers


def write_metadata(folder: Path, declared: dict[str, Any], origin: str) -> transformers.PretrainedConfig:
    """Write ``config.json`` and a stand-in ``tokenizer.json`` into `folder`; the parsed configuration.

    The tokenizer has one token a byte; the other ids of the vocabulary are words nobody writes.
    Raises ModelError when transformers cannot read the configuration.
    """
    text = json.dumps(declared, indent=1, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    config = parse_config(folder, origin)
    vocabulary = config.get_text_config().vocab_size
    words = [
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(f"<{index}>" for index in range(256, vocabulary)),
    ]
    tokens = {word: index for index, word in enumerate(words[:vocabulary])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    return config


def stored_dtype(config: transformers.PretrainedConfig) -> torch.dtype:
    """What a checkpoint of `config` stores its weights in: its dtype, or bfloat16."""
    declared = (config.dtype, getattr(config.get_text_config(), "dtype", None))
    return next((dtype for dtype in DTYPES.values() if dtype in declared), torch.bfloat16)


def random_weight(
    name: str, shape: tuple[int, ...], config: transformers.PretrainedConfig, seed: int
) -> torch.Tensor:
    """Random values for the weight `name`, in the stored dtype; equal arguments give equal values.

    Matrices and biases are normal with the configuration's ``initializer_range`` as deviation; the weights of
    norms (one axis) are 1.
    """
    tensor = torch.empty(shape, dtype=stored_dtype(config))
    if len(shape) == 1 and name.endswith("weight"):
        return tensor.fill_(1.0)
    deviation = getattr(config.get_text_config(), "initializer_range", None) or _DEVIATION
    return tensor.normal_(0.0, deviation, generator=torch.Generator().manual_seed(name_seed(name, seed)))


def name_seed(name: str, seed: int) -> int:
    """A seed of 63 bits for the weight `name`."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


class SyntheticCheckpoint(Checkpoint):
    """A checkpoint that is not there: `load` draws what it would read.

    `path` is a folder that `write_metadata` filled.
    """

    def __init__(self, path: Path, config: transformers.PretrainedConfig, origin: str, seed: int) -> None:
        """`origin` is what an artifact gives as its source."""
        self._seed = seed
        super().__init__(path, config)
        self.origin = f"{origin}, random weights with seed {seed}"

    def _find_weights(self) -> None:
        """All weights are there."""
        self.tied = dict(self._model.all_tied_weights_keys)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config.json and the seed, which determine the weights."""
        return hashlib.sha256((self.path / "config.json").read_bytes() + str(self._seed).encode()).hexdigest()

    def _load(self, name: str, expert: int | None) -> torch.Tensor:
        name = self.tied.get(name, name)
        whole = random_weight(name, self._shapes[name], self.config, self._seed)
        return whole if expert is None else whole[expert]
