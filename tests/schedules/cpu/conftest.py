"""What the tests of packed kernels share: random packed matrices, and functions compiled in one module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qemu_board
import torch
import tvm
from random_codes import random_codes
from tvm import relax

from moqc.quant import grid
from moqc.quant.formats import Format
from moqc.quant.pack import pack
from moqc.quant.tensor import Quantized
from moqc.targets import Target, find_target, missing_features
from moqc.toolchains import linker

Lower = Callable[[relax.BlockBuilder, relax.Call, Target], relax.Expr]


def _random_quantized(generator: torch.Generator, fmt: Format, *shape: int) -> Quantized:
    """Matrices with random codes, scales and zeros (not the rounding of any weights)."""
    groups = (*shape[:-1], fmt.groups(shape[-1]))
    codes = random_codes(fmt, shape, generator)
    scales = torch.rand(groups, generator=generator) * 0.02 + 0.001
    scales = grid.rounded(scales, scales, fmt).scale.half()
    zeros = None
    if not fmt.symmetric:
        zeros = torch.randint(0, 256, groups, generator=generator, dtype=torch.uint8)
    return Quantized(fmt, codes, scales, zeros)


def _packed(quantized: Quantized, prefix: str = "") -> dict[str, np.ndarray]:
    """Operands by name, the zeros left out when symmetric."""
    packed = pack(quantized)
    arrays = {"codes": packed.codes, "scales": packed.scales, "zeros": packed.zeros}
    return {prefix + name: array for name, array in arrays.items() if array is not None}


@dataclass
class Functions:
    """Relax functions, each one lowered operator; compiled together by the first `run`."""

    target: Target
    builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)
    machine: relax.VirtualMachine | None = None

    def add(
        self,
        name: str,
        inputs: Sequence[relax.Var],
        operands: dict[str, np.ndarray],
        call: Callable[..., relax.Call],
        lower: Lower,
    ) -> None:
        """Add ``name(*inputs, *operands)`` computing ``lower(call(*inputs, *operands))``."""
        weights = [
            relax.Var(key.replace(".", "_"), relax.TensorType(array.shape, str(array.dtype)))
            for key, array in operands.items()
        ]
        bb = self.builder
        with bb.function(name, [*inputs, *weights]):
            with bb.dataflow():
                operator = bb.normalize(call(*inputs, *weights))
                result = bb.emit_output(lower(bb, operator, self.target))
            bb.emit_func_output(result)

    def run(self, name: str, *arguments: np.ndarray) -> np.ndarray:
        """Call a function."""
        if self.machine is None:
            executable = tvm.compile(self.builder.get(), tvm.target.Target(self.target.tvm))
            self.machine = relax.VirtualMachine(executable, tvm.cpu())
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(argument)) for argument in arguments]
        return self.machine[name](*tensors).numpy()


@dataclass
class RemoteFunctions(Functions):
    """The same on a board, by TVM's RPC."""

    remote: Any = None
    folder: Path = Path()

    def run(self, name: str, *arguments: np.ndarray) -> np.ndarray:
        device = self.remote.cpu()
        if self.machine is None:
            executable = tvm.compile(self.builder.get(), tvm.target.Target(self.target.tvm))
            library = self.folder / "functions.so"
            executable.export_library(str(library), cc=str(linker(self.target.machine).require()))
            self.remote.upload(bytearray(library.read_bytes()), library.name)
            self.machine = relax.VirtualMachine(self.remote.load_module(library.name), device)
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(argument), device) for argument in arguments]
        self.machine.set_input(name, *tensors)
        self.machine.invoke_stateful(name)
        return self.machine.get_outputs(name).numpy()


@dataclass(frozen=True)
class Toolbox:
    """The helpers, as one fixture."""

    generator: torch.Generator

    def quantized(self, name: str, *shape: int) -> Quantized:
        return _random_quantized(self.generator, Format.parse(name), *shape)

    def packed(self, quantized: Quantized, prefix: str = "") -> dict[str, np.ndarray]:
        return _packed(quantized, prefix)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)


@pytest.fixture(scope="module")
def toolbox() -> Toolbox:
    return Toolbox(torch.Generator().manual_seed(0))


@pytest.fixture(
    scope="module",
    params=[
        *("x86-64-v4-amx", "x86-64-v4-gfni", "x86-64-v4-vnni", "x86-64-v4", "x86-64-v3"),
        *(pytest.param(name, marks=pytest.mark.qemu) for name in qemu_board.CORES),
    ],
)
def functions(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Functions]:
    """An empty set of functions for each instruction family this machine can run, or qemu can."""
    target = find_target(request.param)
    if target.name in qemu_board.CORES:
        with qemu_board.rpc_server(qemu_board.CORES[target.name]) as port:
            remote = qemu_board.connect(port)
            yield RemoteFunctions(target, remote=remote, folder=tmp_path_factory.mktemp("library"))
            return
    if missing := missing_features(target):
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    yield Functions(target)


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Any, Any], float]:
    """Frobenius norm of the difference, relative to the second."""

    def measure(actual: Any, expected: Any) -> float:
        actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
        return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))

    return measure
