"""Write an artifact folder: everything beside its place first, moved there in one step at the end."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moqc.errors import InternalError, ModelError, UserError, reason
from moqc.launches import FILE
from moqc.log import logger, track
from moqc.manifest import (
    ANALYSIS,
    CARD,
    LIBRARY,
    MANIFEST,
    Manifest,
    Parameter,
    Sizes,
    record_files,
    write_manifest,
)
from moqc.page import PAGE
from moqc.tensorfile import LINE_BYTES, StoredTensor, create_tensors

SHARD_BYTES = 2 << 30
"""Largest parameter file, unless a single tensor is larger."""

COPIED = (
    "tokenizer_config.json",
    "generation_config.json",
    "config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


@dataclass(frozen=True, slots=True)
class WeightCounts:
    """What sizes are measured against: weights of the source model, tied ones once."""

    expert_names: frozenset[str]
    """Parameters that belong to routed experts: codes, scales, zeros and tables, or plain matrices."""
    expert_weights: int
    model_weights: int


def check_output(out: Path, *, force: bool) -> None:
    """Raise UserError unless an artifact may be written to `out`.

    An existing folder must be empty, or an artifact and `force` given: no other folder is ever replaced, nor
    one that holds files besides.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out}: is not a folder; give another output")
    if out.exists() and any(out.iterdir()):
        if not (out / MANIFEST).is_file():
            raise UserError(f"{out}: holds files that are not a moqc artifact; give another output")
        if foreign := sorted(path.name for path in out.iterdir() if not _is_ours(path)):
            raise UserError(
                f"{out}: {foreign[0]} is not part of the artifact there and would be lost: move it away"
            )
        if not force:
            raise UserError(
                f"{out}: exists; give another output, or replace it with --force (Python: force=True)"
            )
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        # Access bits say little to root or about read-only mounts: try it.
        tempfile.TemporaryDirectory(prefix=".moqc-", dir=parent).cleanup()
    except OSError as error:
        raise UserError(f"{out}: cannot write in {parent} ({error.strerror}); give another output") from error


def _is_ours(path: Path) -> bool:
    """Whether an artifact may have a file of this name."""
    written = (MANIFEST, LIBRARY, FILE, ANALYSIS, CARD, "tokenizer.json", *COPIED, *PAGE)
    known = path.name in written or path.match("params-*.safetensors")
    return known and path.is_file()


