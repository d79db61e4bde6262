"""Time the experts kernels of a target on the layer of a known model, beside the machine's read bandwidth."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, tirx

from moqc.bench.memory import read_bandwidth
from moqc.bench.shapes import Shape, find_shape
from moqc.errors import TargetError, UserError
from moqc.ir import ops
from moqc.ir.packed import mixed_operands, packed_types
from moqc.log import track
from moqc.passes.legalize import LOWERINGS
from moqc.quant.formats import Format
from moqc.quant.pack import BYTE_SCALE_SHIFT
from moqc.targets import Target, find_target, missing_features

COLD_BYTES = 1 << 30
"""Weights that lie between two uses of the same ones."""
SECONDS = 1.0
"""Time spent on one row, at least."""
_TURNS = 7
"""Turns of kernel calls and plain reads."""


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One measured row: the whole experts block, from activations to the weighted sum.

    `bits` is an entry of ``--bits``, `weights` is ``hot`` or ``cold``, `us` the median time of a call.
    `gb_per_s`: bytes of the packed matrices of the distinct experts hit, over that time, in 1e9 bytes;
    `read_gb_per_s`: what plain reads reach in the same run; `gflops`: 2 x multiply-adds over the time.
    """

    target: str
    shape: str
    bits: str
    tokens: int
    weights: str
    us: float
    gb_per_s: float
    read_gb_per_s: float
    gflops: float

    def to_dict(self) -> dict[str, Any]:
        """A row of ``--json``."""
        return dataclasses.asdict(self)


def parse_classes(text: str) -> tuple[Format, ...]:
    """The formats of one entry of ``--bits``: ``4``, or ``4/2/1`` for experts that take these in turn.

    A number stands for the compiler's default format of so many bits; a format's name may stand in its place.
    Raises UserError.
    """
    names = text.split("/")
    return tuple(Format.parse(f"int{name}-g64" if name.isdigit() else name) for name in names)


def bench_kernels(
    target: str, shape: str, bits: Sequence[str], tokens: Sequence[int], *, cold: bool = True
) -> list[KernelTime]:
    """Measure every combination. Cold: each call finds its weights out of the caches, `COLD_BYTES` later.

    Raises UserError for an unknown name or a bad number, TargetError when this machine cannot run the target.
    """
    machine, layer = find_target(target), find_shape(shape)
    missing = missing_features(machine)
    if missing:
        raise TargetError(
            f"{machine.name}: this machine lacks {', '.join(missing)}; measure on one that has it"
        )
    if not tokens or min(tokens) < 1:
        raise UserError(f"tokens {', '.join(map(str, tokens)) or 'none'}: must be at least 1")
    classes = [parse_classes(text) for text in bits]
    bandwidth = read_bandwidth(machine, COLD_BYTES)
    rows = []
    for text, formats in track(list(zip(bits, classes, strict=True)), "kernels"):
        bench = _Layer(machine, layer, formats, COLD_BYTES if cold else 0)
        for count in tokens:
            seconds, hit_bytes, read = bench.measure(count, bandwidth)
            rows.append(
                KernelTime(
                    target=machine.name,
                    shape=shape,
                    bits=text,
                    tokens=count,
                    weights="cold" if cold else "hot",
                    us=seconds * 1e6,
                    gb_per_s=hit_bytes / seconds / 1e9,
                    read_gb_per_s=read / 1e9,
                    gflops=2 * count * layer.top_k * layer.weights_per_expert / seconds / 1e9,
                )
            )
    return rows


