"""Checkpoints whose weights are stored as float8 blocks or MXFP4: shown as the bfloat16 tensors they code.

Two codings are read, as transformers writes and reads them:

* ``fp8`` (DeepSeek-V3, Qwen3-FP8, MiniMax-M2...): ``X`` in float8 e4m3 beside ``X_scale_inv``, one number for
  each block of ``weight_block_size`` elements; the last blocks of an axis may be short. Scales are floats,
  or bytes that are exponents (``2 ** (byte - 127)``).
* ``mxfp4`` (gpt-oss; the OCP Microscaling specification 1.0): ``X_blocks`` uint8 [E, N, G, 16] has two e2m1
  codes a byte, low half first, in groups of 32 along the input axis; ``X_scales`` uint8 [E, N, G] their
  exponents. The parameter X is [E, 32 * G, N].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moqc.errors import ModelError
from moqc.frontend.shards import Shards, Stored, read_json, read_stored, require_finite

METHODS = ("fp8", "mxfp4")
DECODED = torch.bfloat16
"""What decoded weights are given as; MXFP4 is exact in it, float8 is rounded, as everywhere else."""

BLOCK = (128, 128)
"""Rows and columns that share a scale where ``config.json`` does not say."""

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_EXPONENT_BIAS = 127
_GROUP_BYTES = 16
_SCALE_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "F8_E8M0": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class Coding:
    """How weights are stored: a name of `METHODS`, and for fp8 the rows and columns of a block."""

    method: str
    block: tuple[int, int]


def read_coding(folder: Path) -> Coding | None:
    """What ``config.json`` of `folder` says about stored weights; None where they are plain.

    Raises ModelError for a coding that is not one of `METHODS`.
    """
    declared = read_json(folder / "config.json")
    found: Any = declared.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, dict) or found.get("quant_method") not in METHODS:
        method = found.get("quant_method", "an unnamed method") if isinstance(found, dict) else found
        raise ModelError(
            f"{folder}: the weights are already quantized ({method}); moqc starts from float32, float16, "
            f"bfloat16, or these codings: {', '.join(METHODS)}"
        )
    block = found.get("weight_block_size") or BLOCK
    if len(block) != 2 or not all(isinstance(extent, int) and extent > 0 for extent in block):
        raise ModelError(f"{folder}: config.json: weight_block_size {block} is not two positive numbers")
    return Coding(found["quant_method"], (block[0], block[1]))


class CodedShards(Shards):
    """The tensors of a folder with coded ones decoded: `tensors` has X instead of its parts."""

    def __init__(self, folder: Path, coding: Coding) -> None:
        """Pair every coded tensor with its scales. Raises ModelError where one is missing or misshapen."""
        super().__init__(folder)
        self._coding = coding
        self._parts: dict[str, tuple[Stored, Stored]] = {}
        pair = self._pair_float8 if coding.method == "fp8" else self._pair_mxfp4
        for name in list(self.tensors):
            pair(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor after decoding."""
        return DECODED if name in self._parts else super().dtype(name)

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """As in `Shards`, decoded to bfloat16 where the tensor is coded."""
        if name not in self._parts:
            return super().read(name, row)
        codes, scales = self._parts[name]
        if self._coding.method == "mxfp4":
            blocks = read_stored(name, codes, torch.uint8, row)
            decoded = decode_mxfp4(blocks, read_stored(name, scales, torch.uint8, row))
        else:
            values = read_stored(name, codes, torch.float8_e4m3fn, None)
            factors = read_stored(name, scales, _SCALE_DTYPES[scales.dtype], None)
            whole = decode_float8(values, factors, self._coding.block)
            decoded = whole if row is None else whole[row]
        return require_finite(decoded, name, codes.file)

    def _pair_float8(self, name: str) -> None:
        codes = self.tensors[name]
        if codes.dtype != "F8_E4M3":
            return
        scales = self._scales(f"{name}_scale_inv", name)
        rows, columns = codes.shape[-2:] if len(codes.shape) >= 2 else (0, 0)
        height, width = self._coding.block
        grid = (*codes.shape[:-2], -(-rows // height), -(-columns // width))
        if scales.dtype not in _SCALE_DTYPES or scales.shape not in (grid, (), (1,), (1, 1)) or not rows:
            raise ModelError(
                f"{scales.file}: {name}_scale_inv is {scales.dtype} {list(scales.shape)}; blocks of "
                f"{height} x {width} of {list(codes.shape)} need {list(grid)}"
            )
        self._put(name, codes.shape, codes, scales)

    def _pair_mxfp4(self, name: str) -> None:
        base = name.removesuffix("_blocks")
        if base == name:
            return
        codes = self.tensors.pop(name)
        scales = self._scales(f"{base}_scales", name)
        if (
            (codes.dtype, scales.dtype) != ("U8", "U8")
            or codes.shape != (*scales.shape, _GROUP_BYTES)
            or len(codes.shape) != 4
        ):
            raise ModelError(
                f"{codes.file}: {name} is {codes.dtype} {list(codes.shape)} and its scales {scales.dtype} "
                f"{list(scales.shape)}; MXFP4 needs U8 [E, N, G, {_GROUP_BYTES}] and U8 [E, N, G]"
            )
        experts, rows, groups = scales.shape
        self._put(base, (experts, groups * 2 * _GROUP_BYTES, rows), codes, scales)

    def _scales(self, name: str, coded: str) -> Stored:
        """Take the scales out of `tensors`."""
        if name not in self.tensors:
            raise ModelError(f"{self.folder}: {coded} has no {name}; download it again")
        return self.tensors.pop(name)

    def _put(self, name: str, shape: tuple[int, ...], codes: Stored, scales: Stored) -> None:
        self._parts[name] = (codes, scales)
        self.tensors[name] = Stored(codes.file, "BF16", shape, codes.offset)


def decode_float8(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """bfloat16 [..., N, K] of float8 `values` [..., N, K] and `scales`, one for each block or one for all."""
    factors = scales.float() if scales.is_floating_point() else (scales.float() - _EXPONENT_BIAS).exp2()
    if factors.numel() > 1:
        rows, columns = values.shape[-2:]
        factors = factors.repeat_interleave(block[0], -2)[..., :rows, :]
        factors = factors.repeat_interleave(block[1], -1)[..., :columns]
    return (values.float() * factors).to(DECODED)


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bfloat16 [..., 32 * G, N] of `blocks` uint8 [..., N, G, 16] and `scales` uint8 [..., N, G]."""
    if blocks.dim() > 3:  # an expert at a time: what is on the way takes eight times the result
        return torch.stack([decode_mxfp4(*expert) for expert in zip(blocks, scales, strict=True)])
    codes = torch.stack([blocks & 0xF, blocks >> 4], dim=-1).flatten(-2)
    values = torch.ldexp(_E2M1[codes.int()], scales.int().unsqueeze(-1) - _EXPONENT_BIAS)
    return values.flatten(-2).to(DECODED).transpose(-1, -2).contiguous()
