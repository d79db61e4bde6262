"""The mandatory gate: a tiny model of the user's class must give the same logits at every stage.

transformers adds architectures faster than anybody reads them, and moqc has no list of its own. What stands
in for one is this test: the hooked model, the exported program and the compiled module are compared with
transformers' eager model, with windows active, at several shapes. What disagrees is refused, with the number.

The compiled module is built with its caches, and also given the same tokens in pieces, some one by one, with
padding in between that differs from sequence to sequence. What moqc's caches hold does not mind; a layer that
mixes tokens or counts them by itself does, and is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
import tvm
from tvm import IRModule

import moqc
from moqc.errors import ModelError, PipelineError, UserError
from moqc.frontend import masks
from moqc.frontend.hf import translate
from moqc.frontend.hooks import hook
from moqc.frontend.shrink import shrink
from moqc.frontend.skeleton import CONFIG_ERRORS, build_eager, build_skeleton, first_line
from moqc.ir.annotations import PARAMS
from moqc.ir.ops import ATTENTION, CAUSAL_CONV, EXPERTS, RECURRENT, is_call
from moqc.ir.sites import bindings

Array = npt.NDArray[Any]
Run = Callable[[Array, Array], Array]
"""(input_ids, positions), both int64 [batch, seq] -> logits float32 [batch, seq, vocabulary]."""
CompileAndRun = Callable[[IRModule, list[Array]], Run]
"""Compiles a module for its weights (float32, in the order of PARAMS). The run keeps caches from call to
call; a sequence starts anew where its position is 0, and tokens of position -1 are padding."""

TOLERANCE = 1e-4  # times max(1, |logit|)
SHAPES = ((2, 7), (3, 11), (1, 1))
_MAX_PARAMETERS = 20_000_000
VERSION = 4
"""Of what is compared: raise it when the gate gets stricter or a hook changes."""
_SEED = 20240611
# What TVM raises (its own InternalError is a RuntimeError); PipelineError is plan-cache's.
_COMPILING_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    PipelineError,
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate measured: largest error of each stage, in units of max(1, |logit|)."""

    model_type: str
    architecture: str
    experts_blocks: int
    attention_blocks: int
    recurrent_blocks: int
    errors: dict[str, float]


def verify_architecture(
    config: transformers.PretrainedConfig,
    cache_dir: Path,
    compile_and_run: CompileAndRun,
    target: str,
    *,
    latent: bool = False,
) -> Verdict:
    """Verify the architecture of `config` on a tiny model, or return the cached verdict.

    `target` names what `compile_and_run` compiles for, `latent` is as in `moqc.frontend.hooks.hook`. A
    verdict is kept in ``cache_dir/gate`` by the two, the versions of the gate, moqc, transformers, torch and
    TVM, and the tiny configuration. Only passes are kept.

    Raises:
        ModelError: naming the model type, the stage and the reason.

    """
    small = shrink(config)
    file = cache_dir / "gate" / f"{_key(small, target, latent)}.json"
    if file.is_file():
        return Verdict(**json.loads(file.read_text(encoding="utf-8")))
    verdict = _measure(small, compile_and_run, latent)
    _write(file, json.dumps(asdict(verdict), indent=1))
    return verdict


