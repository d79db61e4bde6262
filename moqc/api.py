"""moqc as functions: what the commands call. Importing this module loads neither TVM nor torch."""

from __future__ import annotations

from moqc.compiling import compile, compile_each, opt
from moqc.planning import models, plan
from moqc.reporting import inspect, read_report, recipe, write_report
from moqc.scoring import compare, compare_pruning, evaluate

__all__ = [
    "compare",
    "compare_pruning",
    "compile",
    "compile_each",
    "evaluate",
    "inspect",
    "models",
    "opt",
    "plan",
    "read_report",
    "recipe",
    "write_report",
]
