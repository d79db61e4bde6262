"""The experts block of a known model with random weights, compiled: what kernels are timed on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import tvm
from numpy.typing import NDArray
from tvm import relax, tirx

from moqc.bench.shapes import Shape
from moqc.ir import ops
from moqc.ir.packed import mixed_operands, packed_types
from moqc.passes.legalize import LOWERINGS
from moqc.passes.packed_kernels import Lowering
from moqc.quant import reference
from moqc.quant.formats import Format
from moqc.quant.layouts import find_layout
from moqc.quant.pack import BYTE_SCALE_SHIFT, Packed
from moqc.targets import Target


class RandomLayer:
    """An experts block with random packed weights on `device`; expert e takes class ``e mod classes``.

    `sets` have at least `cold_bytes` together, each a list of tensors in the order of `types`.
    """

    def __init__(
        self, target: Target, shape: Shape, formats: Sequence[Format], cold_bytes: int, device: Any = None
    ) -> None:
        self._random = np.random.default_rng(0)
        self.target, self.shape, self.formats, self._cold = target, shape, tuple(formats), cold_bytes > 0
        self._device, self.types = device or tvm.cpu(), self._operand_types()
        self._bytes = [sum(fmt.stored_bits(*rc) for rc in self._extents()) / 8 for fmt in formats]
        total = sum(self._bytes[expert % len(formats)] for expert in range(shape.experts))
        self.sets = [self._weights() for _ in range(max(1, -(-cold_bytes // int(total))))]

    def put(self, array: NDArray[Any]) -> Any:
        """A tensor on the device."""
        return tvm.runtime.tensor(array, self._device)

    def inputs(self, tokens: int) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
        """Random activations, ids of distinct experts, and their weights."""
        shape = self.shape
        x = self._random.standard_normal((tokens, shape.hidden), np.float32)
        ids = self._random.random((tokens, shape.experts)).argsort(axis=1)[:, : shape.top_k]
        return x, np.ascontiguousarray(ids), self._random.random((tokens, shape.top_k), np.float32)

    def expected(self, x: NDArray[Any], ids: NDArray[Any], shares: NDArray[Any]) -> torch.Tensor:
        """What the reference says the block gives with the first set, one expert dequantized at a time."""
        operands = {name: tensor.numpy() for name, tensor in zip(self.types, self.sets[0], strict=True)}
        total = torch.zeros(len(x), self.shape.hidden)
        for expert in np.unique(ids[ids >= 0]).tolist():
            number, index = operands["table"][0, expert].tolist()
            mine = torch.from_numpy(np.where(ids == expert, 0, -1))
            matrices = {
                name: self._dense(operands, f"{name}.{number}.", index, self.formats[number], *extents)
                for name, extents in zip(ops.PROJECTIONS, self._extents(), strict=True)
            }
            total += reference.experts(
                torch.from_numpy(x),
                mine,
                torch.from_numpy(shares),
                **matrices,
                activation=self.shape.activation,
                activations="int8" if self.target.activations[0] == "int8" else "float",
            )
        return total

    def _dense(
        self, operands: dict[str, NDArray[Any]], prefix: str, index: int, fmt: Format, rows: int, columns: int
    ) -> torch.Tensor:
        """One expert's matrix, float32 [1, N, K]."""
        codes, scales = (operands[prefix + part][index : index + 1] for part in ("codes", "scales"))
        zeros = None if fmt.symmetric else operands[f"{prefix}zeros"][index : index + 1]
        packed = Packed(codes=codes, scales=scales, zeros=zeros)
        return find_layout(self.target.layout).unpack(packed, fmt, rows, columns).dequantize()

    def calls(self, tokens: int) -> Iterator[tuple[Any, float, list[Any]]]:
        """Routings with their bytes and the set of weights. Hot: the same routing over and over.

        Cold: each visits all sets before it comes again, and with one token the next hits other experts.
        """
        shape, classes = self.shape, len(self.formats)
        turns = max(1, shape.experts // (tokens * shape.top_k)) if self._cold else 1
        order = self._random.permuted(np.tile(np.arange(shape.experts), (tokens, 1)), axis=1)
        while True:
            for turn in range(turns):
                ids = np.roll(order, -turn * shape.top_k, axis=1)[:, : shape.top_k]
                size = sum(self._bytes[expert % classes] for expert in np.unique(ids))
                routed = self.put(np.ascontiguousarray(ids))
                for weights in self.sets:
                    yield routed, size, weights

    def _extents(self) -> list[tuple[int, int]]:
        """Rows and columns of gate, up and down."""
        hidden, intermediate = self.shape.hidden, self.shape.intermediate
        return [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]

    def _operand_types(self) -> dict[str, relax.TensorType]:
        experts, count = self.shape.experts, len(self.formats)
        types = {"table": relax.TensorType([3, experts, 2], "int32")}
        for projection, (rows, columns) in zip(ops.PROJECTIONS, self._extents(), strict=True):
            for number, fmt in enumerate(self.formats):
                members = len(range(number, experts, count))
                for part, ty in packed_types(fmt, rows, columns, (members,), self.target.layout).items():
                    types[f"{projection}.{number}.{part}"] = ty
        return types

    def _weights(self) -> list[Any]:
        """Random operands of one layer."""
        return [self.put(self._operand(name, ty)) for name, ty in self.types.items()]

    def _operand(self, name: str, ty: relax.TensorType) -> NDArray[Any]:
        extents = [int(extent) for extent in ty.shape]
        if name == "table":
            expert = np.arange(self.shape.experts)
            place = np.stack([expert % len(self.formats), expert // len(self.formats)], axis=-1)
            return np.broadcast_to(place, extents).astype(np.int32)
        if name.endswith(".scales"):
            scales = self._random.uniform(0.001, 0.02, extents).astype(np.float16)
            upper = (scales.view(np.uint16) >> BYTE_SCALE_SHIFT).astype(np.uint8)
            return upper if str(ty.dtype) == "uint8" else scales
        return np.frombuffer(self._random.bytes(int(np.prod(extents))), np.uint8).reshape(extents)


class Layer(RandomLayer):
    """The same compiled with its target's default plans, or recorded ones, for this machine's CPU."""

    @cached_property
    def _run(self) -> Any:
        return self.compile(LOWERINGS[self.target.schedules].operators[ops.MIXED_EXPERTS])["block"]

    def compile(self, lower: Lowering) -> relax.VirtualMachine:
        """The block, lowered so: a machine with the function ``block(x, ids, weights, *operands) -> y``."""
        return relax.VirtualMachine(self.build(lower), tvm.cpu())

    def build(self, lower: Lowering) -> Any:
        """The library of that machine."""
        shape, tokens = self.shape, tirx.Var("t", "int64")
        inputs = [
            relax.Var("x", relax.TensorType([tokens, shape.hidden], "float32")),
            relax.Var("ids", relax.TensorType([tokens, shape.top_k], "int64")),
            relax.Var("weights", relax.TensorType([tokens, shape.top_k], "float32")),
        ]
        weights = [relax.Var(name.replace(".", "_"), ty) for name, ty in self.types.items()]
        builder = relax.BlockBuilder()
        with builder.function("block", [*inputs, *weights]):
            with builder.dataflow():
                call = ops.mixed_experts(
                    *inputs,
                    *weights,
                    site="bench",
                    activation=shape.activation,
                    activations=self.target.activations[0],
                    operands=mixed_operands(dict.fromkeys(ops.PROJECTIONS, self.formats), ()),
                    classes=[f"{projection}:{fmt}" for projection in ops.PROJECTIONS for fmt in self.formats],
                    intermediate=shape.intermediate,
                )
                result = builder.emit_output(lower(builder, builder.normalize(call), self.target))
            builder.emit_func_output(result)
        return tvm.compile(builder.get(), tvm.target.Target(self.target.tvm))

    def timed(self, tokens: int) -> Callable[[], tuple[float, float]]:
        """A function that makes the next of `calls`: its seconds, and the bytes of the experts it hits."""
        x, _, shares = (tvm.runtime.tensor(each) for each in self.inputs(tokens))
        calls = self.calls(tokens)

        def run() -> tuple[float, float]:
            ids, size, weights = next(calls)
            start = time.perf_counter()
            self._run(x, ids, shares, *weights)
            return time.perf_counter() - start, size

        return run