@contextmanager
def staged_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block succeeds and vanishes when it fails."""
    check_output(out, force=force)
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{out}: cannot write in {out.parent} ({error.strerror})") from error
    try:
        yield partial
        check_output(out, force=force)  # the block may have taken an hour
        _replace(partial, out)
    except OSError as error:
        raise UserError(f"{out}: cannot write ({reason(error)}); check space and rights") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(new: Path, place: Path) -> None:
    """Move a folder to `place`; what is there survives until the new one is in place."""
    if not place.exists():
        new.rename(place)
        return
    old = new.with_name(new.name.replace(".partial-", ".old-"))
    place.rename(old)
    try:
        new.rename(place)
    except OSError:
        old.rename(place)
        raise
    shutil.rmtree(old)


def write_artifact(
    out: Path,
    draft: Manifest,
    *,
    write_code: Callable[[Path], None],
    load: Callable[[str], StoredTensor],
    counts: WeightCounts,
    source: Path | None,
    documents: Callable[[Manifest], Mapping[str, str]] = lambda _: {},
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
) -> Manifest:
    """Write the artifact folder `out` and return its manifest.

    `draft` is the manifest without sizes and files; `write_code` writes the compiled code into a folder;
    `load` gives the stored form of each of `draft.parameters`, one at a time; `source` is the checkpoint
    folder that tokenizer and configuration files are copied from, None for a graph; `documents` gives further
    text files (name -> content) of the manifest without its files; a parameter file has up to `shard_bytes`.

    Raises UserError when `out` exists (see `check_output`) or cannot be written, ModelError when the
    checkpoint has no tokenizer.json.
    """
    with staged_folder(out, force=force) as folder:
        if source is not None:
            copy_metadata(source, folder)
        write_code(folder)
        stored = write_parameters(folder, draft.parameters, load, shard_bytes=shard_bytes)
        sized = draft.model_copy(update={"sizes": _sizes(stored, counts)})
        for name, text in documents(sized).items():
            (folder / name).write_text(text, encoding="utf-8")
        return write_manifest(folder, sized.model_copy(update={"files": record_files(folder)}))


def share_files(folder: Path, made: Mapping[str, Manifest], name: str, manifest: Manifest) -> None:
    """Make files of the artifact `name` in `folder` that an artifact in `made` has too one file with those.

    Equal is what has an equal SHA-256. They are hard links; where the file system has none, they stay copies.
    """
    known = {
        record.sha256: (other, file) for other, each in made.items() for file, record in each.files.items()
    }
    for file, record in manifest.files.items():
        if record.sha256 not in known:
            continue
        other, twin = known[record.sha256]
        link = folder / name / f".{file}.link"
        try:
            link.hardlink_to(folder / other / twin)
            link.replace(folder / name / file)
        except OSError as error:
            logger.info("%s: %s stays a copy of %s's (%s)", name, file, other, error.strerror)
            return
        if file.endswith(".safetensors"):
            logger.info("%s: %s, %s bytes, is %s's", name, file, f"{record.bytes:,}", other)


def copied_bytes(source: Path) -> int:
    """Bytes of the files of a checkpoint folder that go into an artifact as they are."""
    paths = (source / name for name in ("tokenizer.json", *COPIED))
    return sum(path.stat().st_size for path in paths if path.is_file())


def copy_metadata(source: Path, folder: Path) -> None:
    """Copy tokenizer and configuration. Raises ModelError where there is no tokenizer.json."""
    tokenizer = source / "tokenizer.json"
    if not tokenizer.is_file():
        raise ModelError(
            f"{source}: no tokenizer.json; save the model's tokenizer in the fast format beside its weights"
        )
    for path in (tokenizer, *(source / name for name in COPIED)):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def _ends_within_a_line(parameter: Parameter) -> bool:
    return math.prod(parameter.shape) * np.dtype(parameter.dtype).itemsize % LINE_BYTES != 0


def write_parameters(
    folder: Path,
    parameters: Sequence[Parameter],
    load: Callable[[str], StoredTensor],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, int]:
    """Write ``params-00001.safetensors`` and on; name -> stored bytes. One tensor is in memory at a time.

    Tensors of whole cache lines come first, so that they start at one too and need not be copied when loaded.
    """
    stored: dict[str, int] = {}
    pending = [parameter.name for parameter in sorted(parameters, key=_ends_within_a_line)]
    shapes = {parameter.name: parameter.shape for parameter in parameters}
    tensors = track(((name, load(name)) for name in pending), "writing parameters", len(pending))
    item = next(tensors, None)
    shard = 0
    while item is not None:
        shard += 1
        written = 0
        with create_tensors(folder / f"params-{shard:05}.safetensors", pending[len(stored) :]) as writer:
            while item is not None and (written == 0 or written + item[1].data.nbytes <= shard_bytes):
                name, tensor = item
                if tensor.data.shape != shapes[name]:
                    raise InternalError(f"{name}: stored as {tensor.data.shape}, compiled as {shapes[name]}")
                stored[name] = writer.add(name, tensor)
                written += stored[name]
                item = next(tensors, None)
    return stored


def _sizes(stored: dict[str, int], counts: WeightCounts) -> Sizes:
    total = sum(stored.values())
    experts = sum(size for name, size in stored.items() if name in counts.expert_names)
    return Sizes(
        expert_file_bits_per_weight=8 * experts / counts.expert_weights,
        model_file_bits_per_weight=8 * total / counts.model_weights,
        parameter_bytes=total,
        artifact_bytes=0,
    )


def from_torch(tensor: object) -> StoredTensor:
    """The stored form of a torch tensor; bfloat16 keeps its bits."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise InternalError(f"expected a torch tensor, got {type(tensor).__name__}")
    plain = tensor.detach().contiguous()
    if plain.dtype == torch.bfloat16:
        return StoredTensor("BF16", plain.view(torch.int16).numpy().view(np.uint16))
    return StoredTensor.of(plain.numpy())
