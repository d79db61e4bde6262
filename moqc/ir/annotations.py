"""Typed keys of the annotations on an IR module.

An annotation is a module attribute that holds plain dicts, lists, integers and strings, keyed by site. No
floats: they print with 17 digits and break the comparison of modules, so a pass scales them to integers.

    BITS.put(mod, {...})   a new module with the annotation; `mod` is unchanged
    BITS.of(mod)           its value; PipelineError names the pass that writes it
    BITS.get(mod)          its value or None

The order of a dict is not kept: TVM sorts the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from tvm import IRModule

from moqc.errors import InternalError, PipelineError
from moqc.ir.calls import plain

T = TypeVar("T")

SCHEMA_VERSION = 1
"""Version of the layout of all annotations; `parse_module` refuses another."""


@dataclass(frozen=True, slots=True)
class Key(Generic[T]):
    """One annotation: the attribute `name`, the pass (or part) that writes it, and what the value is."""

    name: str
    writer: str
    doc: str

    def get(self, mod: IRModule) -> T | None:
        """The annotation of `mod` as plain values, or None when it has none."""
        attrs = mod.attrs
        if attrs is None or self.name not in attrs:
            return None
        return cast(T, plain(attrs[self.name]))

    def of(self, mod: IRModule) -> T:
        """The annotation of `mod`; PipelineError naming its writer when there is none."""
        value = self.get(mod)
        if value is None:
            raise PipelineError(f"the module has no {self.name}: run {self.writer} before")
        return value

    def put(self, mod: IRModule, value: T) -> IRModule:
        """A copy of `mod` with this annotation set to `value` (dict, list, int and str only)."""
        _require_plain(value, self.name)
        return mod.with_attr(self.name, value)

    def drop(self, mod: IRModule) -> IRModule:
        """A copy of `mod` without this annotation."""
        return mod.without_attr(self.name) if self.get(mod) is not None else mod

    def __str__(self) -> str:
        return self.name


def _require_plain(value: Any, where: str) -> None:
    """InternalError unless `value` consists of dicts with string keys, lists, integers and strings."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InternalError(f"{where}: key {key!r} is not a string")
            _require_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _require_plain(item, f"{where}[{index}]")
    elif isinstance(value, bool) or not isinstance(value, int | str):
        raise InternalError(
            f"{where}: {type(value).__name__} {value!r}; annotations hold dict, list, int and str"
        )


SCHEMA: Key[int] = Key("moqc.schema", "the front end", "version of the annotations' layout")
PARAMS: Key[list[str]] = Key(
    "moqc.params",
    "the front end",
    "names of main's weight parameters, in order (after input_ids and positions)",
)
PROFILE: Key[dict[str, Any]] = Key(
    "moqc.profile", "profile-activation", "site -> how often and how strongly each expert is used"
)
CHANNELS: Key[dict[str, Any]] = Key(
    "moqc.channels",
    "profile-channels",
    "site -> the second moments in the workspace and what they were made of",
)
SENSITIVITY: Key[dict[str, int]] = Key(
    "moqc.sensitivity",
    "measure-sensitivity",
    "site -> KL divergence per squared error of the block's output, as integers",
)
COSTS: Key[dict[str, Any]] = Key(
    "moqc.costs", "measure-costs", "site -> projection -> format -> cost of each expert, as integers"
)
BLOCK_ERRORS: Key[dict[str, Any]] = Key(
    "moqc.block_errors",
    "measure-block-errors",
    "site -> error of the block with one expert quantized, as integers",
)
GRADIENTS: Key[dict[str, Any]] = Key(
    "moqc.gradients",
    "measure-gradients",
    "tokens used, and by site the expected change of the loss with one expert quantized, as integers",
)
WEIGHTS: Key[dict[str, Any]] = Key(
    "moqc.weights", "profile-weights", "site -> entropy and outliers of the expert weights, as integers"
)
SIMILARITY: Key[dict[str, int]] = Key(
    "moqc.similarity",
    "measure-similarity",
    "site -> cosine similarity of the residual stream before and after the block, in parts per million",
)
PRUNING: Key[dict[str, Any]] = Key(
    "moqc.pruning", "prune-routing", "site -> the rule, what it skips, and how often each expert is kept"
)
COACTIVATION: Key[dict[str, Any]] = Key(
    "moqc.coactivation",
    "profile-coactivation",
    "site -> experts that fire together, and how their errors correlate",
)
MARGINS: Key[dict[str, Any]] = Key(
    "moqc.margins",
    "profile-margins",
    "router -> how far the last expert chosen is from the first that is not, and what noise would change",
)
SCORES: Key[dict[str, Any]] = Key(
    "moqc.scores", "score-experts", "site -> importance of each expert, super, starved and drifting ones"
)
PROTECTION: Key[dict[str, Any]] = Key(
    "moqc.protection",
    "protect-channels",
    "site -> input channels that gate and up store more than once, and how many copies there are",
)
LINEAR_COSTS: Key[dict[str, dict[str, int]]] = Key(
    "moqc.linear_costs",
    "measure-linears",
    "site of a linear or embedding -> format -> KL divergence in 1e-15 nats a token",
)
BITS: Key[dict[str, dict[str, list[str]]]] = Key(
    "moqc.bits", "allocate-bits", "site -> projection (gate, up, down) -> format name of each expert"
)
LINEAR_PLAN: Key[dict[str, str]] = Key(
    "moqc.linear_plan", "allocate-bits", "site of a linear or embedding -> format name it shall have"
)
ROUTERS: Key[dict[str, dict[str, int]]] = Key(
    "moqc.routers",
    "recalibrate-router",
    "router -> share of the original's experts that it chooses, before and after, in parts per million",
)
LINEAR_BITS: Key[dict[str, str]] = Key(
    "moqc.linear_bits", "quantize-linears", "site of a quantized linear or embedding -> format name"
)
CACHE: Key[dict[str, Any]] = Key(
    "moqc.cache",
    "plan-cache",
    "context, batch, dtype, tensors (a list of shapes) and states (numbers of recurrent ones) of the caches",
)
KERNELS: Key[list[dict[str, Any]]] = Key(
    "moqc.kernels",
    "legalize",
    "one call of each packed operator with code of its own: operator, attributes, arguments, parameters",
)

KEYS: dict[str, Key[Any]] = {
    key.name: key
    for key in (
        SCHEMA,
        PARAMS,
        PROFILE,
        CHANNELS,
        SENSITIVITY,
        COSTS,
        BLOCK_ERRORS,
        GRADIENTS,
        WEIGHTS,
        SIMILARITY,
        PRUNING,
        COACTIVATION,
        MARGINS,
        SCORES,
        PROTECTION,
        LINEAR_COSTS,
        BITS,
        LINEAR_PLAN,
        ROUTERS,
        LINEAR_BITS,
        CACHE,
        KERNELS,
    )
}
"""Every annotation moqc itself knows. A plug-in's own keys live under another prefix than ``moqc.``."""