class _Layer:
    """The compiled experts block with sets of random weights; expert e takes class ``e mod classes``."""

    def __init__(self, target: Target, shape: Shape, formats: Sequence[Format], cold_bytes: int) -> None:
        self._shape = shape
        self._random = np.random.default_rng(0)
        self._formats = formats
        types = self._operand_types()
        self._run = _compile(target, shape, formats, types)
        first = self._weights(types)
        self._bytes = [sum(fmt.stored_bits(*rc) for rc in self._extents()) / 8 for fmt in formats]
        total = sum(self._bytes[expert % len(formats)] for expert in range(shape.experts))
        sets = max(1, -(-cold_bytes // int(total)))
        self._sets = [first, *(self._weights(types) for _ in range(sets - 1))]

    def measure(self, tokens: int, bandwidth: Callable[[], float]) -> tuple[float, float, float]:
        """Seconds a call, bytes of the experts it hits, and `bandwidth` measured in between; all medians.

        Calls and reads take turns, because a machine that others share changes its speed within seconds.
        """
        shape = self._shape
        x = tvm.runtime.tensor(self._random.standard_normal((tokens, shape.hidden), np.float32))
        shares = tvm.runtime.tensor(self._random.random((tokens, shape.top_k), np.float32))
        calls = self._calls(tokens)
        times: list[float] = []
        sizes: list[float] = []
        reads: list[float] = []
        self._run(x, next(calls)[0], shares, *self._sets[0])  # starts the threads
        for turn in range(_TURNS):
            reads.append(bandwidth())
            end = time.perf_counter() + SECONDS / _TURNS
            while time.perf_counter() < end or len(times) <= turn:
                ids, size, weights = next(calls)
                start = time.perf_counter()
                self._run(x, ids, shares, *weights)
                times.append(time.perf_counter() - start)
                sizes.append(size)
        return statistics.median(times), statistics.median(sizes), statistics.median(reads)

    def _calls(self, tokens: int) -> Iterator[tuple[Any, float, list[Any]]]:
        """Routings with their bytes and the set of weights. One set: the same routing over and over.

        Otherwise each visits all sets before it comes again, and with one token the next hits other experts.
        """
        shape, classes = self._shape, len(self._formats)
        turns = 1 if len(self._sets) == 1 else max(1, shape.experts // (tokens * shape.top_k))
        order = self._random.permuted(np.tile(np.arange(shape.experts), (tokens, 1)), axis=1)
        while True:
            for turn in range(turns):
                ids = np.roll(order, -turn * shape.top_k, axis=1)[:, : shape.top_k]
                size = sum(self._bytes[expert % classes] for expert in np.unique(ids))
                routed = tvm.runtime.tensor(np.ascontiguousarray(ids))
                for weights in self._sets:
                    yield routed, size, weights

    def _extents(self) -> list[tuple[int, int]]:
        """Rows and columns of gate, up and down."""
        hidden, intermediate = self._shape.hidden, self._shape.intermediate
        return [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]

    def _operand_types(self) -> dict[str, relax.TensorType]:
        experts, count = self._shape.experts, len(self._formats)
        types = {"table": relax.TensorType([3, experts, 2], "int32")}
        for projection, (rows, columns) in zip(ops.PROJECTIONS, self._extents(), strict=True):
            for number, fmt in enumerate(self._formats):
                members = len(range(number, experts, count))
                for part, ty in packed_types(fmt, rows, columns, (members,)).items():
                    types[f"{projection}.{number}.{part}"] = ty
        return types

    def _weights(self, types: dict[str, relax.TensorType]) -> list[Any]:
        """Random operands of one layer."""
        return [tvm.runtime.tensor(self._operand(name, ty)) for name, ty in types.items()]

    def _operand(self, name: str, ty: relax.TensorType) -> NDArray[Any]:
        extents = [int(extent) for extent in ty.shape]
        if name == "table":
            expert = np.arange(self._shape.experts)
            place = np.stack([expert % len(self._formats), expert // len(self._formats)], axis=-1)
            return np.broadcast_to(place, extents).astype(np.int32)
        if name.endswith(".scales"):
            scales = self._random.uniform(0.001, 0.02, extents).astype(np.float16)
            upper = (scales.view(np.uint16) >> BYTE_SCALE_SHIFT).astype(np.uint8)
            return upper if str(ty.dtype) == "uint8" else scales
        return np.frombuffer(self._random.bytes(int(np.prod(extents))), np.uint8).reshape(extents)


def _compile(
    target: Target, shape: Shape, formats: Sequence[Format], types: dict[str, relax.TensorType]
) -> Callable[..., Any]:
    """The block as a function (x, ids, weights, *operands) -> y."""
    tokens = tirx.Var("t", "int64")
    inputs = [
        relax.Var("x", relax.TensorType([tokens, shape.hidden], "float32")),
        relax.Var("ids", relax.TensorType([tokens, shape.top_k], "int64")),
        relax.Var("weights", relax.TensorType([tokens, shape.top_k], "float32")),
    ]
    weights = [relax.Var(name.replace(".", "_"), ty) for name, ty in types.items()]
    builder = relax.BlockBuilder()
    with builder.function("block", [*inputs, *weights]):
        with builder.dataflow():
            call = ops.mixed_experts(
                *inputs,
                *weights,
                site="bench",
                activation=shape.activation,
                activations="int8",
                operands=mixed_operands(dict.fromkeys(ops.PROJECTIONS, formats), ()),
                classes=[f"{projection}:{fmt}" for projection in ops.PROJECTIONS for fmt in formats],
                intermediate=shape.intermediate,
            )
            lower = LOWERINGS[target.schedules].operators[ops.MIXED_EXPERTS]
            result = builder.emit_output(lower(builder, builder.normalize(call), target))
        builder.emit_func_output(result)
    machine = relax.VirtualMachine(tvm.compile(builder.get(), tvm.target.Target(target.tvm)), tvm.cpu())
    run: Callable[..., Any] = machine["block"]
    return run
