"""Which checkpoint tensors make up which model parameter, through transformers' own conversion mapping.

Only names and shapes are used: the conversions run on meta tensors of the shapes in the file headers, so a
mismatch shows before any weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from moqc.errors import ModelError
from moqc.frontend.shards import Shards
from moqc.frontend.skeleton import first_line

_SHOWN = 3  # names in a message about many tensors
# Written by old versions of transformers, recomputed by all; its own loader ignores them too.
_OBSOLETE = (r"rotary_emb\.inv_freq$", r"position_ids$")


@dataclass(slots=True)
class Source:
    """Checkpoint tensors that become one or more parameters: pattern -> keys, and the conversion, if any."""

    target: str
    converter: WeightConverter | None
    keys: dict[str, list[str]] = field(default_factory=dict)

    def convert(
        self, tensors: Mapping[str, list[torch.Tensor]], model: transformers.PreTrainedModel
    ) -> dict[str, torch.Tensor]:
        """Parameters made of `tensors` (pattern -> one tensor for each of its first keys)."""
        if self.converter is None:
            return {self.target: next(iter(tensors.values()))[0]}
        converter: Any = deepcopy(self.converter)
        for pattern, items in tensors.items():
            for key, tensor in zip(self.keys[pattern], items, strict=False):
                converter.add_tensor(self.target, key, pattern, lambda tensor=tensor: tensor)
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def per_expert(self, experts: int) -> bool:
        """Whether the checkpoint has one tensor an expert for every pattern."""
        return self.converter is not None and all(len(keys) == experts > 1 for keys in self.keys.values())


def match(folder: Path, shards: Shards, model: transformers.PreTrainedModel) -> dict[str, Source]:
    """Parameter -> the checkpoint tensors it is made of.

    Raises ModelError for tensors of no parameter, of an unknown dtype, or of a shape other than the model's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    outputs: dict[str, Source] = {}
    for source in _group(folder, shards, model).values():
        try:
            made = source.convert(_blanks(source, shards), model)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise ModelError(f"{folder}: {source.target} cannot be assembled: {first_line(error)}") from error
        for name, tensor in made.items():
            if tuple(tensor.shape) != shapes.get(name, tuple(tensor.shape)):
                raise ModelError(
                    f"{folder}: {name} is stored with shape {tuple(tensor.shape)}, "
                    f"config.json asks for {shapes[name]}"
                )
            outputs[name] = source
    return outputs


def stored_tensors(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of `model`, by the names and in the shapes of the hub; on the meta device.

    A tied tensor is there once.
    """
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    tied = model.all_tied_weights_keys
    kept = {name: tensor for name, tensor in state.items() if name not in tied}
    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, kept)
    return reverted


def refuse(folder: Path, what: str, names: list[str]) -> None:
    """Raise ModelError about `names`, unless there are none."""
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise ModelError(f"{folder}: the checkpoint {what}: {', '.join(names[:_SHOWN])}{more}")


def _blanks(source: Source, shards: Shards) -> dict[str, list[torch.Tensor]]:
    """Meta tensors of the shapes and dtypes in the headers."""
    return {
        pattern: [
            torch.empty(shards.tensors[key].shape, dtype=shards.dtype(key), device="meta") for key in keys
        ]
        for pattern, keys in source.keys.items()
    }


def _group(folder: Path, shards: Shards, model: transformers.PreTrainedModel) -> dict[str, Source]:
    """Checkpoint keys by the (first) parameter they become."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    known = model.state_dict()
    sources: dict[str, Source] = {}
    extra = []
    for key in sorted(
        shards.tensors, key=dot_natural_key
    ):  # transformers' order: it decides which expert is which
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if target not in known and key in known:
            target, pattern = key, None
        if target not in known:
            extra.append(key)
            continue
        converter = by_pattern[pattern] if pattern else None
        source = sources.setdefault(target, Source(target, converter))
        source.keys.setdefault(pattern or key, []).append(key)
        if source.converter is None and len(source.keys) > 1:
            raise ModelError(f"{folder}: {target} is stored twice: as {' and as '.join(source.keys)}")
    patterns = (*(model._keys_to_ignore_on_load_unexpected or ()), *_OBSOLETE)
    refuse(folder, "has tensors the model does not use", [k for k in extra if not _any_match(patterns, k)])
    return sources


def _any_match(patterns: tuple[str, ...], key: str) -> bool:
    return any(re.search(pattern, key) for pattern in patterns)
