"""The numbers behind the report, from the artifact's manifest and ``analysis.json`` alone.

Costs are relative: the harm of storing one expert projection in one format, additive over the model, with the
harm of the plan itself as the unit where plans are compared.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from moqc.errors import ArtifactError, UserError, reason
from moqc.manifest import ANALYSIS, Manifest, read_manifest
from moqc.quant.formats import Format
from moqc.recipe import Recipe, make_recipe

Floats = NDArray[np.float64]


class SiteShape(BaseModel):
    """One experts block, as ``analysis.json`` has it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    experts: int
    hidden: int
    intermediate: int
    projections: tuple[str, ...]

    def shape(self, projection: str) -> tuple[int, int]:
        """(rows, columns) of one expert's matrix."""
        if projection == "down":
            return self.hidden, self.intermediate
        return self.intermediate, self.hidden


class Analysis(BaseModel):
    """The content of ``analysis.json``."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int
    sites: dict[str, SiteShape]
    annotations: dict[str, Any]


@dataclass(frozen=True)
class Block:
    """One experts block. Arrays are by expert; None where nothing was measured.

    `formats` and `bits` (file bits per weight) are by projection. `share` is an expert's share of the (token,
    expert) pairs, `tokens` its pairs, `weight` its mean routing weight. `costs` are by projection and format.
    """

    site: str
    label: str
    formats: dict[str, tuple[str, ...]]
    bits: dict[str, Floats]
    mean_bits: Floats
    share: Floats | None
    tokens: NDArray[np.int64] | None
    weight: Floats | None
    sensitivity: float | None
    costs: dict[str, dict[str, Floats]] = field(default_factory=dict)
    coactivation: dict[str, Any] | None = None
    """Communities, centrality and the pairs that fire together most, as profile-coactivation writes them."""

    @property
    def experts(self) -> int:
        """Their number."""
        return len(self.mean_bits)

    def harm(self, format: str) -> Floats | None:
        """Cost of each expert with all its projections in `format`, where that was measured."""
        rows = [by_format[format] for by_format in self.costs.values() if format in by_format]
        return np.sum(rows, axis=0) if rows else None


@dataclass(frozen=True)
class Report:
    """All that the report shows."""

    name: str
    manifest: Manifest
    recipe: Recipe | None
    blocks: tuple[Block, ...]
    shapes: dict[str, SiteShape]
    extras: dict[str, Any] = field(default_factory=dict)
    """Results of other commands by the kind of document: compare, eval, bench, kernels."""

    def to_html(self) -> str:
        """The report as one page that needs nothing else."""
        from moqc.report.page import render

        return render(self)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, for notebooks."""
        style = "width: 100%; height: 720px; border: 0"
        return f'<iframe srcdoc="{escape(self.to_html())}" style="{style}"></iframe>'

    @property
    def projections(self) -> tuple[str, ...]:
        """Those of the experts, in canonical order."""
        return tuple(self.blocks[0].bits) if self.blocks else ()

    @property
    def measured_formats(self) -> list[str]:
        """Formats whose cost is known for every block, by ascending size."""
        sets = [set(by) for block in self.blocks for by in block.costs.values()]
        names = set.intersection(*sets) if sets else set()
        return sorted(names, key=lambda name: self.uniform_bits(name))

    def uniform_bits(self, format: str) -> float:
        """File bits per expert weight with every expert in `format`."""
        fmt = Format.parse(format)
        stored = weights = 0
        for shape in self.shapes.values():
            for projection in shape.projections:
                rows, columns = shape.shape(projection)
                stored += shape.experts * fmt.stored_bits(rows, columns)
                weights += shape.experts * rows * columns
        return stored / weights

    def uniform_cost(self, format: str) -> float:
        """Summed cost of all units in one format."""
        return sum(float(by[format].sum()) for block in self.blocks for by in block.costs.values())

    @property
    def plan_cost(self) -> float | None:
        """Summed cost of the plan; None where the cost of a unit's format was not measured."""
        total = 0.0
        for block in self.blocks:
            for projection, names in block.formats.items():
                known = block.costs.get(projection, {})
                if not set(names) <= set(known):
                    return None
                total += sum(float(known[name][expert]) for expert, name in enumerate(names))
        return total if self.blocks else None


def read_report(folder: Path, extras: dict[str, Any] | None = None) -> Report:
    """The report of an artifact. Raises ArtifactError for a folder that is none or was changed."""
    manifest = read_manifest(folder)
    analysis = read_analysis(folder)
    annotations = {} if analysis is None else analysis.annotations
    shapes = {} if analysis is None else analysis.sites
    blocks = tuple(
        _block(site, formats, shapes.get(site), annotations, number)
        for number, (site, formats) in enumerate(manifest.bits.items())
    )
    recipe = None if manifest.recipe is None else make_recipe(manifest.recipe, f"{folder}: moqc.json")
    name = Path(manifest.source.path).name or folder.name
    return Report(name, manifest, recipe, blocks, shapes, extras or {})


def read_analysis(folder: Path) -> Analysis | None:
    """What was measured; None for an artifact without. Raises ArtifactError where the file is damaged."""
    path = folder / ANALYSIS
    try:
        return Analysis.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise ArtifactError(f"{path}: damaged; copy it again or compile the model again") from error


def _block(
    site: str,
    formats: dict[str, tuple[str, ...]],
    shape: SiteShape | None,
    annotations: dict[str, Any],
    number: int,
) -> Block:
    bits, weights = {}, {}
    for projection, names in formats.items():
        rows, columns = shape.shape(projection) if shape else (4096, 4096)
        weights[projection] = rows * columns
        stored = {name: Format.parse(name).stored_bits(rows, columns) for name in set(names)}
        bits[projection] = np.array([stored[name] / (rows * columns) for name in names])
    mean = np.average(list(bits.values()), axis=0, weights=[weights[name] for name in bits])
    profile = annotations.get("moqc.profile", {}).get(site)
    pairs = None if profile is None else np.array(profile["pairs"], dtype=np.int64)
    costs = annotations.get("moqc.costs", {}).get(site, {})
    sensitivity = annotations.get("moqc.sensitivity", {}).get(site)
    return Block(
        site=site,
        label=_label(site, number),
        formats=formats,
        bits=bits,
        mean_bits=mean,
        share=None if pairs is None else pairs / max(int(pairs.sum()), 1),
        tokens=pairs,
        weight=None if profile is None else np.array(profile["weight_ppm"]) / 1e6,
        sensitivity=None if sensitivity is None else float(sensitivity),
        costs={
            projection: {name: np.array(values, dtype=np.float64) for name, values in by_format.items()}
            for projection, by_format in costs.items()
        },
        coactivation=annotations.get("moqc.coactivation", {}).get(site),
    )


def _label(site: str, number: int) -> str:
    """The layer's number where the site names one: ``model.layers.7.mlp.experts`` is layer 7."""
    return next((part for part in site.split(".") if part.isdigit()), str(number))


def read_extra(path: Path) -> tuple[str, Any]:
    """(kind, document) of a JSON file that `compare`, `eval`, `bench` or `bench-kernels` printed.

    Raises UserError for any other file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the JSON ({reason(error)})") from error
    if isinstance(content, list) and content and all("gb_per_s" in row for row in content):
        return "kernels", content
    marks = {"compare": "reference_loss", "eval": "perplexity", "bench": "load_seconds"}
    for kind, mark in marks.items():
        if isinstance(content, dict) and mark in content:
            return kind, content
    raise UserError(f"{path}: not what `moqc compare`, `eval`, `bench` or `bench-kernels` print with --json")
