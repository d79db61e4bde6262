"""Experts modules of transformers models: which module is one, how its weights lie, what its gate computes.

transformers stores a block's experts stacked and fused (``gate_up_proj``), transposed or not, interleaved or
not. moqc knows one layout, the canonical one: ``gate`` and ``up`` [E, I, H], ``down`` [E, H, I], biases
[E, I], [E, I], [E, H]. This module is the only place that knows both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moqc.errors import ModelError
from moqc.frontend.gates import classify_gate
from moqc.frontend.plain_experts import PARAMETERS, mark

if TYPE_CHECKING:
    from moqc.frontend.checkpoint import Checkpoint

_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """One experts block: its site, its sizes, and how transformers stores its weights.

    `transposed`: matrices are stored [in, out]. `interleaved`: gate and up rows alternate in the fused matrix
    (else gate comes first). `activation` is a name of `moqc.quant.activations`.
    """

    site: str
    experts: int
    hidden: int
    intermediate: int
    has_gate: bool
    has_bias: bool
    transposed: bool
    interleaved: bool
    activation: str
    form: str = ""
    """That of a module outside of transformers' interface (`moqc.frontend.plain_experts`), else empty."""
    identities: int = 0
    """Further experts, numbered after the others, that hand their input through."""

    @property
    def flat(self) -> bool:
        """Whether the experts of a projection lie below each other in one matrix."""
        return self.form == "rows"

    @property
    def identities_from(self) -> int | None:
        """The first expert that hands its input through, None when there is none."""
        return self.experts if self.identities else None

    @property
    def projections(self) -> tuple[str, ...]:
        """Matrices of an expert, in canonical order."""
        return ("gate", "up", "down") if self.has_gate else ("up", "down")

    @property
    def operands(self) -> tuple[str, ...]:
        """Matrices, then biases, in the order of the operands of ``R.moqc.experts``."""
        biases = tuple(f"{projection}_bias" for projection in self.projections)
        return self.projections + (biases if self.has_bias else ())

    def shape(self, operand: str) -> tuple[int, ...]:
        """Canonical shape of an operand of the whole block."""
        down = operand.startswith("down")
        rows, columns = (self.hidden, self.intermediate) if down else (self.intermediate, self.hidden)
        return (self.experts, rows) if operand.endswith("_bias") else (self.experts, rows, columns)

    def source(self, operand: str) -> str:
        """Name of the transformers parameter that holds `operand`."""
        projection, bias, _ = operand.partition("_bias")
        if self.form in PARAMETERS:
            return f"{self.site}.{PARAMETERS[self.form][projection]}"
        fused = "down_proj" if projection == "down" else "gate_up_proj" if self.has_gate else "up_proj"
        return f"{self.site}.{fused}{bias}"

    def take(self, stored: torch.Tensor, operand: str) -> torch.Tensor:
        """Cut `operand` out of the transformers parameter `source(operand)`, of all experts or of one."""
        bias = operand.endswith("_bias")
        if self.flat:
            stacked = stored.reshape(self.experts, self.intermediate, self.hidden)
            return stacked.transpose(1, 2) if operand == "down" else stacked
        if self.identities and stored.dim() == 3:
            stored = stored[: self.experts]
        tensor = stored.transpose(-1, -2) if self.transposed and not bias else stored
        if operand.startswith("down") or not self.has_gate:
            return tensor
        rows = -1 if bias else -2
        first = operand.startswith("gate")
        if self.interleaved:
            picked = torch.arange(0 if first else 1, 2 * self.intermediate, 2, device=tensor.device)
            return tensor.index_select(rows, picked)
        return tensor.narrow(rows, 0 if first else self.intermediate, self.intermediate)


def is_experts(module: torch.nn.Module) -> bool:
    """Whether transformers' experts interface decorates the class of `module`."""
    return all(hasattr(module, mark) for mark in _MARKS)


def describe(module: torch.nn.Module, site: str) -> ExpertLayout:
    """The layout of the experts module called `site`. Weights may be on the meta device.

    Raises ModelError for a gate function or a stage (a norm after each expert) that moqc does not model.
    """
    if getattr(module, "has_post_expert_norm", False):
        raise ModelError(
            f"{site}: {type(module).__name__} normalizes after each expert, which moqc does not model"
        )
    form = str(getattr(module, "moqc_form", ""))
    fused = "gate_up_proj" if module.has_gate else "up_proj"
    names = PARAMETERS.get(form, {"up": fused, "down": "down_proj"})
    up, down = (module.get_parameter(names[projection]) for projection in ("up", "down"))
    if form == "rows":
        total = experts = int(module.num_experts)  # type: ignore[arg-type]
        hidden, intermediate = up.shape[1], up.shape[0] // experts
    else:
        experts, first, second = down.shape
        hidden, intermediate = (second, first) if module.is_transposed else (first, second)
        total = up.shape[0]
    return ExpertLayout(
        site=site,
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        has_gate=bool(module.has_gate),
        has_bias=bool(module.has_bias),
        transposed=bool(module.is_transposed),
        interleaved=bool(module.has_gate) and not module.is_concatenated,
        activation=classify_gate(module, site),
        form=form,
        identities=total - experts,
    )


def find_layouts(model: torch.nn.Module, model_type: str) -> tuple[ExpertLayout, ...]:
    """Layouts of all experts blocks of `model`, in module order. Raises ModelError when there is none."""
    for module in model.modules():
        mark(module)
    layouts = tuple(describe(module, name) for name, module in model.named_modules() if is_experts(module))
    if not layouts:
        raise ModelError(
            f"{model_type}: no experts blocks: the model is dense, or its experts do not use transformers' "
            "experts interface; moqc compiles mixture-of-experts models"
        )
    return layouts


def canonical(
    layout: ExpertLayout, checkpoint: Checkpoint, projection: str, expert: int | None = None
) -> torch.Tensor:
    """One projection (or bias, as ``up_bias``) in float32: canonical [E, N, K], or [N, K] of `expert`."""
    return checkpoint.load(f"{layout.site}.{projection}", expert).float().contiguous()
