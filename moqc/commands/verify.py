"""`moqc verify`: check that an artifact is whole."""

from __future__ import annotations

import typer

from moqc.commands.options import ArtifactArgument, Json, print_json


def command(artifact: ArtifactArgument, as_json: Json = False) -> None:
    """Check that an artifact is whole and that it runs here."""
    from moqc.manifest import read_manifest
    from moqc.runtime.artifact import check_files, check_machine

    manifest = read_manifest(artifact)
    check_files(artifact, manifest, everything=True)
    check_machine(artifact, manifest)
    if as_json:
        print_json(
            {"ok": True, "files": len(manifest.files), "artifact_bytes": manifest.sizes.artifact_bytes}
        )
    else:
        typer.echo(f"{artifact}: ok, {len(manifest.files)} files, {manifest.sizes.artifact_bytes:,} bytes")
