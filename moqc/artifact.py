"""`moqc.load`: a compiled model with everything there is to do with it.

The runtime's model generates and computes logits with TVM's runtime alone; this one can also be scored and
reported on, for which the rest of moqc is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from moqc.runtime import artifact as runtime

if TYPE_CHECKING:
    from moqc.evaluate.artifact import Evaluation
    from moqc.report.data import Report


class Artifact(runtime.Artifact):
    """A compiled model in memory: `generate`, `stream`, `forward`, `evaluate`, `report`."""

    def evaluate(
        self,
        texts: Sequence[Path | str],
        *,
        reference: str | Path | None = None,
        tokens: int | None = None,
        window: int | None = None,
    ) -> Evaluation:
        """Loss and perplexity on text files, and divergence from the checkpoint `reference` if given.

        `tokens` scores the first so many of each file, `window` is the context a prediction may see (512, or
        the artifact's). Raises UserError for unusable text or a reference with another vocabulary.
        """
        from moqc.evaluate.artifact import evaluate_artifact
        from moqc.inputs import resolve_model

        checkpoint = None
        if reference is not None:
            from moqc.frontend.checkpoint import Checkpoint

            checkpoint = Checkpoint.open(resolve_model(reference))
        return evaluate_artifact(self, texts, reference=checkpoint, tokens=tokens, window=window)

    def report(self) -> Report:
        """Which experts got how many bits, and why; shows itself in a notebook, `to_html` gives the page."""
        from moqc.report.data import read_report

        return read_report(self.path)

    def __repr__(self) -> str:
        sizes, cache = self.manifest.sizes, self.manifest.cache
        return (
            f"<Artifact {self.path}: {self.manifest.source.model_type} for {self.manifest.target.name}, "
            f"{sizes.expert_file_bits_per_weight:.3f} file bits per expert weight, context {cache.context}>"
        )

    def _repr_html_(self) -> str:
        """A few facts, for notebooks."""
        manifest = self.manifest
        rows = {
            "model": f"{manifest.source.path} ({manifest.source.model_type})",
            "target": manifest.target.name,
            "experts": f"{manifest.sizes.expert_file_bits_per_weight:.3f} file bits per weight",
            "artifact": f"{manifest.sizes.artifact_bytes:,} bytes",
            "context": f"{manifest.cache.context} tokens, {manifest.cache.batch} sequences",
        }
        cells = "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())
        return f"<table>{cells}</table>"


def load(path: str | Path, *, verify: bool = False) -> Artifact:
    """Load an artifact folder: as `moqc.runtime.artifact.load`, whose checks and errors it has.

    Needs TVM's runtime, numpy, pydantic and tokenizers; torch, transformers and the compiler stay out.
    """
    return runtime.load(path, verify=verify, kind=Artifact)
