"""Experts blocks of known models, by the names the benchmarks use."""

from __future__ import annotations

from dataclasses import dataclass

from moqc.errors import UserError


@dataclass(frozen=True, slots=True)
class Shape:
    """The routed experts of one layer; `activation` is a name of `moqc.quant.activations`."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    activation: str = "silu_glu"

    @property
    def weights_per_expert(self) -> int:
        """Elements of gate, up and down together."""
        return 3 * self.hidden * self.intermediate


SHAPES = {
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "olmoe-1b-7b": Shape(64, 8, 2048, 1024),
    "deepseek-v2-lite": Shape(64, 6, 2048, 1408),
    "gpt-oss-20b": Shape(32, 4, 2880, 2880, "oai_swiglu(alpha=1.702,limit=7.0)"),
}


def find_shape(name: str) -> Shape:
    """The shape called `name`. Raises UserError with the known names."""
    if name not in SHAPES:
        raise UserError(f"unknown shape {name!r}: known are {', '.join(SHAPES)}")
    return SHAPES[name]
