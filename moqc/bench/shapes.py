"""Experts blocks by the names the benchmarks use, and those of any model's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
    """The shape called `name`, or that of the first experts block of the model in the folder `name`.

    Of a folder its config.json is read; an artifact has one too. Raises UserError.
    """
    if name in SHAPES:
        return SHAPES[name]
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"unknown shape {name!r}: known are {', '.join(SHAPES)}, or the folder of a model")
    from moqc.frontend.config import parse_config
    from moqc.frontend.trace import outline

    use = outline(parse_config(folder, name)).experts[0]
    layout = use.layout
    if not layout.has_gate or layout.has_bias:
        raise UserError(f"{name}: its experts have no gate, or biases; the benchmark has blocks with a gate")
    return Shape(layout.experts, use.top_k, layout.hidden, layout.intermediate, layout.activation)
