import pytest
import torch

from moqc.errors import InternalError
from moqc.quant.formats import Format
from moqc.quant.tensor import Quantized, expand_groups


def test_dequantize_asymmetric_by_hand() -> None:
    fmt = Format(2, 32)
    codes = torch.zeros(2, 40, dtype=torch.uint8)
    codes[0, 1], codes[0, 33], codes[1, 39] = 3, 2, 1
    scales = torch.tensor([[0.5, 2.0], [0.25, 4.0]], dtype=torch.float16)
    zeros = torch.tensor([[0, 255], [85, 170]], dtype=torch.uint8)  # zero points 0, 3, 1, 2
    w = Quantized(fmt, codes, scales, zeros).dequantize()
    assert w.dtype == torch.float32
    assert w[0, 0] == 0
    assert w[0, 1] == 1.5
    assert w[0, 32] == -6
    assert w[0, 33] == -2
    torch.testing.assert_close(w[1, 0], torch.tensor(-0.25))
    torch.testing.assert_close(w[1, 39], torch.tensor(-4.0))


@pytest.mark.parametrize(("bits", "zero"), [(1, 0.5), (2, 1.5), (3, 4.0), (4, 8.0), (8, 128.0)])
def test_dequantize_symmetric(bits: int, zero: float) -> None:
    codes = torch.arange(2, dtype=torch.uint8).repeat(1, 16)
    q = Quantized(Format(bits, 32, symmetric=True), codes, torch.full((1, 1), 2.0, dtype=torch.float16), None)
    assert q.dequantize()[0, :2].tolist() == [-2 * zero, 2 * (1 - zero)]


def test_expand_groups_cuts_the_last() -> None:
    assert expand_groups(torch.tensor([[1, 2]]), 3, 5).tolist() == [[1, 1, 1, 2, 2]]


def test_stored_bits_counts_every_matrix() -> None:
    fmt = Format(4, 32, symmetric=True)
    q = Quantized(fmt, torch.zeros(3, 2, 5, 33, dtype=torch.uint8), torch.zeros(3, 2, 5, 2).half(), None)
    assert q.shape == (3, 2, 5, 33)
    assert q.stored_bits == 6 * fmt.stored_bits(5, 33)


@pytest.mark.parametrize(
    ("codes", "scales", "zeros"),
    [
        (torch.zeros(4, 64).int(), torch.zeros(4, 2).half(), torch.zeros(4, 2).byte()),
        (torch.zeros(4, 64).byte(), torch.zeros(4, 2), torch.zeros(4, 2).byte()),
        (torch.zeros(4, 64).byte(), torch.zeros(4, 3).half(), torch.zeros(4, 2).byte()),
        (torch.zeros(4, 64).byte(), torch.zeros(4, 2).half(), torch.zeros(4, 1).byte()),
        (torch.zeros(4, 64).byte(), torch.zeros(4, 2).half(), None),
    ],
)
def test_wrong_parts_are_refused(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> None:
    with pytest.raises(InternalError, match="int2-g32"):
        Quantized(Format(2, 32), codes, scales, zeros)
