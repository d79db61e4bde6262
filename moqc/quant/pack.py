"""Layout ``interleaved16``: how codes lie in memory for the CPU kernels.

A matrix is cut into tiles of 16 rows x 32 columns; a tile of ``bits``-bit codes is exactly ``bits`` lines
of 64 bytes. Codes are split into bit planes of width 8, 4, 2 or 1 (3 bits = a plane of 2 and a plane of 1),
low plane first. A plane of width ``p`` takes ``p`` lines; a line covers ``32 / p`` columns, and its byte
``4 * n + j`` (row ``n`` of 16, ``j`` of 4) holds, for ``i`` in ``0 .. 8 / p - 1``::

    field(row n, column line * (32 / p) + 4 * i + j) << (p * i)

so that the 32-bit lane ``n`` of a line, shifted right by ``p * i`` and masked, is four consecutive columns
of row ``n``: the operand of a 4-way int8 dot product (x86 ``vpdpbusd``, ARM ``udot``) without a shuffle.

Rows are padded to 16 with scale 0, columns to 32 with code 0 (the activations there are 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from moqc.quant.formats import COLUMN_TILE, ROW_TILE, Format
from moqc.quant.tensor import Quantized

LAYOUT = "interleaved16"
LINE = 64
"""Bytes a line."""
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Widths of the bit planes of a code, low bits first, by code width."""

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Packed:
    """Packed matrices; ``N16 = ceil(N / 16)``, ``K32 = ceil(K / 32)``, G groups a row.

    * `codes`: uint8 ``[..., N16, K32, bits, 64]``
    * `scales`: float16 ``[..., N16, G, 16]``
    * `zeros`: uint8 ``[..., N16, G, 16]``, None for symmetric formats.
    """

    codes: Bytes
    scales: npt.NDArray[np.float16]
    zeros: Bytes | None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; equals ``Quantized.stored_bits / 8``."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


def packed_shapes(format: Format, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes, and of the scales (and zeros), of one matrix."""
    tiles = -(-rows // ROW_TILE)
    codes = (tiles, -(-columns // COLUMN_TILE), format.bits, LINE)
    return codes, (tiles, format.groups(columns), ROW_TILE)


def pack(quantized: Quantized) -> Packed:
    """Pack matrices of any leading shape; `unpack` is the exact inverse."""
    zeros = quantized.zeros
    return Packed(
        codes=_pack_codes(quantized.codes.cpu().numpy(), quantized.format.bits),
        scales=_pack_groups(quantized.scales.cpu().numpy()),
        zeros=None if zeros is None else _pack_groups(zeros.cpu().numpy()),
    )


def unpack(packed: Packed, format: Format, rows: int, columns: int) -> Quantized:
    """Recover the ``[..., rows, columns]`` matrices that `pack` was given."""
    codes = _unpack_codes(packed.codes, format.bits)[..., :rows, :columns]
    zeros = packed.zeros
    return Quantized(
        format=format,
        codes=torch.from_numpy(np.ascontiguousarray(codes)),
        scales=torch.from_numpy(_unpack_groups(packed.scales, rows)),
        zeros=None if zeros is None else torch.from_numpy(_unpack_groups(zeros, rows)),
    )


def _pack_codes(codes: Bytes, bits: int) -> Bytes:
    *lead, rows, columns = codes.shape
    padding = [(0, 0)] * len(lead) + [(0, -rows % ROW_TILE), (0, -columns % COLUMN_TILE)]
    padded = np.pad(codes, padding)
    tiles = padded.reshape(*lead, padded.shape[-2] // ROW_TILE, ROW_TILE, -1, COLUMN_TILE).swapaxes(-3, -2)
    planes, low = [], 0
    for width in PLANES[bits]:
        fields = (tiles >> np.uint8(low)) & np.uint8((1 << width) - 1)
        planes.append(_pack_plane(fields, width))
        low += width
    return np.concatenate(planes, axis=-2)


def _pack_plane(fields: Bytes, width: int) -> Bytes:
    """``[..., 16, 32]`` fields of a tile to ``[..., width, 64]`` bytes."""
    split = fields.reshape(*fields.shape[:-1], width, 8 // width, 4)  # [..., row, line, i, j]
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    lines = np.bitwise_or.reduce(split << shifts, axis=-2)  # [..., row, line, j]
    return np.ascontiguousarray(lines.swapaxes(-3, -2)).reshape(*fields.shape[:-2], width, LINE)


def _unpack_codes(packed: Bytes, bits: int) -> Bytes:
    tiles = np.zeros((*packed.shape[:-2], ROW_TILE, COLUMN_TILE), np.uint8)
    low = 0
    for width in PLANES[bits]:
        # The planes are as wide as they are long: low bits and first lines coincide.
        tiles |= _unpack_plane(packed[..., low : low + width, :], width) << np.uint8(low)
        low += width
    *lead, row_tiles, column_tiles, _, _ = tiles.shape
    return tiles.swapaxes(-3, -2).reshape(*lead, row_tiles * ROW_TILE, column_tiles * COLUMN_TILE)


def _unpack_plane(lines: Bytes, width: int) -> Bytes:
    """The inverse of `_pack_plane`."""
    split = lines.reshape(*lines.shape[:-1], ROW_TILE, 1, 4).swapaxes(-4, -3)  # [..., row, line, 1, j]
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    fields = (split >> shifts) & np.uint8((1 << width) - 1)
    return fields.reshape(*lines.shape[:-2], ROW_TILE, COLUMN_TILE)


def _pack_groups(values: npt.NDArray[T]) -> npt.NDArray[T]:
    """``[..., N, G]`` to ``[..., N16, G, 16]``, rows padded with 0."""
    *lead, rows, groups = values.shape
    padded = np.pad(values, [(0, 0)] * len(lead) + [(0, -rows % ROW_TILE), (0, 0)])
    tiles = padded.reshape(*lead, padded.shape[-2] // ROW_TILE, ROW_TILE, groups)
    return np.ascontiguousarray(tiles.swapaxes(-2, -1))


def _unpack_groups(tiles: npt.NDArray[T], rows: int) -> npt.NDArray[T]:
    """The inverse of `_pack_groups`."""
    *lead, row_tiles, groups, _ = tiles.shape
    flat = tiles.swapaxes(-2, -1).reshape(*lead, row_tiles * ROW_TILE, groups)
    return np.ascontiguousarray(flat[..., :rows, :])
