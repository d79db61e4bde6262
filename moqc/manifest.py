"""`moqc.json`: what an artifact folder holds, and how it is read and written.

The manifest is written last, so a folder without a valid one is not an artifact. It holds a digest of its own
text (with the digest's 64 characters taken as zeros) and the size and SHA-256 of every other file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moqc.errors import ArtifactError

MANIFEST = "moqc.json"
LIBRARY = "model.so"
ANALYSIS = "analysis.json"
CARD = "README.md"
SCHEMA_VERSION = 1

Activations = Literal["float", "int8"]

_NO_DIGEST = "0" * 64
_DIGEST = re.compile(r'("digest": ")([0-9a-f]{64})(")')
_BLOCK = 1 << 22


class Record(BaseModel):
    """Base of all parts of a manifest: immutable, and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(Record):
    """One file of the artifact."""

    bytes: int
    sha256: str


class Source(Record):
    """The checkpoint an artifact was made from."""

    path: str
    model_type: str
    fingerprint: str
    """SHA-256 over the configuration and the weight files."""


class CalibrationRecord(Record):
    """The text that was measured on."""

    datasets: dict[str, int]
    """Name -> tokens."""
    fingerprint: str
    """Digest of names and tokens."""


class TargetRecord(Record):
    """What the library was compiled for."""

    name: str
    features: tuple[str, ...]
    """CPU flags the code uses, by their Linux names."""
    architectures: tuple[str, ...] = ()
    """Of the GPUs that the library has machine code for; empty where the CPU computes."""
    plans: dict[str, int] = {}
    """Where the plans of the experts' kernels are from (a search, or rules) -> how many."""


class Versions(Record):
    """Exact versions that built the library; the runtime's TVM must be the same."""

    moqc: str
    tvm: str
    tvm_ffi: str
    llvm: str


class Sizes(Record):
    """Bytes and bits; see "Words" in the documentation."""

    expert_file_bits_per_weight: float
    model_file_bits_per_weight: float
    parameter_bytes: int
    artifact_bytes: int
    """All files, this one included."""


class Parameter(Record):
    """One weight argument of the compiled function, in order. The file may store it in a narrower float."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class CacheSpec(Record):
    """Key/value state of the compiled function."""

    context: int
    """Tokens a sequence may have, prompt and answer together."""
    batch: int
    chunk: int
    """Tokens a row may have in one call."""
    tensors: tuple[tuple[int, ...], ...]
    """Shapes of the cache arguments, in order."""
    dtype: Literal["float32", "float16", "int8"] = "float32"
    """Of the keys and values (`moqc.quant.kv_cache`)."""
    states: tuple[int, ...] = ()
    """Which of the cache arguments are states of recurrent layers: those are float32."""

    @property
    def buffers(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Shape and dtype of each cache argument."""
        return tuple(
            (shape, "float32" if number in self.states else self.dtype)
            for number, shape in enumerate(self.tensors)
        )


class Generation(Record):
    """Token ids and defaults the source model ships for generation."""

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0 where the model's own default is not to draw."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0: all tokens."""


class SitePruning(Record):
    """How one experts block is pruned, and what that did on calibration text."""

    rule: str
    skipped: float
    """Share of the (token, expert) pairs that are skipped."""
    renormalize: bool
    chosen: tuple[int, ...]
    """Pairs of each expert that the router chose."""
    kept: tuple[int, ...]
    """Pairs of each expert that are left."""
    cold: tuple[int, ...]
    """Experts without any."""
    policy: Literal["keep", "demote", "remove"]
    """What became of them."""


class GraphInput(Record):
    """An input of a compiled graph; sizes that are not numbers are symbolic."""

    name: str
    dtype: str
    shape: tuple[str, ...]


class GraphSpec(Record):
    """What goes into a compiled graph and what comes out, in order."""

    inputs: tuple[GraphInput, ...]
    outputs: tuple[str, ...]


class KernelNumerics(Record):
    """A packed kernel against the reference, measured when it was compiled; see `moqc.certificate`."""

    site: str
    """Whose weights were used."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Shapes of the input it was run on."""
    max_relative_error: float | None = None
    """The largest of them, by Frobenius norms; None where it was not run."""
    not_run: str | None = None
    """Why it was not run."""


