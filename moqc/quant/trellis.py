"""Trellis-coded quantization: which sequences of codes a ``tcq`` format can store, and the nearest one.

The 16 rows of a tile are a circle of 16 steps in every column. Each step stores one bit ``u`` and, above one
bit a weight, an uncoded ``high``; a convolutional code of 4 states makes of the former the lower two bits of
the code (Ungerboeck's, with the polynomials 5 and 2, tail-biting; row indices are modulo 16):

    code[n] = 4 * high[n] + 2 * (u[n] ^ u[n - 2]) + u[n - 1]

So a row has its 2**bits finest levels at twice their distance, and its neighbours choose between the even and
the odd ones: as precise as one bit more, where the sequence can be chosen freely (Marcellin and Fischer,
"Trellis coded quantization", 1990). The nearest sequence is found exactly, as a product of matrices in the
(min, +) semiring: two steps lead from every state to every state by one path, which gives 8 matrices of
4 x 4, and three rounds of products leave one matrix whose diagonal are the closed circles.

Rows, not columns, form the sequence, because all rows share a Hessian: quantizers that work column by column
then treat a column of a tile as they treat a weight.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.nn import functional

from moqc.errors import InternalError
from moqc.quant.device import chunk
from moqc.quant.formats import ROW_TILE

_CHUNK = 1 << 22
"""Errors of candidates computed at a time on a CPU, 512 for each circle."""
STATES = 4
"""A state is ``u[n - 1] + 2 * u[n - 2]``."""


def subset(state: int, u: int) -> int:
    """The lower two bits of the code of a step from `state` with bit `u`."""
    return 2 * (u ^ (state >> 1)) + (state & 1)


# Start and end state of two steps -> subset of the first and of the second; the end is u2 + 2 * u1.
_FIRST = [subset(start, end >> 1) for start in range(STATES) for end in range(STATES)]
_SECOND = [subset((end >> 1) + 2 * (start & 1), end & 1) for start in range(STATES) for end in range(STATES)]


def nearest(targets: torch.Tensor, weights: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    """The sequences a trellis format can store that are nearest to `targets`.

    Args:
        targets: float32 ``[..., N]`` in units of the format's values; N runs over the rows of a matrix.
        weights: what a squared error costs, ``[..., N]``, not negative.
        values: ``Format.values``.

    Returns:
        Values float32 ``[..., N]`` that minimise the weighted squared error over all sequences.

    """
    rows = targets.shape[-1]
    padding = (0, -rows % ROW_TILE)
    padded = functional.pad(targets, padding).reshape(-1, ROW_TILE)
    costs = functional.pad(weights, padding).reshape(-1, ROW_TILE)
    count = max(1, chunk(targets.device, _CHUNK) // 512)
    found = torch.empty_like(padded)
    for start in range(0, len(padded), count):
        part = slice(start, start + count)
        found[part] = _nearest(padded[part].T.contiguous(), costs[part].T, values).T
    return found.reshape(*targets.shape[:-1], -1)[..., :rows]


def _nearest(targets: torch.Tensor, weights: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    """`nearest` for circles ``[16, M]``: what is computed at a time is contiguous along M."""
    device = targets.device
    # Subset d holds the levels of the codes d, d + 4, d + 8, ...
    levels = torch.tensor(values, dtype=torch.float32, device=device).reshape(-1, 4)
    distances = [(targets - level[:, None, None]).abs_() for level in levels]
    errors = functools.reduce(torch.minimum, distances).square_().mul_(weights)  # [4, 16, M]
    first, second = (torch.tensor(table, device=device) for table in (_FIRST, _SECOND))
    costs = errors[:, 0::2].index_select(0, first) + errors[:, 1::2].index_select(0, second)
    bits = _best_circle(costs.unflatten(0, (STATES, STATES)))
    chosen = 2 * (bits ^ bits.roll(2, 0)) + bits.roll(1, 0)
    candidates = [level[chosen] for level in levels]
    high = _argmin([(targets - candidate).abs_() for candidate in candidates])
    return levels.flatten()[4 * high + chosen]


def _best_circle(costs: torch.Tensor) -> torch.Tensor:
    """Bits u ``[16, M]`` of the cheapest circle; `costs` ``[4, 4, 8, M]``: two steps, from start to end."""
    halves = []
    while costs.shape[2] > 1:
        left, right = costs[:, :, 0::2], costs[:, :, 1::2]
        halves.append((left, right))
        paths = [left[:, middle].unsqueeze(1) + right[middle] for middle in range(STATES)]
        costs = functools.reduce(torch.minimum, paths)
    state = _argmin([costs[state, state] for state in range(STATES)])
    states = torch.cat([state, state])  # [what is known, M]: before and after each part, coarse to fine
    for left, right in reversed(halves):
        before, after = states[:-1], states[1:]
        paths = [
            left[:, middle].gather(0, before.unsqueeze(0)) + right[middle].gather(0, after.unsqueeze(0))
            for middle in range(STATES)
        ]
        middle = _argmin(paths).squeeze(0)
        states = torch.cat([torch.stack([before, middle], 1).flatten(0, 1), states[-1:]])
    after = states[1:]
    return torch.stack([after >> 1, after & 1], 1).flatten(0, 1)


def _argmin(candidates: Sequence[torch.Tensor]) -> torch.Tensor:
    """Which of the tensors is smallest, element by element: quicker than `torch.argmin` over so few."""
    best, index = candidates[0], torch.zeros_like(candidates[0], dtype=torch.int64)
    for number, candidate in enumerate(candidates[1:], 1):
        index.masked_fill_(candidate < best, number)
        best = torch.minimum(best, candidate)
    return index


def encode(codes: torch.Tensor) -> torch.Tensor:
    """What is stored of `codes` uint8 ``[..., N, K]``: ``u + 2 * high``, rows padded to whole tiles.

    Raises:
        InternalError: the codes do not follow the trellis.

    """
    rows = codes.shape[-2]
    tiles = _tiles(functional.pad(codes, (0, 0, 0, -rows % ROW_TILE)))
    u = (tiles & 1).roll(-1, -2)
    if rest := rows % ROW_TILE:
        # The bits of the padding rows that the real ones depend on, and the last real row's own.
        last, middle = u[..., -1, :, :], tiles[..., -1, :, :] >> 1 & 1
        last[..., rest - 1, :] = middle[..., rest - 1, :] ^ last[..., (rest - 3) % ROW_TILE, :]
        if rest < ROW_TILE - 1:
            last[..., 14, :] = middle[..., 0, :] ^ last[..., 0, :]
    stored: torch.Tensor = (u | (tiles >> 2) << 1).flatten(-3, -2)
    if not torch.equal(decode(stored)[..., :rows, :], codes):
        raise InternalError("codes of a trellis format do not follow its trellis")
    return stored


def decode(stored: torch.Tensor) -> torch.Tensor:
    """The codes uint8 ``[..., N, K]`` of ``u + 2 * high``; N is a multiple of 16."""
    tiles = _tiles(stored)
    u = tiles & 1
    codes: torch.Tensor = (tiles >> 1) << 2 | (u ^ u.roll(2, -2)) << 1 | u.roll(1, -2)
    return codes.flatten(-3, -2)


def _tiles(rows: torch.Tensor) -> torch.Tensor:
    """``[..., N, K]`` as ``[..., N / 16, 16, K]``."""
    *lead, count, columns = rows.shape
    return rows.reshape(*lead, count // ROW_TILE, ROW_TILE, columns)
