"""Random packed matrices, drawn as bytes: what `moqc synth` fills artifacts with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moqc.quant.formats import Format
from moqc.quant.grid import rounded
from moqc.quant.layouts import Layout
from moqc.quant.tensor import Quantized

SLAB = 4096
"""Rows whose scales are drawn, a multiple of 16; further rows repeat them."""


def random_packed(
    layout: Layout, format: Format, shape: tuple[int, ...], part: str, seed: int
) -> npt.NDArray[Any]:
    """``codes``, ``scales`` or ``zeros`` of random matrices of `shape` ``[..., rows, columns]`` in `layout`.

    Codes are random bytes: in every layout any bit pattern stands for codes. The weights have a deviation of
    about 0.02 and a mean near 0, so that activations keep a sensible size; padding is silent, as `layout`
    has it.
    """
    generator, (*lead, rows, columns) = np.random.default_rng(seed), shape
    codes, groups = layout.shapes(format, rows, columns)
    if part == "codes":
        return np.frombuffer(generator.bytes(math.prod((*lead, *codes))), np.uint8).reshape(*lead, *codes)
    slabs = [_draw_slab(layout, format, min(rows, SLAB), columns, part, generator)] * (rows // SLAB)
    if rows % SLAB:
        slabs.append(_draw_slab(layout, format, rows % SLAB, columns, part, generator))
    return np.broadcast_to(np.concatenate(slabs), (*lead, *groups))


def _draw_slab(
    layout: Layout, format: Format, rows: int, columns: int, part: str, generator: np.random.Generator
) -> npt.NDArray[Any]:
    """Scales or zeros of `rows` rows, packed with codes that are all 0."""
    groups = (rows, format.groups(columns))
    deviation = np.std(format.values)  # of evenly distributed codes
    drawn = torch.from_numpy(generator.uniform(0.5, 1.5, groups) * 0.02 / deviation).float()
    scales = rounded(drawn, drawn, format).scale.half()
    zeros = (
        None if format.symmetric else torch.from_numpy(generator.integers(112, 144, groups, dtype=np.uint8))
    )
    blank = torch.zeros(rows, columns, dtype=torch.uint8)
    packed = layout.pack(Quantized(format, blank, scales, zeros))
    array: npt.NDArray[Any] = getattr(packed, part)
    return array
