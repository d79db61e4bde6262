"""moqc: an ahead-of-time compiler for low-bit Mixture-of-Experts language models.

    moqc.compile("model-folder", "out", bits=2.5)
    moqc.load("out").generate("Once upon a time", max_tokens=64)

The names below are imported when they are first used: `import moqc` itself loads neither TVM nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moqc.api import compare, compile, compile_each, inspect, opt, plan
    from moqc.api import evaluate as eval
    from moqc.artifact import Artifact, load
    from moqc.runtime.graph import load_graph

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "compare",
    "compile",
    "compile_each",
    "eval",
    "inspect",
    "load",
    "load_graph",
    "opt",
    "plan",
]

_HOMES = {
    "Artifact": ("moqc.artifact", "Artifact"),
    "load": ("moqc.artifact", "load"),
    "load_graph": ("moqc.runtime.graph", "load_graph"),
    "eval": ("moqc.api", "evaluate"),  # moqc.evaluate is a package
    **{name: ("moqc.api", name) for name in ("compare", "compile", "compile_each", "inspect", "opt", "plan")},
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moqc' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