class Manifest(Record):
    """The content of ``moqc.json``."""

    schema_version: Literal[1] = 1
    source: Source
    target: TargetRecord
    versions: Versions
    pipeline: str
    """The passes that were run, as `Pipeline.parse` reads them."""
    recipe: dict[str, Any] | None = None
    """The options of the compilation, as `moqc.recipe.Recipe` has them."""
    calibration: CalibrationRecord | None = None
    """None where no text was read."""
    bits: dict[str, dict[str, tuple[str, ...]]]
    """site -> projection -> format of each expert."""
    linear_bits: dict[str, str]
    """site -> format of the other quantized matrices."""
    pruning: dict[str, SitePruning] = {}
    """site -> how tokens skip its experts, and the coverage of each; empty where nothing is pruned."""
    activations: Activations
    rotated: bool = False
    """Whether the packed matrices of down are for rotated inputs (`moqc.quant.hadamard`)."""
    protected: dict[str, tuple[int, ...]] = {}
    """site -> input channels that the added columns of gate and up read (`moqc.quant.protection`)."""
    sizes: Sizes
    parameters: tuple[Parameter, ...]
    cache: CacheSpec
    vocabulary: int
    generation: Generation
    graph: GraphSpec | None = None
    """None for language models; a graph has no cache, vocabulary or tokenizer."""
    numerics: dict[str, KernelNumerics]
    """The certificate: description of a kernel -> its errors against the reference."""
    quality: dict[str, float] | None = None
    """Metrics against the source model where they were measured."""
    files: dict[str, FileRecord]
    digest: str = _NO_DIGEST

    def to_text(self) -> str:
        """The file's text, with the digest filled in."""
        return seal(json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")


def hash_file(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and hash of every file of `folder` but the manifest, by name."""
    return {
        path.name: FileRecord(bytes=path.stat().st_size, sha256=hash_file(path))
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }


def seal(text: str) -> str:
    """`text` with its digest field set."""
    blank = _DIGEST.sub(rf"\g<1>{_NO_DIGEST}\g<3>", text)
    digest = hashlib.sha256(blank.encode()).hexdigest()
    return _DIGEST.sub(rf"\g<1>{digest}\g<3>", blank)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest into `folder` and return it as written, with `artifact_bytes` counting itself."""
    files = sum(record.bytes for record in manifest.files.values())
    total = -1
    while (
        total != manifest.sizes.artifact_bytes
    ):  # a longer number makes a longer file: ends after a few rounds
        total = manifest.sizes.artifact_bytes
        text = manifest.to_text()
        sizes = manifest.sizes.model_copy(update={"artifact_bytes": files + len(text.encode())})
        manifest = manifest.model_copy(update={"sizes": sizes})
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / MANIFEST)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``moqc.json`` of an artifact folder.

    Raises ArtifactError when the folder is not an artifact, when the manifest is of another schema version,
    or when a byte of it was changed.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not folder.is_dir():
            raise ArtifactError(f"{folder}: no such folder; `moqc compile` makes an artifact") from error
        made = "compile it first" if (folder / "config.json").is_file() else "`moqc compile` makes one"
        raise ArtifactError(f"{folder}: not a moqc artifact, it has no {MANIFEST}; {made}") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot read ({error.strerror}); check rights") from error
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged, not valid JSON ({error}); compile the model again") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: schema version {version!r}, this moqc reads {SCHEMA_VERSION}; "
            "compile the model again or use the moqc that made it"
        )
    if seal(text) != text or not _DIGEST.search(text):
        raise ArtifactError(f"{path}: its content was changed after it was written; compile the model again")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ArtifactError(f"{path}: invalid at {where!r}; compile the model again") from error


def check_sizes(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Raise ArtifactError when a listed file is missing or of another length."""
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(
                f"{path}: missing from the artifact; copy it again or compile the model again"
            )
        if (size := path.stat().st_size) != record.bytes:
            raise ArtifactError(
                f"{path}: {size} bytes where {MANIFEST} says {record.bytes}; "
                "the copy is incomplete or was changed; copy or compile again"
            )


def check_hash(folder: Path, name: str, record: FileRecord) -> None:
    """Raise ArtifactError when the content of one file is not what the manifest says."""
    if hash_file(folder / name) != record.sha256:
        raise ArtifactError(
            f"{folder / name}: changed after it was written (SHA-256 differs); copy or compile again"
        )