def _key(small: transformers.PretrainedConfig, target: str, latent: bool) -> str:
    versions = (VERSION, moqc.__version__, transformers.__version__, torch.__version__, tvm.__version__)
    text = json.dumps(
        [versions, target, latent, type(small).__name__, small.to_dict()], sort_keys=True, default=str
    )
    return f"{small.model_type}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _write(file: Path, text: str) -> None:
    """Write atomically: a cache is read by other processes. Raises UserError where it cannot write."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as stream:
            stream.write(text)
        os.replace(stream.name, file)
    except OSError as error:
        raise UserError(f"{file.parent}: cannot write ({error.strerror}); give another --cache") from error


def _measure(small: transformers.PretrainedConfig, compile_and_run: CompileAndRun, latent: bool) -> Verdict:
    eager = random_model(small)
    hooked = build_skeleton(small)
    # Copies: hooking turns weights around in place, and the eager model must stay as it is.
    weights = {name: tensor.clone() for name, tensor in eager.state_dict().items()}
    hooked.load_state_dict(weights, assign=True)
    hooked.tie_weights()
    layouts = hook(hooked, latent=latent)
    comparison = Comparison(eager)
    comparison.check("hooked", _torch_run(hooked))
    program, mod = translate(hooked, max_batch=4, max_chunk=16)
    comparison.check("exported", _torch_run(program.module()))
    state = dict(hooked.named_parameters(remove_duplicate=False))
    weights_in_order = [state[name].detach().numpy() for name in PARAMS.of(mod)]
    try:
        compiled = compile_and_run(mod, weights_in_order)
    except _COMPILING_ERRORS as error:
        raise ModelError(f"{small.model_type}: cannot be compiled: {first_line(error)}") from error
    comparison.check("compiled", compiled)
    comparison.check("decoded", in_pieces(compiled))
    values = [value for _, value in bindings(mod["main"])]
    found = sum(is_call(value, EXPERTS) for value in values)
    if found != len(layouts):
        raise ModelError(f"{small.model_type}: has {len(layouts)} experts blocks, but the graph has {found}")
    attentions = sum(is_call(value, ATTENTION) for value in values)
    recurrent = sum(is_call(value, RECURRENT, CAUSAL_CONV) for value in values)
    return Verdict(small.model_type, type(eager).__name__, found, attentions, recurrent, comparison.errors)


class Comparison:
    """Compares stages with the eager model at `SHAPES` and keeps the errors."""

    def __init__(self, eager: transformers.PreTrainedModel) -> None:
        self._model_type = eager.config.model_type
        run = _torch_run(eager)
        self._inputs = [_inputs(*shape, eager.config.vocab_size) for shape in SHAPES]
        try:
            self._expected = [run(*inputs) for inputs in self._inputs]
        except CONFIG_ERRORS as error:
            raise ModelError(
                f"{self._model_type}: transformers' own tiny model fails: {first_line(error)}"
            ) from error
        self.errors: dict[str, float] = {}

    def check(self, stage: str, run: Run) -> None:
        """Record the error of `run`; ModelError when it is over the tolerance, or when it fails."""
        errors = []
        for inputs, expected in zip(self._inputs, self._expected, strict=True):
            try:
                found = run(*inputs)
            except CONFIG_ERRORS as error:
                what = f"{stage} model fails: {first_line(error)}"
                if reader := masks.reader(error):
                    what = f"{reader} reads the entries of its attention mask, of which moqc makes no tensor"
                raise ModelError(f"{self._model_type}: {what}") from error
            errors.append(float(np.max(np.abs(found - expected) / np.maximum(1, np.abs(expected)))))
        self.errors[stage] = worst = max(errors)
        if not worst <= TOLERANCE:  # NaN too
            shape = SHAPES[errors.index(worst)] if worst in errors else SHAPES[0]
            raise ModelError(
                f"{self._model_type}: refused: {_REASONS[stage]} (relative error {worst:.1e} in the "
                f"logits of a tiny model at batch {shape[0]}, length {shape[1]}; allowed {TOLERANCE:.0e})"
            )


_REASONS = {
    "hooked": "its experts or attention do something that moqc's operators do not, such as a mask of its own",
    "exported": "torch.export changes what it computes",
    "compiled": "the compiled model computes something else",
    "decoded": "it mixes tokens or counts them in a layer that moqc keeps no state for (recurrent, "
    "convolutional or length-dependent), so that pieces of a sequence differ from the whole",
}


def random_model(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """An eager model with random weights, large enough that every part of it shows in the logits.

    Raises ModelError when the configuration cannot be built or is not small.
    """
    size = sum(parameter.numel() for parameter in build_skeleton(config).parameters())
    if size > _MAX_PARAMETERS:
        raise ModelError(
            f"{config.model_type}: moqc cannot shrink it for verification ({size} parameters left)"
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(_SEED)
        model = build_eager(config)
        computed = {name for name, buffer in model.named_buffers() if len(set(buffer.flatten().tolist())) > 2}
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and name not in computed:
                _randomize(name, tensor)
    return model


def _randomize(name: str, tensor: torch.Tensor) -> None:
    if tensor.dim() >= 2:
        tensor.normal_(0, 0.2)
    # Of a norm (which may add 1 itself), or another factor: far from its start, it would cut off the
    # residual or sharpen attention, and rounding would grow with every layer.
    elif name.endswith("weight") or bool((tensor == 1).all()):
        tensor.add_(torch.randn_like(tensor), alpha=0.1)
    else:
        tensor.normal_(0, 0.3)


def _inputs(batch: int, length: int, vocabulary: int) -> tuple[Array, Array]:
    generator = np.random.default_rng(_SEED)
    ids = generator.integers(3, vocabulary, (batch, length))
    return ids, np.tile(np.arange(length), (batch, 1))


def _torch_run(module: torch.nn.Module) -> Run:
    """`Run` of a transformers model or of an exported program's module."""

    def run(ids: Array, positions: Array) -> Array:
        tokens, places = torch.from_numpy(ids), torch.from_numpy(positions)
        with torch.no_grad():
            if isinstance(module, transformers.PreTrainedModel):
                output = module(input_ids=tokens, position_ids=places, use_cache=False).logits
            else:
                output = module(tokens, places)
        logits: Array = output.numpy()
        return logits

    return run


def in_pieces(run: Run) -> Run:
    """`run` on half of the tokens, the next two one by one, then the rest, all with padding around them."""

    def wrapped(ids: Array, positions: Array) -> Array:
        rows, count = ids.shape
        cuts = sorted({0, count // 2, *(min(count, count // 2 + n) for n in (1, 2)), count})
        pieces = []
        for first, end in pairwise(cuts):
            # Row r has r tokens of padding before its own, and the others after.
            spread = np.arange(end - first) + np.arange(rows)[:, None]
            wide = (rows, end - first + rows - 1)
            padded_ids, padded_positions = np.full(wide, 3), np.full(wide, -1)
            for padded, given in ((padded_ids, ids), (padded_positions, positions)):
                np.put_along_axis(padded, spread, given[:, first:end], 1)
            logits = run(padded_ids, padded_positions)
            pieces.append(np.take_along_axis(logits, spread[..., None], 1))
        return np.concatenate(pieces, axis=1)

    return wrapped
