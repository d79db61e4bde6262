"""What the kernels of `R.moqc.prune_routing` depend on, for every family of targets."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax

from moqc.ir.ops import attributes, operands


@dataclass(frozen=True)
class PruneShape:
    """The fields are those of `R.moqc.prune_routing`; `slopes` says whether it has that operand."""

    experts: int
    top_k: int
    hidden: int
    ids: str
    rule: str
    exponent: float
    renormalize: bool
    first: int
    slopes: bool = False

    @classmethod
    def of(cls, call: relax.Call) -> PruneShape:
        """Read a call."""
        named, attrs = operands(call), attributes(call)
        return cls(
            experts=int(named["strength"].ty.shape[0]),
            top_k=int(named["ids"].ty.shape[1]),
            hidden=int(named["x"].ty.shape[1]),
            ids=str(named["ids"].ty.dtype),
            rule=attrs["rule"],
            exponent=float(attrs["exponent"]),
            renormalize=bool(attrs["renormalize"]),
            first=attrs["first"],
            slopes="slopes" in named,
        )
