"""Where torch computes: on a GPU if it sees one, else on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

TEMPORARIES = 24
"""float32 tensors of a chunk's size that a quantizer holds at once, at most."""


def compute_device() -> torch.device:
    """The first CUDA device, or the CPU where torch sees none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chunk(device: torch.device, cpu: int) -> int:
    """Elements to work on at a time: `cpu` of them on a CPU, whose caches they fit; a GPU's memory full."""
    if device.type == "cpu":
        return cpu
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(cpu, (torch.cuda.mem_get_info(device)[0] + unused) // (4 * TEMPORARIES))


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Matrix products of float32 with factors of 11 bits (TF32) on GPUs, for what need not be exact."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
