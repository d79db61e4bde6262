"""Load a compiled model and run it, with TVM's runtime library only."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moqc.errors import ArtifactError, TargetError, UserError
from moqc.launches import FILE
from moqc.log import logger
from moqc.manifest import Manifest, check_hash, check_sizes, read_manifest
from moqc.runtime.batch import Row, check_prompts, run_rows
from moqc.runtime.chat import ChatTemplate, Message
from moqc.runtime.engine import open_engine
from moqc.runtime.generate import TextBuilder, answer_length, generate_text, generate_tokens
from moqc.runtime.sampling import Sampler, Sampling
from moqc.runtime.session import Session
from moqc.runtime.tokenizer import Tokenizer
from moqc.targets import host_features

HASHED_AT_LOAD = 1 << 30
"""An artifact of up to this many bytes is hashed whenever it is loaded (under a second)."""


class Artifact:
    """A compiled model in memory. Made by `moqc.load`.

    `manifest` says what it is, `tokenizer` is the model's own, `path` the folder.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Load the code and the weights of a checked folder; use `load` instead."""
        self.path = path
        self.manifest = manifest
        self.tokenizer = Tokenizer(path / "tokenizer.json")
        self._engine = open_engine(path, manifest)

    def sampling(
        self,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Sampling:
        """How tokens are drawn: as given, and what is None as the source model's defaults say.

        Raises UserError for options out of range.
        """
        usual = self.manifest.generation
        return Sampling(
            usual.temperature if temperature is None else temperature,
            usual.top_p if top_p is None else top_p,
            seed,
            usual.top_k if top_k is None else top_k,
        )

    def session(self) -> Session:
        """A new, empty key/value state to run tokens with."""
        engine = self._engine
        functions = engine.advance, engine.last
        return Session(engine.main, engine.weights, self.manifest, engine.device, *functions)

    def forward(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Logits of every position: ids [S] -> [S, V], or ids [B, S] -> [B, S, V]; float32.

        Sequences start at position 0. Any B: rows are run in groups of the compiled batch size.
        Raises UserError for ids outside of the vocabulary or more than the compiled context.
        """
        tokens = np.asarray(ids)
        if tokens.ndim not in (1, 2) or tokens.size == 0 or tokens.dtype.kind not in "iu":
            raise UserError(f"forward: ids must be integers of shape [S] or [B, S], not {tokens.shape}")
        rows = np.atleast_2d(tokens).astype(np.int64)
        batch = self.manifest.cache.batch
        parts = [self.session().extend(rows[at : at + batch]) for at in range(0, len(rows), batch)]
        logits = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return logits if tokens.ndim == 2 else logits[0]

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | Sequence[int] | list[str] | list[list[int]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> str | list[str]:
        """The text that follows `prompt` (text or token ids), or each of a list of prompts.

        Prompts of any lengths run together, as many as the compiled batch has rows; the result is that of one
        after the other. Options as for `stream`; `seed` and `max_tokens` are for each prompt.
        """
        sampling = self.sampling(temperature, top_p, top_k, seed)
        if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int | np.integer):
            ids = self.encode(cast("str | Sequence[int]", prompt))
            tokens = self.tokens(ids, sampling, max_tokens=max_tokens)
            return "".join(generate_text(self.tokenizer, ids, tokens, stop))
        prompts = [self.encode(cast("str | Sequence[int]", one)) for one in prompt]
        check_prompts(prompts, self.manifest, max_tokens)
        return self._generate_batch(prompts, sampling, max_tokens, stop)

    def _generate_batch(
        self, prompts: list[list[int]], sampling: Sampling, max_tokens: int | None, stop: Sequence[str]
    ) -> list[str]:
        cache, ends = self.manifest.cache, frozenset(self.manifest.generation.eos_token_ids)
        texts: list[str] = []
        for start in range(0, len(prompts), cache.batch):
            rows = [
                Row(
                    ids,
                    Sampler(sampling),
                    ends,
                    answer_length(cache.context, len(ids), max_tokens),
                    TextBuilder(self.tokenizer, ids, stop),
                )
                for ids in prompts[start : start + cache.batch]
            ]
            session = self.session()
            while any(row.pending for row in rows):
                run_rows(session, rows, cache.chunk)
            texts += [row.text for row in rows]
        return texts

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Like `generate`, piece by piece; a piece never ends inside a character.

        Ends after `max_tokens` (None: when the context is full), at an end-of-text token, or before the
        first of the `stop` strings. Temperature 0 is greedy; what is None is as the model's own generation
        configuration says. Raises UserError for an empty prompt, for options out of range, and for a prompt
        that with `max_tokens` is longer than the compiled context.
        """
        ids = self.encode(prompt)
        sampling = self.sampling(temperature, top_p, top_k, seed)
        tokens = self.tokens(ids, sampling, max_tokens=max_tokens)
        return generate_text(self.tokenizer, ids, tokens, stop)

    def tokens(
        self, ids: Sequence[int], sampling: Sampling, *, max_tokens: int | None = None
    ) -> Iterator[int]:
        """Token ids that follow `ids`; an end-of-text token ends it and is not part of it."""
        ends = frozenset(self.manifest.generation.eos_token_ids)
        return generate_tokens(self.session(), ids, sampling, ends, max_tokens)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation (dicts of ``role`` and ``content``) up to the model's next answer.

        Give them to `generate` or `stream`. Raises UserError where the model has no chat template, or its
        template refuses the messages.
        """
        text = ChatTemplate.of(self.path).render(messages)
        return self.tokenizer.encode(text, special=False)  # the template writes them itself

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt. Raises UserError where there are none."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids or not prompt:  # a tokenizer may add a BOS to nothing
            raise UserError("the prompt is empty: give at least one token to continue")
        return ids


Kind = TypeVar("Kind", bound=Artifact)


@overload
def load(path: str | Path, *, verify: bool = False) -> Artifact: ...


@overload
def load(path: str | Path, *, verify: bool = False, kind: type[Kind]) -> Kind: ...


def load(path: str | Path, *, verify: bool = False, kind: type[Artifact] = Artifact) -> Artifact:
    """Load an artifact folder, as an instance of `kind`.

    Checks the manifest, this machine, TVM's version, the size of every file and the hash of the library;
    hashes of weights and of the rest too if they are small or with `verify`.

    Raises ArtifactError or TargetError; their messages say what to do.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if manifest.graph is not None:
        raise ArtifactError(f"{folder}: is a compiled graph, not a language model; use moqc.load_graph")
    check_machine(folder, manifest)
    check_files(folder, manifest, everything=verify)
    logger.debug("loading %s (%s)", folder, manifest.target.name)
    return kind(folder, manifest)


def check_machine(folder: Path, manifest: Manifest) -> None:
    """Raise where this process cannot run the library: another TVM, or a CPU without its instructions."""
    if FILE in manifest.files:
        return  # launches need neither
    for package, built in (
        ("apache-tvm", manifest.versions.tvm),
        ("apache-tvm-ffi", manifest.versions.tvm_ffi),
    ):
        installed = importlib.metadata.version(package)
        if installed != built:
            raise ArtifactError(
                f"{folder}: compiled with {package} {built}, but {installed} is installed; "
                f"compile the model again or `pip install {package}=={built}`"
            )
    missing = sorted(set(manifest.target.features) - host_features())
    if missing:
        raise TargetError(
            f"{folder}: compiled for {manifest.target.name}, but this CPU lacks {', '.join(missing)}; "
            "compile with --target native here"
        )


def check_files(folder: Path, manifest: Manifest, *, everything: bool) -> None:
    """Check sizes of all files, and hashes of those that are cheap or, with `everything`, of all."""
    check_sizes(folder, manifest.files)
    total = sum(record.bytes for record in manifest.files.values())
    for name, record in manifest.files.items():
        if everything or total <= HASHED_AT_LOAD or not name.endswith(".safetensors"):
            check_hash(folder, name, record)
