"""The page of a web artifact: files that are copied beside launches and parameters as they are."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

PAGE = ("index.html", "model.js", "tokenizer.js")
"""A demo that streams text, the host that runs the launches on WebGPU, and byte-level BPE."""


def write_page(folder: Path) -> None:
    """Copy the page into `folder`."""
    source = files("moqc") / "web"
    for name in PAGE:
        (folder / name).write_text((source / name).read_text(encoding="utf-8"), encoding="utf-8")
