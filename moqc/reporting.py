"""What an artifact is: its recipe, its contents, its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moqc.errors import UserError
from moqc.manifest import read_manifest
from moqc.recipe import Recipe, make_recipe

if TYPE_CHECKING:
    from moqc.report.data import Report

_INSPECTED = ("bits", "linear_bits", "pipeline", "versions", "numerics", "quality", "recipe", "calibration")


def recipe(artifact: str | Path | None = None) -> Recipe:
    """The recipe an artifact was made by, or the one of the defaults. Reads its manifest only."""
    if artifact is None:
        return Recipe()
    manifest = read_manifest(Path(artifact))
    if manifest.recipe is None:
        raise UserError(f"{artifact}: made by a version of moqc that kept no recipe; compile it again")
    return make_recipe(manifest.recipe, f"{artifact}: moqc.json")


def inspect(artifact: str | Path) -> dict[str, Any]:
    """What an artifact is: target, sizes, bits of every expert and why. Reads two small files of it only."""
    from moqc.report.data import read_report
    from moqc.report.page import cold_rows, uniform_rows
    from moqc.report.why import why

    report = read_report(Path(artifact))
    manifest = report.manifest
    content = manifest.model_dump(mode="json")
    return {
        "source": manifest.source.path,
        "model_type": manifest.source.model_type,
        "target": manifest.target.name,
        "activations": manifest.activations,
        "artifact_bytes": manifest.sizes.artifact_bytes,
        "expert_file_bits_per_weight": manifest.sizes.expert_file_bits_per_weight,
        "model_file_bits_per_weight": manifest.sizes.model_file_bits_per_weight,
        "context": manifest.cache.context,
        "batch": manifest.cache.batch,
        **{key: content[key] for key in _INSPECTED},
        "why": why(report),
        "uniform": uniform_rows(report),
        "least_used": cold_rows(report),
    }


def read_report(artifact: str | Path, add: Sequence[Path | str] = ()) -> Report:
    """The report of an artifact, with the JSON results of other commands in the files `add`.

    Raises UserError for a folder that is no artifact, or a file that no command printed.
    """
    from moqc.report import data

    return data.read_report(Path(artifact), dict(data.read_extra(Path(path)) for path in add))


def write_report(artifact: str | Path, path: str | Path, add: Sequence[Path | str] = ()) -> None:
    """Write the report of an artifact as one HTML file that needs nothing else; `add` as in `read_report`."""
    from moqc.report.page import render

    text = render(read_report(artifact, add))
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror}); give another file") from error
