"""What the experts kernels of every family depend on; no TVM here, so that plans are made without it."""

from __future__ import annotations

from dataclasses import dataclass

from moqc.quant.formats import Format


@dataclass(frozen=True)
class ExpertsLayer:
    """One experts block. `hidden` are the rows of down, `intermediate` its columns.

    Each projection lists the formats of its classes, in the order of its tensors; `gate` is empty for
    activations without one. `activation` is the elementwise part; `biases` names those there are, of
    ``gate_bias``, ``up_bias`` and ``down_bias``.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    gate: tuple[Format, ...]
    up: tuple[Format, ...]
    down: tuple[Format, ...]
    activation: str = "silu_glu"
    biases: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Experts, top_k, hidden and intermediate, as records of plans have them."""
        return self.experts, self.top_k, self.hidden, self.intermediate

    def formats(self, kernel: str) -> tuple[Format, ...]:
        """Those of the classes that ``gate_up`` or ``down`` reads."""
        return self.down if kernel == "down" else (*self.gate, *self.up)
