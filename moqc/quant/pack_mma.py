"""Layout ``mma16x256``: how codes lie in memory for the CUDA kernels.

A matrix is cut into units of 16 rows x 256 columns; a unit of ``bits``-bit codes is exactly ``bits`` times
512 bytes, 16 bytes for each of the 32 lanes of a warp, so every width is read by the same addressing. Lane
``4 * g + q`` holds rows ``g`` and ``g + 8`` at the columns ``128 * half + 32 * v + 8 * q + 2 * j + h`` (half
and h of 2, v and j of 4): what it gives to the fp16 tensor-core instruction ``mma.m16n8k16``, in the order of
its 16 bytes of activations.

Columns ``(h = 0, h = 1)`` share a 32-bit word, 16 bits each; ``i = 4 * v + j`` numbers such pairs of a
half unit. In each 16 bits, row ``g`` takes the low byte and row ``g + 8`` the high byte, pair ``i`` at
bit ``bits * (i % (8 // bits))``. Three bits have no such fit: three words hold eight pairs, row ``g`` at
bits 0 and 3, row ``g + 8`` at 9 and 12, the seventh pair and the eighth's row ``g`` at bit 6 of the
words, the eighth's row ``g + 8`` in their three bits 15.

One-bit codes are the metadata of the sparse instruction ``mma.sp.m16n8k32``, so a lane holds codes that
meet the activations of others: of the columns above, number ``r = 32 * half + 8 * v + 2 * j + h`` of lane
``4 * g + q`` is pair ``p = q + 4 * (r % 4)`` of product ``n = r // 4``; row ``g + 8 * row`` of it is bit
``16 * row + 2 * (p % 8) + n // 2 % 2`` of word ``n // 4`` of lane ``4 * g + 2 * (n % 2) + p // 8``.

Trellis formats store planes (`moqc.quant.trellis`): of each 64 columns a lane has one word with the bits
``u`` and, above one bit, one with each bit of ``high``. From them, and the bits ``u`` of the lanes that hold
the rows before, the kernels make the values, in fields of `field_bits` where an integer format of that width
has its codes: bit ``b`` of a plane is for field ``b // width`` of word ``b % width``.

Rows are padded to 16 and columns to 256 with scale 0 and code 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moqc.errors import UserError
from moqc.quant import trellis
from moqc.quant.formats import BITS, Format
from moqc.quant.pack import from_upper_bytes, upper_bytes
from moqc.quant.tensor import Quantized

LAYOUT = "mma16x256"
ROWS = 16
COLUMNS = 256
"""Rows and columns of a unit."""

Bytes = npt.NDArray[np.uint8]
Field = tuple[int, int, int, int, int]
"""(lane of four, word of its unit, shift in it, width, lowest bit of the code)."""


@dataclass(frozen=True, eq=False)
class PackedUnits:
    """Packed matrices; ``N16 = ceil(N / 16)``, ``K256 = ceil(K / 256)``, ``G = 256 / group`` groups a unit.

    * `codes`: uint8 ``[..., N16, K256, bits, 512]``
    * `scales`: float16 ``[..., N16, K256, 8, G, 2]``: row ``g``, group, row ``g + 8 * r``; uint8, the upper
      bytes of such numbers, if the format has byte scales
    * `zeros`: uint8, as `scales`; None for symmetric formats.
    """

    codes: Bytes
    scales: npt.NDArray[Any]
    zeros: Bytes | None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, padding included."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


def packed_shapes(format: Format, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes, and of the scales (and zeros), of one matrix.

    Raises UserError for a format that has no kernel in this layout.
    """
    if format.simulated:
        raise UserError(f"the layout {LAYOUT} has no format {format}: choose an int format of {BITS} bits")
    tiles, units = -(-rows // ROWS), -(-columns // COLUMNS)
    return (tiles, units, format.bits, 512), (tiles, units, 8, COLUMNS // format.group, 2)


def pack_units(quantized: Quantized) -> PackedUnits:
    """Pack matrices of any leading shape; `unpack_units` is the exact inverse."""
    fmt, zeros, scales = quantized.format, quantized.zeros, quantized.scales.cpu().numpy()
    codes = trellis.encode(quantized.codes) if fmt.trellis else quantized.codes
    return PackedUnits(
        codes=_pack_codes(codes.cpu().numpy(), fmt),
        scales=_pack_groups(upper_bytes(scales) if fmt.byte_scales else scales, fmt.group),
        zeros=None if zeros is None else _pack_groups(zeros.cpu().numpy(), fmt.group),
    )


def unpack_units(packed: PackedUnits, format: Format, rows: int, columns: int) -> Quantized:
    """Recover the ``[..., rows, columns]`` matrices that `pack_units` was given."""
    groups, zeros = format.groups(columns), packed.zeros
    scales = _unpack_groups(packed.scales, rows, groups)
    codes = torch.from_numpy(_unpack_codes(packed.codes, format))
    if format.trellis:
        codes = trellis.decode(codes)
    return Quantized(
        format=format,
        codes=codes[..., :rows, :columns].contiguous(),
        scales=torch.from_numpy(from_upper_bytes(scales) if format.byte_scales else scales),
        zeros=None if zeros is None else torch.from_numpy(_unpack_groups(zeros, rows, groups)),
    )


def field_bits(format: Format) -> int:
    """Width of the fields in which the kernels have a format's values."""
    return 1 << (format.values[-1].bit_length() - 1).bit_length() if format.trellis else format.bits


def fields(format: Format, lane: int, half: int, pair: int, row: int, h: int) -> list[Field]:
    """Where a code is: of `lane` of four, `pair` (0..15) of a half unit, row half `row`, parity `h`."""
    bits = format.bits
    if format.trellis:
        width = field_bits(format)
        each, first = 8 // width, (2 * half + pair // 8) * bits
        shift = 16 * h + 8 * row + width * (pair % each) + pair % 8 // each
        return [(lane, first + bit, shift, 1, bit) for bit in range(bits)]
    if bits == 1:
        number = 32 * half + 2 * pair + h
        step, place = number // 4, lane + 4 * (number % 4)
        shift = 16 * row + 2 * (place % 8) + step // 2 % 2
        return [(2 * (step % 2) + place // 8, step // 4, shift, 1, 0)]
    first = half * 2 * bits
    if bits != 3:
        each = 8 // bits
        return [(lane, first + pair // each, 16 * h + 8 * row + bits * (pair % each), bits, 0)]
    first, pair = first + pair // 8 * 3, pair % 8
    if pair < 6:
        return [(lane, first + pair // 2, 16 * h + 9 * row + 3 * (pair % 2), 3, 0)]
    if pair == 6 or row == 0:
        return [(lane, first + (row if pair == 6 else 2), 16 * h + 6, 3, 0)]
    return [(lane, first + bit, 16 * h + 15, 1, bit) for bit in range(3)]


def _placements(format: Format) -> list[tuple[tuple[int, ...], Field]]:
    """Every (lane, half, pair, row half, parity) with its fields."""
    positions = product(range(4), range(2), range(16), range(2), range(2))
    return [(position, field) for position in positions for field in fields(format, *position)]


def _pack_codes(codes: Bytes, format: Format) -> Bytes:
    bits = format.bits
    *lead, rows, columns = codes.shape
    padded = np.pad(codes, [(0, 0)] * len(lead) + [(0, -rows % ROWS), (0, -columns % COLUMNS)])
    tiles, units = padded.shape[-2] // ROWS, padded.shape[-1] // COLUMNS
    # tile, row half, g, unit, half, v, q, j, h
    split = padded.reshape(-1, tiles, 2, 8, units, 2, 4, 4, 4, 2)
    words = np.zeros((split.shape[0], tiles, units, 8, 4, 4 * bits), np.uint32)
    for (q, half, pair, row, h), (lane, word, shift, width, low) in _placements(format):
        code = split[:, :, row, :, :, half, pair // 4, q, pair % 4, h].swapaxes(2, 3)
        field = (code >> np.uint8(low)) & np.uint8((1 << width) - 1)
        words[..., lane, word] |= field.astype(np.uint32) << np.uint32(shift)
    lanes = words.reshape(-1, tiles, units, 32, bits, 4).swapaxes(-3, -2)
    return np.ascontiguousarray(lanes).view(np.uint8).reshape(*lead, tiles, units, bits, 512)


def _unpack_codes(packed: Bytes, format: Format) -> Bytes:
    bits = format.bits
    *lead, tiles, units, _, _ = packed.shape
    lanes = np.ascontiguousarray(packed).view(np.uint32).reshape(-1, tiles, units, bits, 32, 4)
    words = np.ascontiguousarray(lanes.swapaxes(-3, -2)).reshape(-1, tiles, units, 8, 4, 4 * bits)
    split = np.zeros((words.shape[0], tiles, 2, 8, units, 2, 4, 4, 4, 2), np.uint8)
    for (q, half, pair, row, h), (lane, word, shift, width, low) in _placements(format):
        field = (words[..., lane, word] >> np.uint32(shift)) & np.uint32((1 << width) - 1)
        code = field.astype(np.uint8) << np.uint8(low)
        split[:, :, row, :, :, half, pair // 4, q, pair % 4, h] |= code.swapaxes(2, 3)
    return split.reshape(*lead, tiles * ROWS, units * COLUMNS)


def _pack_groups(values: npt.NDArray[Any], group: int) -> npt.NDArray[Any]:
    """``[..., N, groups]`` to ``[..., N16, K256, 8, G, 2]``, padded with 0."""
    *lead, rows, groups = values.shape
    each = COLUMNS // group
    padded = np.pad(values, [(0, 0)] * len(lead) + [(0, -rows % ROWS), (0, -groups % each)])
    split = padded.reshape(-1, padded.shape[-2] // ROWS, 2, 8, padded.shape[-1] // each, each)
    units = np.ascontiguousarray(split.transpose(0, 1, 4, 3, 5, 2))
    return units.reshape(*lead, *units.shape[1:])


def _unpack_groups(units: npt.NDArray[Any], rows: int, groups: int) -> npt.NDArray[Any]:
    """The inverse of `_pack_groups`."""
    *lead, tiles, across, _, each, _ = units.shape
    split = units.reshape(-1, *units.shape[-5:]).transpose(0, 1, 5, 3, 2, 4)
    flat = split.reshape(*lead, tiles * ROWS, across * each)
    return np.ascontiguousarray(flat[..., :rows, :groups])
