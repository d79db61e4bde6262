"""What the functions of `moqc.api` start from: model folders, text, IR files, the workspace."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moqc.errors import ModelError, UserError, reason
from moqc.manifest import MANIFEST

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from tvm import IRModule

    from moqc.calibrate.text import CalibrationSet
    from moqc.calibrate.workspace import ParamStore, Workspace
    from moqc.frontend.checkpoint import Checkpoint
    from moqc.frontend.gate import Verdict
    from moqc.targets import Target

LONGEST_DEFAULT_CONTEXT = 4096


def require_compiler() -> None:
    """Raise UserError where this process imported TVM as a runtime, for `moqc.load`."""
    tvm = sys.modules.get("tvm")
    if tvm is not None and not hasattr(tvm, "relax"):
        raise UserError(
            "this process imported TVM without its compiler (moqc.load does): "
            "`import tvm` first, or compile in another process"
        )


def require_onnx() -> None:
    """Raise UserError where the packages that read and write ONNX are not installed."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}: pip install 'moqc[onnx]'")


def resolve_model(model: str | Path) -> Path:
    """The folder of a model: `model` itself, or a download from the Hugging Face hub.

    Raises ModelError when it is neither.
    """
    path = Path(model)
    if (path / MANIFEST).is_file():
        raise ModelError(f"{path}: is a compiled artifact; give the checkpoint it was made from")
    if not _is_hub_id(model):
        return path
    return _download(str(model), ["*.safetensors", "*.json", "*.jinja"])


def _download(model: str, patterns: list[str]) -> Path:
    """The files of a model of the Hugging Face hub that match `patterns`, as a folder."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        found = huggingface_hub.snapshot_download(model, allow_patterns=patterns)
    except (OSError, HFValidationError, ValueError) as error:
        raise ModelError(
            f"{model}: no such folder, and not available from the Hugging Face hub "
            f"({type(error).__name__}); give a checkpoint folder"
        ) from error
    return Path(found)


def resolve_config(model: str | Path) -> tuple[PretrainedConfig, Path]:
    """The configuration of a model, without its weights, and the folder it is from.

    `model` is a checkpoint folder, a ``config.json``, a name of `moqc.frontend.synthetic.shape_names`, or an
    id of the Hugging Face hub. Raises ModelError when it is none of these.
    """
    from moqc.frontend.config import parse_config, read_config
    from moqc.frontend.synthetic import read_declared, shape_names

    path = Path(model)
    if (path / MANIFEST).is_file():
        raise ModelError(f"{path}: is a compiled artifact; `moqc inspect` says what it takes")
    if path.is_file() or str(model) in shape_names():
        with tempfile.TemporaryDirectory(prefix="moqc-") as name:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(read_declared(model)), encoding="utf-8")
            return parse_config(folder, str(model)), folder
    if _is_hub_id(model):
        path = _download(str(model), ["config.json", "tokenizer*", "generation_config.json"])
    return read_config(path), path


def _is_hub_id(model: str | Path) -> bool:
    text = str(model)
    return not Path(model).exists() and text.count("/") == 1 and not text.startswith((".", "/", "~"))


def context_length(config: PretrainedConfig, wanted: int | None) -> int:
    """Tokens of context to compile for: `wanted`, or the model's own limit, at most 4096.

    A model that selects `index_topk` tokens of a longer sequence is compiled for up to so many. Raises
    UserError when the model cannot do `wanted`.
    """
    text = config.get_text_config()
    limits = (getattr(text, name, None) for name in ("max_position_embeddings", "index_topk"))
    limit = min((int(limit) for limit in limits if limit), default=None)
    if wanted is None:
        return min(limit or LONGEST_DEFAULT_CONTEXT, LONGEST_DEFAULT_CONTEXT)
    if wanted < 1 or (limit is not None and wanted > limit):
        raise UserError(
            f"context {wanted}: must be {f'1 to {limit}' if limit else 'at least 1'} for this model"
        )
    return wanted


def check_metadata(checkpoint: Checkpoint) -> None:
    """Raise ModelError where the files that are copied into an artifact are missing or damaged."""
    from moqc.calibrate.text import tokenize
    from moqc.describe import read_generation

    tokenize(checkpoint.path / "tokenizer.json", "")
    read_generation(checkpoint.path)


def check_architecture(checkpoint: Checkpoint, workspace: Workspace, target: Target) -> None:
    """Compare a tiny model of the same class with transformers at every stage, once for each architecture.

    Raises ModelError where moqc would compute something else.
    """
    architecture_gate(workspace, target)(checkpoint.config)


def architecture_gate(workspace: Workspace, target: Target) -> Callable[[PretrainedConfig], Verdict]:
    """The gate for `target`, with its cache in `workspace`: a configuration -> the verdict on it.

    For another machine's target, the best one of this machine stands in: what is compiled is run here.
    """
    from moqc.codegen import compile_and_run
    from moqc.frontend.gate import verify_architecture
    from moqc.targets import find_target, runs_here

    latent = target.latent_attention
    target = target if runs_here(target) else find_target("native")
    compiler = partial(compile_and_run, target=target)
    return lambda config: verify_architecture(config, workspace.root, compiler, target.name, latent=latent)


def open_workspace(cache: Path | str | None) -> Workspace:
    """The cache folder; UserError when it is not a folder."""
    from moqc.calibrate.workspace import Workspace

    workspace = Workspace(cache)
    if workspace.root.exists() and not workspace.root.is_dir():
        raise UserError(f"{workspace.root}: is not a folder; give another --cache")
    return workspace


def read_calibration(
    checkpoint: Checkpoint, files: Sequence[Path | str] | None, tokens: int, seed: int
) -> CalibrationSet:
    """Calibration text in the model's tokens, from `files` or the built-in text."""
    from moqc.calibrate.text import load_calibration

    if seed < 0:
        raise UserError(f"seed {seed}: must not be negative")

    tokenizer = checkpoint.path / "tokenizer.json"
    limit = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None) or 512
    return load_calibration(files or None, tokenizer, tokens=tokens, window=min(512, limit), seed=seed)


def read_module(path: Path) -> IRModule:
    """The IR module in a text file. Raises UserError when the file cannot be read or parsed."""
    from moqc.ir.text import parse_module

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the IR ({reason(error)})") from error
    return parse_module(text, str(path))


@contextmanager
def param_store(root: Path, dump: Path | None, start_from: Path | None) -> Iterator[ParamStore]:
    """Where packed weights wait for packaging.

    Beside dumped IR, so that a later run can start from it; else in a temporary folder under `root`.
    """
    from moqc.calibrate.workspace import ParamStore

    beside = dump if start_from is None else start_from.absolute().parent
    if beside is not None:
        yield ParamStore(beside / "params")
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix="params-", dir=root)
    except OSError as error:
        raise UserError(f"{root}: cannot write ({error.strerror}); give another --cache") from error
    with temporary as name:
        yield ParamStore(name)
