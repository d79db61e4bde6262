"""A recipe: every choice of a compilation that is not the model, as a YAML file and as options.

Its keys are the options of `moqc compile`, so that a recipe, a command line and ``moqc.compile(**options)``
say the same. Files are read strictly: a key or value that is not understood is an error with its place.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moqc.errors import UserError

_OPTION = {"calibration": "--calib", "calibration_tokens": "--calib-tokens"}
"""Options that are not named like their key."""


class Recipe(BaseModel):
    """The choices, with their defaults. `options` are the keyword arguments of `moqc.compile`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: float = Field(default=3.0, description="expert file bits per weight, everything counted")
    model_bits: float | None = Field(
        default=None, description="file bits per weight of the whole model instead; null: bits decides"
    )
    formats: str = Field(
        default="integer",
        description="what the allocator chooses from: integer, trellis, or formats by comma",
    )
    linears: str = Field(default="int8-g64-sym", description="format of the other matrices, or none")
    allocator: str = Field(default="global", description="who decides on bits; see moqc allocators")
    quantizer: str = Field(default="gptq", description="how experts are rounded: gptq or rtn")
    activations: str | None = Field(
        default=None, description="inputs of quantized matrices: int8 or float; null: the target's default"
    )
    target: str = Field(default="native", description="machine to compile for; see moqc targets")
    calibration: tuple[str, ...] = Field(default=(), description="text files; empty: the built-in text")
    calibration_tokens: int = Field(default=32_768, description="tokens of it, all files together")
    context: int | None = Field(
        default=None, description="tokens a sequence; null: the model's, at most 4096"
    )
    max_batch: int = Field(default=4, description="sequences at once")
    prune: float | None = Field(default=None, description="share of the experts' work to skip; null: none")
    prune_loss: float | None = Field(default=None, description="instead, nats that the loss may rise by")
    prune_rule: str = Field(default="mass", description="what to skip: mass, odp or topk-threshold")
    cold_expert_policy: str = Field(
        default="keep", description="experts no calibration token keeps: keep, demote or remove"
    )
    seed: int = Field(default=0, description="for what is drawn at random")
    pipeline: str | None = Field(default=None, description="passes instead of the default ones")

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `moqc.compile`."""
        return self.model_dump() | {"calibration": list(self.calibration) or None}

    def changed(self) -> dict[str, Any]:
        """The keys that differ from the defaults."""
        default = Recipe()
        return {key: value for key, value in self if value != getattr(default, key)}

    def to_yaml(self) -> str:
        """The file: every key with its value, and what it means."""
        lines = ["# A recipe for `moqc compile MODEL -o DIR --recipe FILE`"]
        for key, field in type(self).model_fields.items():
            value = getattr(self, key)
            plain = list(value) if isinstance(value, tuple) else value
            text = yaml.safe_dump({key: plain}, allow_unicode=True, width=1000).rstrip()
            lines.append(f"# {field.description}\n{text}")
        return "\n".join(lines) + "\n"

    def command(self, model: str, out: str) -> str:
        """The command line that compiles `model` by this recipe."""
        words = ["moqc", "compile", model, "-o", out]
        for key, value in self.changed().items():
            option = _OPTION.get(key, f"--{key.replace('_', '-')}")
            for item in value if isinstance(value, tuple) else (value,):
                words += [option, str(item)]
        return shlex.join(words)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises UserError naming the file and the key or line."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the recipe ({error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{path}: {where}not YAML ({getattr(error, 'problem', error)})") from error
    if content is None:
        return Recipe()
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a list of `key: value` lines; `moqc recipe` prints one")
    return make_recipe(content, str(path))


def make_recipe(content: dict[str, Any], origin: str) -> Recipe:
    """A recipe from plain values. Raises UserError that starts with `origin`."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"{origin}: no option {key!r}; a recipe has {', '.join(Recipe.model_fields)}"
            ) from error
        raise UserError(f"{origin}: {key}: {first['msg'].lower()}, got {first['input']!r}") from error
