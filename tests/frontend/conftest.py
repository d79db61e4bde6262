"""Tiny random models of five architectures, and moqc's own lowering for the gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import transformers
from small_models import make_config

from moqc.codegen import compile_and_run as compile_for
from moqc.targets import find_target


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., transformers.PretrainedConfig]:
    """``tiny_config(model_type, **changes)``: a tiny configuration."""
    return partial(make_config, max_position_embeddings=256)


@pytest.fixture(scope="session")
def compile_and_run() -> Callable[..., Any]:
    """A `moqc.frontend.gate.CompileAndRun` for this machine."""
    return partial(compile_for, target=find_target("native"))
