"""The quantizers whose results the formats can store, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moqc.errors import UserError
from moqc.quant.awq import quantize_awq
from moqc.quant.formats import Format
from moqc.quant.gptq import quantize_gptq, quantize_gptq_each
from moqc.quant.hqq import quantize_hqq
from moqc.quant.rtn import quantize_rtn
from moqc.quant.tensor import Quantized


@dataclass(frozen=True)
class Quantizer:
    """One quantizer. `run` takes matrices [B, N, K], Hessians [B, K, K] (None if `data_free`), a format.

    `rotates`: inputs of down are rotated for it where the target's kernels can; the others are as published.
    `together`: as `run`, with several formats, where they have work in common.
    """

    doc: str
    data_free: bool
    run: Callable[[torch.Tensor, torch.Tensor | None, Format], Quantized]
    rotates: bool = False
    together: Callable[[torch.Tensor, torch.Tensor, Sequence[Format]], list[Quantized]] | None = None

    def each(
        self, matrices: torch.Tensor, hessian: torch.Tensor | None, formats: Sequence[Format]
    ) -> list[Quantized]:
        """The matrices in each of `formats`."""
        if self.together is not None and hessian is not None:
            return self.together(matrices, hessian, formats)
        return [self.run(matrices, hessian, fmt) for fmt in formats]


def _with_data(
    function: Callable[[torch.Tensor, torch.Tensor, Format], Quantized],
) -> Callable[[torch.Tensor, torch.Tensor | None, Format], Quantized]:
    def run(w: torch.Tensor, hessian: torch.Tensor | None, fmt: Format) -> Quantized:
        if hessian is None:
            raise UserError("this quantizer needs calibration text; rtn and hqq work without")
        return function(w, hessian, fmt)

    return run


STORABLE: dict[str, Quantizer] = {
    "rtn": Quantizer(
        "rounding to nearest with clip search, without data", True, lambda w, _, fmt: quantize_rtn(w, fmt)
    ),
    "hqq": Quantizer(
        "zero points by half-quadratic optimization, without data; asymmetric formats",
        True,
        lambda w, _, fmt: quantize_hqq(w, fmt),
    ),
    "awq": Quantizer(
        "rounding to nearest with clip search by output error; int formats", False, _with_data(quantize_awq)
    ),
    "gptq": Quantizer(
        "error propagation, then descent, on the inputs that the quantized layers before give",
        False,
        _with_data(lambda w, hessian, fmt: quantize_gptq(w, hessian, fmt)[0]),
        rotates=True,
        together=lambda w, hessian, formats: [q for q, _ in quantize_gptq_each(w, hessian, formats)],
    ),
}
