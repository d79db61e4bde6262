"""moqc: an ahead-of-time compiler for low-bit Mixture-of-Experts language models.

    moqc.compile("model-folder", "out", bits=2.5)
    moqc.load("out").generate("Once upon a time", max_tokens=64)

The names below are imported when they are first used: `import moqc` itself loads neither TVM nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moqc.api import compare, compile, evaluate, inspect, opt
    from moqc.runtime.artifact import Artifact, load

__version__ = "0.1.0"

__all__ = ["Artifact", "compare", "compile", "evaluate", "inspect", "load", "opt"]

_HOMES = {name: "moqc.runtime.artifact" if name in ("Artifact", "load") else "moqc.api" for name in __all__}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moqc' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
