"""Which passes there are: moqc's own in one table, a user's by decorator, a package's by entry point.

A package installs a pass with, in its ``pyproject.toml``::

    [project.entry-points."moqc.passes"]
    bits-by-rank = "my_package.my_module:BitsByRank"

A name may be taken once: a clash is an error that names both owners.
"""

from __future__ import annotations

import importlib
import re
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from moqc.errors import PipelineError
from moqc.passes.base import Pass
from moqc.passes.options import field_types, suggest

GROUP = "moqc.passes"

BUILTIN: dict[str, str] = {
    "profile-activation": "moqc.passes.profile_activation:ProfileActivation",
    "profile-channels": "moqc.passes.profile_channels:ProfileChannels",
    "measure-sensitivity": "moqc.passes.measure_sensitivity:MeasureSensitivity",
    "measure-costs": "moqc.passes.measure_costs:MeasureCosts",
    "measure-block-errors": "moqc.passes.measure_block_errors:MeasureBlockErrors",
    "measure-gradients": "moqc.passes.measure_gradients:MeasureGradients",
    "profile-weights": "moqc.passes.profile_weights:ProfileWeights",
    "measure-similarity": "moqc.passes.measure_similarity:MeasureSimilarity",
    "profile-coactivation": "moqc.passes.profile_coactivation:ProfileCoactivation",
    "profile-margins": "moqc.passes.profile_margins:ProfileMargins",
    "score-experts": "moqc.passes.score_experts:ScoreExperts",
    "measure-linears": "moqc.passes.measure_linears:MeasureLinears",
    "protect-channels": "moqc.passes.protect_channels:ProtectChannels",
    "allocate-bits": "moqc.passes.allocate_bits:AllocateBits",
    "prune-routing": "moqc.passes.prune_routing:PruneRouting",
    "quantize-experts": "moqc.passes.quantize_experts:QuantizeExperts",
    "recalibrate-router": "moqc.passes.recalibrate_router:RecalibrateRouter",
    "quantize-linears": "moqc.passes.quantize_linears:QuantizeLinears",
    "synthesize-weights": "moqc.passes.synthesize_weights:SynthesizeWeights",
    "plan-cache": "moqc.passes.plan_cache:PlanCache",
    "last-logits": "moqc.passes.last_logits:LastLogits",
    "narrow-integers": "moqc.passes.narrow_integers:NarrowIntegers",
    "legalize": "moqc.passes.legalize:Legalize",
    "schedule": "moqc.passes.schedule:Schedule",
}
"""Name -> ``module:class``, imported on first use. One line a pass, in the order of a usual pipeline."""

_decorated: dict[str, type[Pass]] = {}

P = TypeVar("P", bound=type[Pass])


def register_pass(cls: P) -> P:
    """Class decorator: make a pass known to `Pipeline.parse` under its `name`.

    Raises PipelineError when the name is taken or the class is not a frozen dataclass with a docstring and
    printable options.
    """
    _validate(cls)
    owner = _owner(cls.name)
    if owner is not None and _decorated.get(cls.name) is not cls:
        raise PipelineError(f"pass name {cls.name!r} of {_path(cls)} is taken by {owner}: choose another")
    _decorated[cls.name] = cls
    return cls


def find_pass(name: str) -> type[Pass]:
    """The class of the pass called `name`. Raises PipelineError, with a suggestion, when there is none."""
    plugins = _plugins()
    if name in _decorated:
        return _decorated[name]
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        cls = getattr(importlib.import_module(module), attribute)
    elif name in plugins:
        cls = _load(plugins[name])
    else:
        known = pass_names()
        raise PipelineError(f"unknown pass {name!r}{suggest(name, known)}: known are {', '.join(known)}")
    _validate(cls)
    if cls.name != name:
        raise PipelineError(f"pass {name!r} is registered for {_path(cls)}, which calls itself {cls.name!r}")
    return cls  # type: ignore[no-any-return]


def pass_names() -> list[str]:
    """Names of all passes: the built-in ones first, then others in alphabetical order."""
    return [*BUILTIN, *sorted((_plugins().keys() | _decorated.keys()) - BUILTIN.keys())]


def _plugins() -> dict[str, EntryPoint]:
    """Name -> entry point of the installed packages. PipelineError when a name is offered twice.

    An entry point that leads to the very class a decorator registered is no clash.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        taken = found[entry.name].value if entry.name in found else _owner(entry.name)
        if taken not in (None, entry.value):
            raise PipelineError(
                f"pass name {entry.name!r} is offered by {taken} and by {entry.value}: uninstall one"
            )
        found[entry.name] = entry
    return found


def _load(entry: EntryPoint) -> type[Pass]:
    try:
        return entry.load()  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise PipelineError(
            f"pass {entry.name!r}: the plug-in {entry.value} does not load: {error}"
        ) from error


def _owner(name: str) -> str | None:
    """Who among the built-in and the decorated passes has the name."""
    return _path(_decorated[name]) if name in _decorated else BUILTIN.get(name)


def _path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _validate(cls: object) -> None:
    """PipelineError unless `cls` keeps the rules of `moqc.passes.base`."""
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise PipelineError(f"{cls!r} is not a subclass of moqc.passes.base.Pass")
    where = f"pass {_path(cls)}"
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", getattr(cls, "name", "")):
        raise PipelineError(f"{where}: set `name` to words of a-z and 0-9 joined by dashes")
    if "__dataclass_fields__" not in vars(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise PipelineError(f"{where} must be decorated with @dataclass(frozen=True)")
    if not (cls.__doc__ or "").strip() or (cls.__doc__ or "").startswith(f"{cls.__name__}("):
        raise PipelineError(f"{where} needs a docstring: `moqc passes` shows its first line")
    field_types(cls)
