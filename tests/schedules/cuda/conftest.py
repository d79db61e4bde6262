from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import tvm


@pytest.fixture(scope="session")
def build() -> Callable[[Mapping[str, Any]], Any]:
    """Compiles PrimFuncs by name for an architecture with nvcc; needs no GPU."""

    def compile_functions(functions: Mapping[str, Any], architecture: str = "sm_90") -> Any:
        from moqc.schedules.cuda import toolchain

        toolchain.prepare([architecture])
        facts = {"kind": "cuda", "arch": architecture, "max_threads_per_block": 1024}
        target = tvm.target.Target(facts, host="llvm")
        with target:
            named = {name: each.with_attr("global_symbol", name) for name, each in functions.items()}
            return tvm.compile(tvm.IRModule(named), target=target)

    return compile_functions
