"""Every error moqc raises, drawn once.

    MoqcError
    ├── UserError             the input is wrong; one line, exit code 2, nothing written
    │   ├── ModelError        a checkpoint that is missing, truncated, dense, or refused by the gate
    │   ├── BudgetError       bits or bytes that no plan can reach
    │   ├── ArtifactError     an artifact folder that is invalid, changed, or of another version
    │   ├── PipelineError     a pipeline text that does not parse, or passes in an order that cannot work
    │   └── TargetError       an unknown target, a missing toolchain, or a host that lacks a CPU feature
    ├── PassError             a pass failed; carries the path of a reproducer; exit code 1
    ├── VerifyError           an IR module breaks a rule of `moqc.ir.verify`; exit code 1
    └── InternalError         a bug in moqc; asks for a report; exit code 1

A message says what is wrong, where, and what to do.
"""

from __future__ import annotations


class MoqcError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


class UserError(MoqcError):
    """The user's input is wrong. The message is the whole story: one line, no traceback."""

    exit_code = 2


class ModelError(UserError):
    """A checkpoint is missing, truncated, of a wrong dtype, dense, or an architecture the gate refuses."""


class BudgetError(UserError):
    """A size budget that no plan reaches; the message gives the reachable range."""


class ArtifactError(UserError):
    """An artifact folder is incomplete, altered, or was built for another version or machine."""


class PipelineError(UserError):
    """A pipeline text does not parse, or its passes are in an order that cannot work."""


class TargetError(UserError):
    """An unknown target, a missing toolchain, or a host without a CPU feature the target needs."""


class PassError(MoqcError):
    """A pass failed. `__cause__` holds the original error; the message names the reproducer."""


class VerifyError(MoqcError):
    """An IR module breaks a rule of `moqc.ir.verify`."""


class InternalError(MoqcError):
    """A bug in moqc itself."""


def reason(error: BaseException) -> str:
    """Why a file could not be read or written, without its path, which the message names already."""
    return getattr(error, "strerror", None) or str(error)
