"""A recipe: every choice of a compilation that is not the model, as a YAML file and as options.

`Recipe` is the one list of these choices: its fields are the keys of the file, the options of `moqc compile`
and the keyword arguments of `moqc.compile`. Files are read strictly: a key or value that is not understood is
an error with its place.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moqc.errors import UserError, reason
from moqc.keywords import build, flags, option, spellings
from moqc.quant.overrides import Override
from moqc.targets import TARGETS
from moqc.units import parse_share

PRIOR = 0.15
"""Share of a cost that is that of text which calibration lacks; docs/quality.md has what others give."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The choices, with their defaults. Made from plain values by `make_recipe`, which checks their types."""

    bits: float = option(3.0, "expert file bits per weight, scales and all", metavar="N")
    model_bits: float | None = option(
        None, "file bits per weight of the whole model, instead of bits for the experts", metavar="N"
    )
    formats: str = option(
        "integer",
        "to choose from: integer, asymmetric, trellis (smaller loss, slower), or formats separated by commas",
        metavar="NAMES",
    )
    overrides: Sequence[Override] = option(
        (),
        r"bits for what a pattern names, such as 'layers\.0\..*down=4,8'; repeatable, the last one decides",
        metavar="REGEX=BITS,...",
        flags=("--override",),
        parse=Override.parse,
    )
    prior: float = option(
        PRIOR,
        "share of an expert's cost that is of text unlike the calibration's, from 0 to 1",
        metavar="SHARE",
    )
    linears: str = option(
        "int8-g64-sym", "format of the other matrices, or none: as they are", metavar="FORMAT"
    )
    allocator: str = option("global", "who decides on bits; see `moqc allocators`", metavar="NAME")
    quantizer: str = option("gptq", "how experts are rounded: gptq, awq, rtn or hqq", metavar="NAME")
    activations: str | None = option(
        None,
        "inputs of quantized matrices: int8, or float, which is exact on CPUs and float16 on GPUs "
        "[default: int8 on CPUs, float on GPUs]",
        metavar="MODE",
    )
    target: str = option(
        "native",
        "machine to compile for; see `moqc targets`",
        metavar="NAME",
        complete=lambda: ["native", *TARGETS],
    )
    records: str | None = option(
        None, "plans of kernels that `moqc tune` found, beside those that ship", metavar="FILE"
    )
    calibration: Sequence[str | Path] = option(
        (), "calibration text, UTF-8; repeatable [default: built-in text]", metavar="FILE", flags=("--calib",)
    )
    calibration_tokens: int = option(
        32_768, "calibration tokens, all files together", metavar="N", flags=("--calib-tokens",)
    )
    context: int | None = option(
        None, "tokens a sequence may have [default: the model's, at most 4096]", metavar="N"
    )
    max_batch: int = option(4, "sequences at once", metavar="N")
    kv_cache: str | None = option(
        None,
        "of keys and values: float16, int8 or float32 [default: float16; float32 with exact activations]",
        metavar="DTYPE",
    )
    prune: float | None = option(
        None, "skip this share of the experts' work, such as 15%", metavar="SHARE", parse=parse_share
    )
    prune_loss: float | None = option(
        None, "instead of a share, skip what raises the loss by at most this", metavar="NATS"
    )
    prune_rule: str = option("mass", "what to skip: mass, odp or topk-threshold", metavar="RULE")
    cold_expert_policy: str = option(
        "keep",
        "experts that no calibration token keeps: keep, demote to the smallest format, or remove",
        metavar="POLICY",
    )
    seed: int = option(0, "for what is drawn at random", metavar="N")
    pipeline: str | None = option(
        None, "passes to run instead of the default ones, or @FILE; see `moqc passes`", metavar="TEXT"
    )

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `moqc.compile`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)}

    def plain(self) -> dict[str, Any]:
        """The choices as numbers, texts and lists, as they are in a file."""
        return {key: _plain(value) for key, value in self.options().items()}

    def changed(self) -> dict[str, Any]:
        """The keys that differ from the defaults."""
        default = Recipe().options()
        return {key: value for key, value in self.options().items() if value != default[key]}

    def to_yaml(self) -> str:
        """The file: every key with its value, and what it means."""
        import yaml

        lines = ["# A recipe for `moqc compile MODEL -o DIR --recipe FILE`"]
        texts = spellings(Recipe)
        for key, value in self.plain().items():
            text = yaml.safe_dump({key: value}, allow_unicode=True, width=1000).rstrip()
            lines.append(f"# {texts[key].help}\n{text}")
        return "\n".join(lines) + "\n"

    def command(self, model: str, out: str) -> str:
        """The command line that compiles `model` by this recipe."""
        words = ["moqc", "compile", model, "-o", out]
        known = spellings(Recipe)
        for key, value in self.changed().items():
            for item in value if isinstance(value, tuple) else (value,):
                words += [flags(key, known[key])[0], str(item)]
        return shlex.join(words)


def _plain(value: Any) -> Any:
    if isinstance(value, Override):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def read_recipe(path: Path) -> dict[str, Any]:
    """The choices in a YAML file, checked. Raises UserError naming the file and the key or line."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the recipe ({reason(error)})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{path}: {where}not YAML ({getattr(error, 'problem', error)})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a list of `key: value` lines; `moqc recipe` prints one")
    make_recipe(content, str(path))
    return content


def make_recipe(content: dict[str, Any], origin: str) -> Recipe:
    """A recipe from plain values. Raises UserError that starts with `origin`."""
    return build(Recipe, content, origin)
