"""`moqc export-onnx`: a model that onnxruntime runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moqc import log
from moqc.commands.options import Quiet


def command(
    source: Annotated[
        str, typer.Argument(metavar="ARTIFACT|MODEL", help="What moqc compile wrote, or a checkpoint.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")],
    uniform: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Round all experts to it. [default: an artifact keeps its codes, a model gets int4-g64-sym]",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write an ONNX model with QMoE nodes. It has no cache: (input_ids, positions) -> logits."""
    from moqc.inputs import require_compiler, require_onnx

    if quiet:
        log.be_quiet()
    require_compiler()
    require_onnx()
    from moqc.onnx_export import export_onnx

    export_onnx(source, output, uniform=uniform)
