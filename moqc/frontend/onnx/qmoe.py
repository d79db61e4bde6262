"""Experts in moqc's formats as the inputs of a com.microsoft QMoE node, without changing a weight.

QMoE has one width for all experts of a matrix and whole zero points. Four bits hold symmetric codes of 1
to 4 bits: a zero point between two codes becomes whole when code and scale are doubled and halved. Eight
bits hold asymmetric codes of 1, 2, 4 and 8 bits too: a zero point ``z * (levels - 1) / 255`` becomes the byte
``z`` when codes are multiplied by ``255 / (levels - 1)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moqc.errors import ModelError
from moqc.quant.activations import parse_activation
from moqc.quant.tensor import Quantized, expand_groups

Array = NDArray[Any]
_WIDTHS = (1, 2, 4, 8)  # whose range divides 255


@dataclass(frozen=True)
class Matrix:
    """One of a node's matrices in codes of `bits`, all experts.

    `codes` uint8 [E, N, K], `scales` float32 and `zeros` uint8 [E, N, K / block].
    """

    bits: int
    codes: Array
    scales: Array
    zeros: Array

    @property
    def centered(self) -> bool:
        """Whether all zero points are what QMoE takes where it is given none."""
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    @property
    def packed_codes(self) -> Array:
        """Codes as a node stores them, [E, N, K * bits / 8]."""
        return pack_codes(self.codes, self.bits)

    @property
    def packed_zeros(self) -> Array:
        """Zero points as a node stores them, along the blocks."""
        return pack_codes(self.zeros, self.bits)


def node_attributes(activation: str) -> dict[str, Any]:
    """Attributes of a QMoE node for a canonical activation. Raises ModelError for one that it lacks."""
    found = parse_activation(activation)
    if found.kind == "silu":
        return {"activation_type": "silu"}
    if found.kind not in ("silu_glu", "silu_glu_clamp", "oai_swiglu"):
        raise ModelError(f"activation {activation}: onnxruntime's QMoE has none like it")
    alpha, beta = (found.alpha, 1.0) if found.kind == "oai_swiglu" else (1.0, 0.0)
    limit = {} if found.limit == float("inf") else {"swiglu_limit": found.limit}
    shape = {"activation_type": "swiglu", "swiglu_fusion": 1}
    return {**shape, "activation_alpha": alpha, "activation_beta": beta, **limit}


def block_size(matrices: Sequence[Quantized], where: str) -> int:
    """The largest block that all groups are made of and that divides the columns. Raises ModelError."""
    sizes = [min(matrix.format.group for matrix in matrices), 64, 32]
    columns = {matrix.shape[-1] for matrix in matrices}
    for size in sizes:
        if size <= sizes[0] and all(count % size == 0 for count in columns):
            return size
    raise ModelError(f"{where}: QMoE needs columns in blocks of 32, there are {sorted(columns)}")


def node_matrix(matrices: Sequence[Quantized], block: int, bits: int) -> Matrix:
    """The experts of one matrix, one after the other, in codes of `bits` (see `width_of`)."""
    parts = [_recoded(matrix, block, bits) for matrix in matrices]
    codes, scales, zeros = (np.stack(each) for each in zip(*parts, strict=True))
    return Matrix(bits, codes, scales, zeros)


def fuse(gate: Matrix, up: Matrix) -> Matrix:
    """Both as one matrix with rows in turn."""
    pairs = ((gate.codes, up.codes), (gate.scales, up.scales), (gate.zeros, up.zeros))
    return Matrix(gate.bits, *(interleave(first, second) for first, second in pairs))


def width_of(matrices: Sequence[Quantized], where: str) -> int:
    """4 or 8: the narrowest codes that hold all `matrices`. Raises ModelError where none does."""
    formats = {matrix.format for matrix in matrices}
    odd = sorted(str(f) for f in formats if f.trellis or not (f.symmetric or f.bits in _WIDTHS))
    if odd:
        raise ModelError(f"{where}: {odd[0]} has no form in QMoE: export with --uniform int4-g64-sym")
    return 4 if all(f.symmetric and f.bits <= 4 for f in formats) else 8


def _recoded(matrix: Quantized, block: int, bits: int) -> tuple[Array, Array, Array]:
    """Codes [N, K], scales and zero points [N, K / block] of one matrix in codes of `bits`."""
    format, columns = matrix.format, matrix.shape[-1]
    scales = expand_groups(matrix.scales.float(), format.group, columns)[..., ::block]
    if matrix.zeros is not None:
        factor = 255 // (format.levels - 1)
        zeros = expand_groups(matrix.zeros, format.group, columns)[..., ::block]
        return _numpy(matrix.codes * factor), (scales / factor).numpy(), _numpy(zeros)
    factor = 1 if format.symmetric_zero == int(format.symmetric_zero) else 2
    middle = 1 << (bits - 1)
    codes = matrix.codes.int() * factor + middle - int(format.symmetric_zero * factor)
    return _numpy(codes), (scales / factor).numpy(), np.full(scales.shape, middle, np.uint8)


def _numpy(values: torch.Tensor) -> Array:
    array: Array = values.to(torch.uint8).numpy()
    return array


def pack_codes(codes: Array, bits: int) -> Array:
    """Codes uint8 [..., K] to [..., ceil(K * bits / 8)], the first in the low bits."""
    count = 8 // bits
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % count)])
    fields = padded.reshape(*codes.shape[:-1], -1, count) << np.arange(0, 8, bits, dtype=np.uint8)
    packed: Array = np.bitwise_or.reduce(fields, axis=-1)
    return packed


def interleave(gate: Array, up: Array) -> Array:
    """Rows of gate and up in turn: [E, I, ...] each to [E, 2 * I, ...]."""
    return np.ascontiguousarray(np.stack([gate, up], 2).reshape(gate.shape[0], -1, *gate.shape[2:]))
