"""Where torch computes: on a GPU if it sees one, else on the CPU."""

from __future__ import annotations

import torch

GPU_CHUNK = 1 << 28
"""Elements a chunk on a GPU: keeps it busy, and a dozen float32 temporaries take 13 GB."""


def compute_device() -> torch.device:
    """The first CUDA device, or the CPU where torch sees none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chunk(device: torch.device, cpu: int) -> int:
    """Elements to work on at a time: `cpu` of them on a CPU, whose caches they fit; many on a GPU."""
    return cpu if device.type == "cpu" else GPU_CHUNK
