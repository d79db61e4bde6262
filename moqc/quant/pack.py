"""Layout ``interleaved16``: how codes lie in memory for the CPU kernels.

A matrix is cut into tiles of 16 rows x 32 columns; a tile of ``bits``-bit codes is exactly ``bits`` lines
of 64 bytes. The columns of a tile are taken four at a time: ``v`` counts the fours, ``j`` the columns in
one. `FIELDS` says for each ``v`` where its codes are: in byte ``4 * n + j`` of a line (row ``n`` of 16), as
one field of bits or, for the last two fours of 3-bit codes, as two. A 32-bit lane ``n`` of a line, shifted
and masked, is then four consecutive columns of row ``n``: the operand of a 4-way int8 dot product (x86
``vpdpbusd``, ARM ``udot``) without a shuffle.

What a trellis format stores of a weight (`moqc.quant.trellis`) has its bits ``u`` in the first line and the
uncoded rest in those that follow (`TRELLIS_FIELDS`). The lanes of ``u`` rotated by one and by two are the
neighbours' bits. Byte scales are the upper bytes of the float16 numbers.

Rows are padded to 16 with scale 0, columns to 32 with code 0 (the activations there are 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from moqc.errors import InternalError
from moqc.quant import trellis
from moqc.quant.formats import COLUMN_TILE, ROW_TILE, Format
from moqc.quant.tensor import Quantized

LAYOUT = "interleaved16"
LINE = 64
"""Bytes a line."""
FOURS = COLUMN_TILE // 4
"""Operands of a dot product in a tile."""


class Field(NamedTuple):
    """`width` bits of a code from its bit `place` on, which are at bit `shift` of a byte of line `line`."""

    line: int
    shift: int
    width: int
    place: int = 0

    @property
    def mask(self) -> int:
        """`width` ones."""
        return (1 << self.width) - 1


def _fields(bits: int) -> tuple[tuple[Field, ...], ...]:
    """Codes of `bits` bits that fill bytes evenly: ``8 / bits`` fours a line."""
    per_line = 8 // bits
    return tuple((Field(v // per_line, v % per_line * bits, bits),) for v in range(FOURS))


FIELDS: dict[int, tuple[tuple[Field, ...], ...]] = {
    **{bits: _fields(bits) for bits in (1, 2, 4, 8)},
    # Two codes in the low six bits of a byte; the other two bits of the three lines make the last two codes.
    3: (
        *((Field(line, shift, 3),) for line in range(3) for shift in (0, 3)),
        (Field(0, 6, 2), Field(2, 6, 1, 2)),
        (Field(1, 6, 2), Field(2, 7, 1, 2)),
    ),
}
"""Width of the codes -> for each four of a tile the fields that make up its codes."""
TRELLIS_FIELDS: dict[int, tuple[tuple[Field, ...], ...]] = {
    1: tuple((Field(0, v, 1),) for v in range(FOURS)),
    2: tuple((Field(0, v, 1), Field(1, v, 1, 1)) for v in range(FOURS)),
    3: tuple((Field(0, v, 1), Field(1 + v % 4 // 2, v // 4 * 4 + v % 2 * 2, 2, 1)) for v in range(FOURS)),
}
"""Likewise, by bits, for what trellis formats store of a weight: ``u + 2 * high``."""
BYTE_SCALE_SHIFT = 7
"""A byte scale is a float16 shifted right by so many bits: no sign, 5 exponent and 3 mantissa bits."""

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Packed:
    """Packed matrices; ``N16 = ceil(N / 16)``, ``K32 = ceil(K / 32)``, G groups a row.

    * `codes`: uint8 ``[..., N16, K32, bits, 64]``
    * `scales`: float16 ``[..., N16, G, 16]``; uint8 if the format has byte scales
    * `zeros`: uint8 ``[..., N16, G, 16]``, None for symmetric formats.
    """

    codes: Bytes
    scales: npt.NDArray[np.float16] | Bytes
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


def stored_fields(fmt: Format) -> tuple[tuple[Field, ...], ...]:
    """For each four of a tile the fields that make up what a format stores of a weight."""
    return (TRELLIS_FIELDS if fmt.trellis else FIELDS)[fmt.bits]


def pack(quantized: Quantized) -> Packed:
    """Pack matrices of any leading shape; `unpack` is the exact inverse.

    Raises InternalError for codes or scales that the format cannot store.
    """
    fmt, zeros = quantized.format, quantized.zeros
    codes = trellis.encode(quantized.codes) if fmt.trellis else quantized.codes
    scales = quantized.scales.cpu().numpy()
    return Packed(
        codes=_pack_codes(codes.cpu().numpy(), fmt),
        scales=_pack_groups(upper_bytes(scales)) if fmt.byte_scales else _pack_groups(scales),
        zeros=None if zeros is None else _pack_groups(zeros.cpu().numpy()),
    )


def unpack(packed: Packed, format: Format, rows: int, columns: int) -> Quantized:
    """Recover the ``[..., rows, columns]`` matrices that `pack` was given."""
    codes = torch.from_numpy(_unpack_codes(packed.codes, format))
    if format.trellis:
        codes = trellis.decode(codes)
    scales, zeros = _unpack_groups(packed.scales, rows), packed.zeros
    if format.byte_scales:
        scales = from_upper_bytes(scales.astype(np.uint8))
    return Quantized(
        format=format,
        codes=codes[..., :rows, :columns].contiguous(),
        scales=torch.from_numpy(scales),
        zeros=None if zeros is None else torch.from_numpy(_unpack_groups(zeros, rows)),
    )


def upper_bytes(scales: npt.NDArray[np.float16]) -> Bytes:
    """What byte formats store of their scales; InternalError for scales that it loses something of."""
    bits = scales.view(np.uint16) >> BYTE_SCALE_SHIFT
    if not np.array_equal((bits << BYTE_SCALE_SHIFT).view(np.float16), scales) or (bits > 255).any():
        raise InternalError("byte scales have a sign or more than three bits of mantissa")
    return bits.astype(np.uint8)


def from_upper_bytes(stored: Bytes) -> npt.NDArray[np.float16]:
    """The scales of a byte format, from what is stored."""
    return (stored.astype(np.uint16) << BYTE_SCALE_SHIFT).view(np.float16)


def _pack_codes(codes: Bytes, fmt: Format) -> Bytes:
    *lead, rows, columns = codes.shape
    padding = [(0, 0)] * len(lead) + [(0, -rows % ROW_TILE), (0, -columns % COLUMN_TILE)]
    padded = np.pad(codes, padding)
    tiles = padded.reshape(*lead, padded.shape[-2] // ROW_TILE, ROW_TILE, -1, COLUMN_TILE).swapaxes(-3, -2)
    fours = tiles.reshape(*tiles.shape[:-1], FOURS, 4)  # [..., row, v, j]
    lines = np.zeros((*tiles.shape[:-2], fmt.bits, ROW_TILE, 4), np.uint8)
    for v, fields in enumerate(stored_fields(fmt)):
        for field in fields:
            part = (fours[..., v, :] >> np.uint8(field.place)) & np.uint8(field.mask)
            lines[..., field.line, :, :] |= part << np.uint8(field.shift)
    return lines.reshape(*lines.shape[:-2], LINE)


def _unpack_codes(packed: Bytes, fmt: Format) -> Bytes:
    lines = packed.reshape(*packed.shape[:-1], ROW_TILE, 4)
    fours = np.zeros((*packed.shape[:-2], ROW_TILE, FOURS, 4), np.uint8)
    for v, fields in enumerate(stored_fields(fmt)):
        for field in fields:
            part = (lines[..., field.line, :, :] >> np.uint8(field.shift)) & np.uint8(field.mask)
            fours[..., v, :] |= part << np.uint8(field.place)
    tiles = fours.reshape(*fours.shape[:-2], COLUMN_TILE)
    *lead, row_tiles, column_tiles, _, _ = tiles.shape
    return tiles.swapaxes(-3, -2).reshape(*lead, row_tiles * ROW_TILE, column_tiles * COLUMN_TILE)


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
