"""The model card of an artifact: its README.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from moqc.manifest import Manifest
from moqc.recipe import Recipe


def model_card(manifest: Manifest, recipe: Recipe) -> str:
    """Markdown that says what the artifact is, how it was made and how to run it."""
    source, versions = manifest.source, manifest.versions
    name = source.path.rstrip("/").rpartition("/")[2]
    return f"""# {name}, compiled by moqc

A Mixture-of-Experts language model with experts of different bit-widths, for {manifest.target.name}.

| | |
|---|---|
{_table(_facts(manifest))}

## Run it

```sh
moqc run . --prompt "Once upon a time"
moqc inspect . --html report.html
```

It needs moqc {versions.moqc} and exactly TVM {versions.tvm}; `moqc verify .` checks files and machine.

## Make it again

```sh
{recipe.command(source.path, name + "-moqc")}
```

Passes: `{manifest.pipeline}`

{_tables(manifest)}"""


def _tables(manifest: Manifest) -> str:
    return f"""## Formats of the experts

| projection | formats |
|---|---|
{_table(_formats(manifest))}

## Kernels against the reference

| kernel | largest relative error |
|---|---|
{_table(_numerics(manifest)) or "| none | |"}
"""


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    sizes, source, versions = manifest.sizes, manifest.source, manifest.versions
    return [
        ("source", f"`{source.path}` ({source.model_type}), SHA-256 `{source.fingerprint}`"),
        ("target", f"{manifest.target.name}, {manifest.activations} activations"),
        ("experts", f"{sizes.expert_file_bits_per_weight:.4f} file bits per weight, everything counted"),
        ("whole model", f"{sizes.model_file_bits_per_weight:.4f} file bits per weight"),
        ("weights", f"{sizes.parameter_bytes:,} bytes"),
        ("context", f"{manifest.cache.context} tokens, {manifest.cache.batch} sequences"),
        ("calibration", _calibration(manifest)),
        ("other matrices", _counts(manifest.linear_bits.values()) or "not quantized"),
        ("made by", f"moqc {versions.moqc}, TVM {versions.tvm}, LLVM {versions.llvm}"),
    ]


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"| {label} | {text} |" for label, text in rows)


def _calibration(manifest: Manifest) -> str:
    used = manifest.calibration
    if used is None:
        return "none"
    tokens = ", ".join(f"{name} ({count:,} tokens)" for name, count in used.datasets.items())
    return f"{tokens}; digest `{used.fingerprint}`"


def _formats(manifest: Manifest) -> list[tuple[str, str]]:
    by_projection: dict[str, list[str]] = {}
    for projections in manifest.bits.values():
        for projection, formats in projections.items():
            by_projection.setdefault(projection, []).extend(formats)
    return [(projection, _counts(formats)) for projection, formats in by_projection.items()]


def _counts(formats: Iterable[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in sorted(Counter(formats).items()))


def _numerics(manifest: Manifest) -> list[tuple[str, str]]:
    return [
        (
            name.replace("|", "\\|"),
            f"not run: {found.not_run}"
            if found.max_relative_error is None
            else f"{found.max_relative_error:.1e}",
        )
        for name, found in manifest.numerics.items()
    ]
