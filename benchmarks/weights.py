"""Random packed weights of a layer on the GPU, and what they dequantize to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
from workload import Shape

from moqc.quant import trellis
from moqc.quant.formats import Format
from moqc.quant.pack import BYTE_SCALE_SHIFT
from moqc.quant.pack_mma import COLUMNS, PackedUnits, fields, packed_shapes, unpack_units

PROJECTIONS = ("gate", "up", "down")


@cache
def _places(format: Format) -> list[tuple[torch.Tensor, ...]]:
    """Word of a row's lanes, shift, mask and lowest bit of each code of a unit's row pair; up to 3 parts."""
    positions, bits = product(range(4), range(2), range(16), range(2), range(2)), format.bits
    found = [fields(format, *position) for position in positions]
    parts = []
    for number in range(max(map(len, found))):
        chosen = [each[number] if number < len(each) else (0, 0, 0, 0, 0) for each in found]
        rows = [
            (lane * 4 * bits + word, shift, (1 << width) - 1, low) for lane, word, shift, width, low in chosen
        ]
        parts.append(tuple(torch.tensor(row, device="cuda") for row in zip(*rows, strict=True)))
    return parts


@dataclass
class Class:
    """One bit class of a projection: packed tensors on the GPU, stacked over its experts."""

    format: Format
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    @classmethod
    def random(cls, fmt: Format, count: int, rows: int, columns: int) -> Class:
        codes_shape, groups_shape = packed_shapes(fmt, rows, columns)
        codes = torch.randint(0, 256, (count, *codes_shape), dtype=torch.uint8, device="cuda")
        # The same size of weights at every width.
        scales = (
            (torch.rand(count, *groups_shape, device="cuda") * 0.02 + 0.005) * (8 / (fmt.values[-1] + 1))
        ).half()
        if fmt.byte_scales:
            scales = (scales.view(torch.int16) >> BYTE_SCALE_SHIFT).to(torch.uint8)
        zeros = None
        if not fmt.symmetric:
            zeros = torch.randint(0, 256, (count, *groups_shape), dtype=torch.uint8, device="cuda")
        return cls(fmt, codes, scales, zeros)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in (self.codes, self.scales, self.zeros) if tensor is not None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def dequantize(self, index: int, tiles: list[int], columns: int) -> torch.Tensor:
        """Row tiles `tiles` of matrix `index`, float32."""
        codes, scales = (tensor[index, tiles].cpu().numpy() for tensor in (self.codes, self.scales))
        zeros = None if self.zeros is None else self.zeros[index, tiles].cpu().numpy()
        packed = PackedUnits(np.ascontiguousarray(codes), scales, zeros)
        return unpack_units(packed, self.format, 16 * len(tiles), columns).dequantize().cuda()

    def whole(self, index: int) -> torch.Tensor:
        """Matrix `index`, float32, its padding too; unpacked on the GPU."""
        fmt, (tiles, units) = self.format, self.codes.shape[1:3]
        lanes = self.codes[index].view(torch.int32).view(tiles, units, fmt.bits, 32, 4)
        words = lanes.transpose(2, 3).reshape(tiles, units, 8, 4 * 4 * fmt.bits)
        codes: torch.Tensor | int = 0
        for word, shift, mask, low in _places(fmt):
            codes = codes + ((words[..., word] >> shift & mask) << low)
        # lane, half, v, j, row half, h -> row half, g, unit, half, v, lane, j, h
        split = codes.view(tiles, units, 8, 4, 2, 4, 4, 2, 2).permute(0, 7, 2, 1, 4, 5, 3, 6, 8)
        rows = split.reshape(16 * tiles, units * COLUMNS)
        if fmt.trellis:
            rows = torch.tensor(fmt.values, device="cuda")[trellis.decode(rows).long()]

        def by_row(values: torch.Tensor) -> torch.Tensor:
            rows = values[index].permute(0, 4, 2, 1, 3).reshape(16 * tiles, -1)
            return rows.float().repeat_interleave(fmt.group, 1)

        zero = fmt.symmetric_zero if self.zeros is None else by_row(self.zeros) * fmt.zero_step
        scales = self.scales
        if fmt.byte_scales:
            scales = (scales.to(torch.int16) << BYTE_SCALE_SHIFT).view(torch.float16)
        return (rows.float() - zero) * by_row(scales)


@dataclass
class Weights:
    """One copy of a layer."""

    shape: Shape
    classes: dict[str, list[Class]]
    table: torch.Tensor

    @classmethod
    def random(cls, shape: Shape, formats: list[list[str]]) -> Weights:
        table = torch.zeros(3, shape.experts, 2, dtype=torch.int32)
        classes: dict[str, list[Class]] = {}
        for number, (projection, names) in enumerate(zip(PROJECTIONS, formats, strict=True)):
            rows, columns = shape.intermediate, shape.hidden
            if projection == "down":
                rows, columns = columns, rows
            classes[projection] = []
            for at, name in enumerate(names):
                members = list(range(at, shape.experts, len(names)))
                classes[projection].append(Class.random(Format.parse(name), len(members), rows, columns))
                for index, expert in enumerate(members):
                    table[number, expert] = torch.tensor([at, index])
        return cls(shape, classes, table.cuda())

    def operands(self, *projections: str) -> list[torch.Tensor]:
        return [tensor for name in projections for each in self.classes[name] for tensor in each.tensors]

    @property
    def expert_bytes(self) -> float:
        total = sum(each.nbytes for classes in self.classes.values() for each in classes)
        return total / self.shape.experts

    def dequantize(self, projection: str, expert: int, tiles: list[int]) -> torch.Tensor:
        at, index = self.table[PROJECTIONS.index(projection), expert].tolist()
        columns = self.shape.intermediate if projection == "down" else self.shape.hidden
        return self.classes[projection][at].dequantize(index, tiles, columns)

    def whole(self, projection: str, expert: int) -> torch.Tensor:
        """The whole matrix, float32."""
        at, index = self.table[PROJECTIONS.index(projection), expert].tolist()
        rows, columns = self.shape.intermediate, self.shape.hidden
        if projection == "down":
            rows, columns = columns, rows
        return self.classes[projection][at].whole(index)[:rows, :columns]
