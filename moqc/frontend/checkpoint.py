"""A Hugging Face checkpoint on disk: opened and checked from headers alone, weights streamed by name."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
import transformers

from moqc.errors import ModelError
from moqc.frontend.coded import CodedShards, read_coding
from moqc.frontend.config import read_config, wrapper_config
from moqc.frontend.experts import ExpertLayout, find_layouts
from moqc.frontend.hooks import hook
from moqc.frontend.mapping import Source, match, refuse
from moqc.frontend.shards import Shards
from moqc.frontend.skeleton import build_skeleton
from moqc.frontend.wrappers import build_wrapper, names_inside
from moqc.log import logger


class Checkpoint:
    """One model folder. Make it with `open`.

    `names` are the parameters and persistent buffers of the transformers model, `layouts` its experts blocks;
    `tied` maps a tied parameter to the one that is stored; `origin` says in an artifact where it came from.
    """

    def __init__(self, path: Path, config: transformers.PretrainedConfig) -> None:
        """Match every checkpoint tensor with the model of `config`; use `open`."""
        self.path, self.config = path, config
        self.origin = str(path)
        self._model = build_skeleton(config)
        self.layouts: tuple[ExpertLayout, ...] = find_layouts(self._model, f"{path}: {config.model_type}")
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        self.names: tuple[str, ...] = tuple(self._shapes)
        self._operands = {
            f"{layout.site}.{operand}": (layout, operand)
            for layout in self.layouts
            for operand in layout.operands
        }
        self.tied: dict[str, str] = {}
        self._find_weights()

    def _find_weights(self) -> None:
        """Match the stored tensors with the model's parameters. Raises ModelError where they do not fit."""
        coding = read_coding(self.path)
        self._shards = Shards(self.path) if coding is None else CodedShards(self.path, coding)
        self._sources = self._match()
        self.tied = self._resolve_ties()
        missing = [name for name in self.names if name not in self._sources and name not in self.tied]
        refuse(self.path, "lacks weights", missing)

    def _match(self) -> dict[str, Source]:
        """Parameter -> the stored tensors it is made of; of a multimodal model, its language model's."""
        self._whole, self._inside = self._model, {name: name for name in self.names}
        wrapper = wrapper_config(self.path)
        if wrapper is None:
            return match(self.path, self._shards, self._model)
        self._whole = build_wrapper(wrapper)
        self._inside = names_inside(self._whole, self._model)
        sources = match(self.path, self._shards, self._whole)
        others = sources.keys() - set(self._inside.values())
        parts = sorted({".".join(name.split(".")[:2]) for name in others})
        logger.info(
            "%s is multimodal: %d tensors beside its language model are ignored (%s)",
            wrapper.model_type, len(others), ", ".join(parts),
        )  # fmt: skip
        return {name: sources[stored] for name, stored in self._inside.items() if stored in sources}

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open the folder `path`, reading the configuration and the headers of the weight files only.

        Raises ModelError, in one line: no folder, no or unknown configuration, files missing or cut short,
        dtypes moqc does not read, tensors missing, extra or of a wrong shape, a model without experts.
        """
        path = Path(path)
        return cls(path, read_config(path))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config.json and the contents of all weight files (read once, streamed)."""
        return self._shards.digest([self.path / "config.json"])

    def meta_model(self, *, latent: bool = False) -> transformers.PreTrainedModel:
        """A new float32 model on the meta device with moqc's hooks (see `moqc.frontend.hooks.hook`)."""
        model = build_skeleton(self.config)
        hook(model, latent=latent)
        return model

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, or of a canonical experts operand such as ``<site>.gate``."""
        if name in self._operands:
            layout, operand = self._operands[name]
            return layout.shape(operand)
        return self._shapes[self._known(name)]

    def load(self, name: str, expert: int | None = None) -> torch.Tensor:
        """One weight in its stored dtype, read from disk now; float8 and MXFP4 ones as bfloat16.

        Args:
            name: a parameter of the transformers model, or a canonical experts operand (``<site>.gate``,
                ``.up``, ``.down``, ``.gate_bias``...): [E, I, H], [E, I, H], [E, H, I], biases [E, N].
            expert: read this expert only, and drop the first axis.

        Raises:
            ModelError: no such weight, or the file changed since `open`.

        """
        if name in self._operands:
            layout, operand = self._operands[name]
            if layout.flat and expert is not None:
                return layout.take(self._load(layout.source(operand), None), operand)[expert]
            return layout.take(self._load(layout.source(operand), expert), operand)
        return self._load(self._known(name), expert)

    def _known(self, name: str) -> str:
        if name not in self._shapes:
            raise ModelError(f"{self.path}: the model has no weight called {name}")
        return name

    def _load(self, name: str, expert: int | None) -> torch.Tensor:
        name = self.tied.get(name, name)
        source = self._sources[name]
        if expert is None:
            tensors = {
                pattern: [self._shards.read(key) for key in keys] for pattern, keys in source.keys.items()
            }
            return source.convert(tensors, self._whole)[self._inside[name]]
        if source.per_expert(self._shapes[name][0]):
            one = {pattern: [self._shards.read(keys[expert])] for pattern, keys in source.keys.items()}
            return source.convert(one, self._whole)[self._inside[name]][0]
        if source.converter is None:
            return self._shards.read(next(iter(source.keys.values()))[0], row=expert)
        return self._load(name, None)[expert]

    def _resolve_ties(self) -> dict[str, str]:
        """Tied parameter -> the stored one. Raises ModelError when both are stored and differ."""
        tied: dict[str, str] = {}
        for target, origin in self._model.all_tied_weights_keys.items():
            if origin not in self._sources:
                tied[origin] = target
            else:
                if target in self._sources and not torch.equal(
                    self._load(origin, None), self._load(target, None)
                ):
                    raise ModelError(
                        f"{self.path}: config.json ties {target} to {origin}, but two different tensors are "
                        "stored: set tie_word_embeddings to false"
                    )
                tied[target] = origin
        return {name: stored for name, stored in tied.items() if stored in self._sources}
