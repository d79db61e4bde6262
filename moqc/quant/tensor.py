"""A quantized matrix, or a stack of them, in memory: codes, scales and zeros before packing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moqc.errors import InternalError
from moqc.quant.formats import Format


def expand_groups(values: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """Repeat a value a group ``[..., G]`` to a value a column ``[..., columns]``."""
    return values.repeat_interleave(group, dim=-1)[..., :columns]


@dataclass(frozen=True, eq=False)
class Quantized:
    """Matrices ``[..., N, K]`` (out x in) in one format: ``w = scale * (value(code) - zero_point)``.

    * `codes`: uint8 ``[..., N, K]``, each below ``format.levels``; those of a trellis format follow its
      trellis (`moqc.quant.pack` refuses others).
    * `scales`: float16 ``[..., N, G]``, ``G = format.groups(K)``; byte scales are float16 numbers with three
      mantissa bits and no sign. Other symmetric formats may have negative ones: their codes reach one step
      further on one side, and the sign of the scale chooses which.
    * `zeros`: uint8 ``[..., N, G]`` zero bytes (the zero point is ``byte * format.zero_step``); None if
      symmetric.
    """

    format: Format
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def __post_init__(self) -> None:
        groups = (*self.codes.shape[:-1], self.format.groups(self.codes.shape[-1]))
        wanted = [("codes", self.codes, torch.uint8, tuple(self.codes.shape))]
        wanted.append(("scales", self.scales, torch.float16, groups))
        if self.zeros is not None:
            wanted.append(("zeros", self.zeros, torch.uint8, groups))
        for name, tensor, dtype, shape in wanted:
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise InternalError(
                    f"{name} of an {self.format} matrix {tuple(self.codes.shape)} are {tensor.dtype} "
                    f"{tuple(tensor.shape)}; expected {dtype} {shape}"
                )
        if (self.zeros is None) != self.format.symmetric:
            given = "no zeros" if self.zeros is None else "zeros"
            raise InternalError(f"a matrix of format {self.format} was given {given}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrices, ``(..., N, K)``."""
        return tuple(self.codes.shape)

    @property
    def zero_points(self) -> torch.Tensor:
        """Zero points in codes, float32 ``[..., N, G]``."""
        if self.zeros is None:
            return torch.full(self.scales.shape, self.format.symmetric_zero, device=self.scales.device)
        return self.zeros.float() * self.format.zero_step

    @property
    def stored_bits(self) -> int:
        """Bits all matrices occupy when packed, padding included."""
        rows, columns = self.shape[-2:]
        matrices = 1
        for size in self.shape[:-2]:
            matrices *= size
        return matrices * self.format.stored_bits(rows, columns)

    @property
    def values(self) -> torch.Tensor:
        """What the codes stand for before zero point and scale: uint8 ``[..., N, K]``."""
        if not self.format.trellis:
            return self.codes
        table = torch.tensor(self.format.values, dtype=torch.uint8, device=self.codes.device)
        return table[self.codes.int()]

    def dequantize(self) -> torch.Tensor:
        """The weights these codes stand for, float32 ``[..., N, K]``."""
        group, columns = self.format.group, self.shape[-1]
        zero_points = expand_groups(self.zero_points, group, columns)
        return expand_groups(self.scales.float(), group, columns) * (self.values - zero_points)
