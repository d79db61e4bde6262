"""Gate functions of expert blocks, under one canonical name each.

A gated block computes ``down(act(gate(x), up(x)))``, a plain one ``down(act(up(x)))``. The name, with its
constants in brackets, is the ``activation`` attribute of the IR's operators: ``silu_glu``,
``oai_swiglu(alpha=1.702,limit=7.0)``. With ``|hadamard32`` at the end, what it gives is rotated
(`moqc.quant.hadamard`) before it reaches down, whose weights are rotated too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from moqc.errors import InternalError, UserError
from moqc.quant.hadamard import BLOCK, rotate


@dataclass(frozen=True, slots=True)
class Activation:
    """A parsed activation: its kind, the constants that the kind has (`CONSTANTS`), and what comes after it.

    `rotated`: the result is rotated in blocks. The rest of it works element by element.
    """

    kind: str
    alpha: float = 1.0
    limit: float = math.inf
    rotated: bool = False

    @property
    def has_gate(self) -> bool:
        """Whether it combines a gate and an up projection; otherwise it applies to up alone."""
        return self.kind not in ("silu", "gelu", "relu2")

    def __str__(self) -> str:
        constants = ",".join(f"{name}={getattr(self, name)!r}" for name in CONSTANTS.get(self.kind, ()))
        return self.kind + (f"({constants})" if constants else "") + (ROTATED if self.rotated else "")

    @property
    def elementwise(self) -> Activation:
        """The same without rotation."""
        return replace(self, rotated=False)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return functional.relu(x).square()


def _oai_swiglu(a: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gpt-oss, minimax-m3: ``g * sigmoid(alpha * g) * (u + 1)``, g cut from above and u on both sides."""
    gate = gate.clamp(max=a.limit)
    return gate * torch.sigmoid(a.alpha * gate) * (up.clamp(-a.limit, a.limit) + 1)


def _silu_glu_clamp(a: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """deepseek-v4: the cut comes before the silu."""
    return functional.silu(gate.clamp(max=a.limit)) * up.clamp(-a.limit, a.limit)


def _silu_glu_postclamp(a: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """step3p7: the cut comes after the silu."""
    return functional.silu(gate).clamp(max=a.limit) * up.clamp(-a.limit, a.limit)


ACTIVATIONS: dict[str, Callable[[Activation, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu_glu": lambda _, gate, up: functional.silu(gate) * up,
    "gelu_glu": lambda _, gate, up: functional.gelu(gate) * up,
    "gelu_tanh_glu": lambda _, gate, up: _gelu_tanh(gate) * up,
    "relu_glu": lambda _, gate, up: functional.relu(gate) * up,
    "oai_swiglu": _oai_swiglu,
    "silu_glu_clamp": _silu_glu_clamp,
    "silu_glu_postclamp": _silu_glu_postclamp,
    "silu": lambda _, __, up: functional.silu(up),
    "gelu": lambda _, __, up: functional.gelu(up),
    "relu2": lambda _, __, up: _relu2(up),
}
"""Kind -> function of (activation, gate, up). The kinds without a gate ignore their second argument."""

CONSTANTS: dict[str, tuple[str, ...]] = {
    "oai_swiglu": ("alpha", "limit"),
    "silu_glu_clamp": ("limit",),
    "silu_glu_postclamp": ("limit",),
}
"""Constants a kind must give; the other kinds have none."""

ROTATED = f"|hadamard{BLOCK}"
"""End of the name of an activation whose result is rotated."""

_NAME = re.compile(rf"(?P<kind>\w+)(?:\((?P<constants>[^()]*)\))?(?P<rotated>{re.escape(ROTATED)})?")


def parse_activation(name: str) -> Activation:
    """Read a canonical name; the inverse of `str`.

    Raises:
        UserError: an unknown kind, or constants other than those the kind has.

    """
    match = _NAME.fullmatch(name)
    if match is None or match["kind"] not in ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}: known are {', '.join(ACTIVATIONS)}")
    kind = match["kind"]
    pairs = [item.partition("=") for item in (match["constants"] or "").split(",") if item]
    expected = CONSTANTS.get(kind, ())
    if tuple(key.strip() for key, _, _ in pairs) != expected:
        raise UserError(f"activation {name!r}: {kind} takes exactly the constants ({', '.join(expected)})")
    try:
        values = {key.strip(): float(value) for key, _, value in pairs}
        return Activation(kind, **values, rotated=match["rotated"] is not None)
    except ValueError:
        raise UserError(f"activation {name!r}: a constant is not a number") from None


def apply_activation(name: str, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """Apply the activation to ``gate`` and ``up`` of equal shape (``gate`` None for a plain kind)."""
    activation = parse_activation(name)
    if activation.has_gate != (gate is not None):
        needs = "needs a" if activation.has_gate else "has no"
        raise InternalError(f"activation {name} {needs} gate projection")
    hidden = ACTIVATIONS[activation.kind](activation, up if gate is None else gate, up)
    return rotate(hidden) if activation.rotated else hidden


def rotated_name(name: str) -> str:
    """The canonical name of activation `name` with its result rotated."""
    return str(replace(parse_activation(name), rotated=True))
