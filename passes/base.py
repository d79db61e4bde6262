"""What a pass is: a frozen dataclass whose fields are its options, and one method from module to module.

    @register_pass
    @dataclass(frozen=True)
    class BitsByRank(Pass):
        \"\"\"The hottest experts get `high` bits, the rest `low`.\"\"\"

        name: ClassVar[str] = "bits-by-rank"
        reads: ClassVar = (PROFILE,)
        writes: ClassVar = (BITS,)
        high: int = 4
        low: int = 2

        def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
            ...

Options are of type int, float, bool, str or tuple[str, ...]. A pass returns a new module, never changes the
one it is given, keeps no state, and sees nothing but its options and the `PassContext`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from numpy.typing import NDArray
from tvm import IRModule

from moqc.errors import InternalError, PipelineError
from moqc.ir.annotations import Key
from moqc.quant.layouts import DEFAULT

if TYPE_CHECKING:
    from moqc.calibrate.text import CalibrationSet
    from moqc.calibrate.workspace import Workspace
    from moqc.frontend.checkpoint import Checkpoint
    from moqc.targets import Target


class Params(Protocol):
    """Packed weights by parameter name, on their way to the artifact; a `ParamStore`, usually."""

    def put(self, name: str, array: NDArray[Any]) -> None:
        """Store `array` under `name`, replacing what was there."""

    def get(self, name: str) -> NDArray[Any]:
        """The array called `name`."""

    def __contains__(self, name: object) -> bool: ...


@dataclass(frozen=True)
class PassContext:
    """Everything a pass may see besides the module. A pass that needs a field says so through `need`."""

    target: Target | None = None
    checkpoint: Checkpoint | None = None
    calibration: CalibrationSet | None = None
    workspace: Workspace | None = None
    params: Params | None = None
    seed: int = 0

    @property
    def layout(self) -> str:
        """The packed layout of the target's kernels."""
        return DEFAULT if self.target is None else self.target.layout

    def need(self, field: str, reader: str) -> Any:
        """The value of `field`; PipelineError naming the pass `reader` when this compilation has none."""
        value = getattr(self, field)
        if value is None:
            raise PipelineError(f"{reader} needs a {field}, and this run has none")
        return value


@dataclass(frozen=True)
class Pass(ABC):
    """One step of a pipeline.

    `name` is how a pipeline text calls it, `reads` the annotations it needs, `writes` those it leaves.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[Key[Any], ...]] = ()
    writes: ClassVar[tuple[Key[Any], ...]] = ()

    @abstractmethod
    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """The module after this pass. Called through `__call__`, which checks the contract."""

    def required(self) -> tuple[Key[Any], ...]:
        """Annotations read with these options; override where an option decides."""
        return self.reads

    def check(self) -> None:
        """Refuse options that cannot be with a PipelineError or BudgetError.

        Called by pipelines before their first pass runs, and before this one does.
        """
        return

    def __call__(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Run the pass and check what it declares.

        Raises what `check` does, PipelineError when an annotation it reads is missing, InternalError when it
        fails to write one it declares, or changed the module it was given.
        """
        for key in self.required():
            if key.get(mod) is None:
                raise PipelineError(
                    f"{self.name} reads {key}, which the module lacks: run {key.writer} before"
                )
        self.check()
        before = _snapshot(mod)
        result = self.run(mod, ctx)
        if not isinstance(result, IRModule):
            raise InternalError(f"{self.name} returned {type(result).__name__}, not an IRModule")
        if _snapshot(mod) != before:
            raise InternalError(f"{self.name} changed the module it was given; a pass returns a new one")
        for key in self.writes:
            if key.get(result) is None:
                raise InternalError(f"{self.name} declares that it writes {key}, and did not")
        return result


def _snapshot(mod: IRModule) -> tuple[Any, ...]:
    """What an edit in place changes: functions and attributes, compared by identity as they are immutable."""
    return mod.attrs, dict(mod.functions_items())
