import torch

from moqc.quant import grid
from moqc.quant.formats import Format


def test_to_groups_pads_the_last() -> None:
    groups = grid.to_groups(torch.arange(1.0, 41).reshape(1, 40), 32)
    assert groups.shape == (1, 2, 32)
    assert groups[0, 1, :8].tolist() == list(range(33, 41))
    assert groups[0, 1, 8:].abs().max() == 0


def test_rounded_grids_are_storable() -> None:
    fmt = Format(2, 64)
    found = grid.rounded(torch.tensor([0.1, 1e9]), torch.tensor([1.234, -5.0]), fmt)
    assert torch.equal(found.scale.half().float(), found.scale)
    assert found.scale[1] == 65504
    byte = found.zero / fmt.zero_step
    torch.testing.assert_close(byte, byte.round())
    assert found.zero[1] == 0
    assert grid.rounded(torch.ones(1), torch.ones(1), Format(3, 64, True)).zero.item() == 4


def test_symmetric_grids_reach_the_extreme_of_either_sign() -> None:
    w = torch.zeros(2, 32)
    w[0, 3], w[1, 5] = 2.0, -2.0
    found = grid.spanning(w, Format(4, 32, symmetric=True))
    assert found.scale.tolist() == [-0.25, 0.25]
    codes = grid.nearest_codes(w, found, 16)
    assert codes[0, 3] == codes[1, 5] == 0


def test_search_does_not_depend_on_the_chunk() -> None:
    w = torch.randn(9000, 32, generator=torch.Generator().manual_seed(0))
    fmt, ones = Format(2, 32), torch.ones(9000, 32)
    whole, tail = grid.search(w, ones, fmt), grid.search(w[-10:], ones[-10:], fmt)
    torch.testing.assert_close(whole.scale[-10:], tail.scale, rtol=0, atol=0)
    torch.testing.assert_close(whole.zero[-10:], tail.zero, rtol=0, atol=0)
