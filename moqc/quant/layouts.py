"""The packed layouts by name: how a target's kernels want codes, scales and zeros in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moqc.errors import UserError
from moqc.quant import pack, pack_mma
from moqc.quant.formats import Format
from moqc.quant.tensor import Quantized

DEFAULT = pack.LAYOUT


class PackedTensors(Protocol):
    """Packed matrices; `zeros` is None for symmetric formats. The shapes are the layout's."""

    @property
    def codes(self) -> npt.NDArray[np.uint8]:
        """Codes."""

    @property
    def scales(self) -> npt.NDArray[Any]:
        """Scales, a group each: float16, or uint8 for byte scales."""

    @property
    def zeros(self) -> npt.NDArray[np.uint8] | None:
        """Zero bytes, as the scales."""


@dataclass(frozen=True)
class Layout:
    """One layout. `pack` and `unpack` are exact inverses; rows come in tiles of 16, the first packed axis.

    `shapes` gives the shapes of codes and of scales (and zeros) of one [rows, columns] matrix; kernels of
    experts want scales below `scales_below`.
    """

    name: str
    pack: Callable[[Quantized], PackedTensors]
    unpack: Callable[[Any, Format, int, int], Quantized]
    shapes: Callable[[Format, int, int], tuple[tuple[int, ...], tuple[int, ...]]]
    scales_below: float = math.inf


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(pack.LAYOUT, pack.pack, pack.unpack, pack.packed_shapes),
        Layout(
            pack_mma.LAYOUT,
            pack_mma.pack_units,
            pack_mma.unpack_units,
            pack_mma.packed_shapes,
            scales_below=1.0,
        ),
    )
}


def find_layout(name: str) -> Layout:
    """The layout called `name`. Raises UserError with the known names."""
    if name not in LAYOUTS:
        raise UserError(f"unknown layout {name!r}: known are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
