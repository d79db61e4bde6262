"""`moqc run`: continue a prompt."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moqc import log
from moqc.commands.options import ArtifactArgument, Json, Quiet, options, print_json
from moqc.commands.repl import Conversation, converse, prompt_session
from moqc.errors import UserError
from moqc.options import DEFAULT_TOKENS, GenerateOptions

if TYPE_CHECKING:
    from moqc.runtime.artifact import Artifact


def conversation(prompt: str, system: str | None) -> list[dict[str, str]]:
    """Messages that end with what the user says."""
    told = [] if system is None else [{"role": "system", "content": system}]
    return [*told, {"role": "user", "content": prompt}]


def has_template(model: Artifact) -> bool:
    """Whether the model was trained to chat."""
    try:
        model.chat_prompt(conversation("x", None))
    except UserError:
        return False
    return True


def _piped() -> str:
    """The prompt on stdin; UserError where it is not text."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: the prompt is not UTF-8 ({error.reason}); give text") from error


def _converse(model: Artifact, chosen: GenerateOptions, *, chat: bool, system: str | None) -> None:
    """The conversation on a terminal: answers on stdout, notes on stderr."""
    talk = Conversation(
        model,
        chat or has_template(model),
        model.sampling(chosen.temperature, chosen.top_p, chosen.top_k, chosen.seed),
        chosen.max_tokens or DEFAULT_TOKENS,
        tuple(chosen.stop),
        system,
    )
    manifest = model.manifest
    mode = "messages are answered" if talk.chat else "text is continued"
    typer.echo(
        f"{manifest.source.path}, {manifest.sizes.expert_file_bits_per_weight:.2f} bits, "
        f"{manifest.target.name}; {mode}; /help for commands",
        err=True,
    )
    session = prompt_session()

    def write(piece: str) -> None:
        typer.echo(piece, nl=False)
        sys.stdout.flush()

    converse(talk, lambda: session.prompt("> "), write, lambda text: typer.secho(text, dim=True, err=True))


def _recorded(tokens: Iterable[int], record: list[int]) -> Iterator[int]:
    """The same tokens, appended to `record` as they pass."""
    for token in tokens:
        record.append(token)
        yield token


def _answer(model: Artifact, prompt: str, ids: list[int], chosen: GenerateOptions, *, as_json: bool) -> None:
    """The text after `ids`, as it comes, or with its numbers as JSON."""
    from moqc.runtime.generate import generate_text

    room = model.manifest.cache.context - len(ids)
    limit = chosen.max_tokens if chosen.max_tokens is not None else max(1, min(DEFAULT_TOKENS, room))
    produced: list[int] = []
    start = time.perf_counter()
    sampling = model.sampling(chosen.temperature, chosen.top_p, chosen.top_k, chosen.seed)
    tokens = model.tokens(ids, sampling, max_tokens=limit)
    pieces = []
    for piece in generate_text(model.tokenizer, ids, _recorded(tokens, produced), chosen.stop):
        pieces.append(piece)
        if not as_json:
            typer.echo(piece, nl=False)
    seconds = time.perf_counter() - start
    if not as_json:
        typer.echo()
        log.logger.info("%d + %d tokens in %.2f s", len(ids), len(produced), seconds)
        return
    print_json(
        {
            "prompt": prompt,
            "text": "".join(pieces),
            "prompt_tokens": len(ids),
            "tokens": len(produced),
            "seconds": seconds,
        }
    )


@options(choices=GenerateOptions)
def command(
    artifact: ArtifactArgument,
    choices: dict[str, Any],
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Text to continue. [default: what is piped in; on a terminal, a conversation]",
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check the hash of every file first.")] = False,
    as_json: Json = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Take the prompt as a message, in the model's chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="With --chat: what the model is told first.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Continue a prompt, or answer it with --chat. The text goes to stdout as it comes."""
    from moqc.keywords import build
    from moqc.runtime.artifact import load

    if quiet or as_json:
        log.be_quiet()
    chosen = build(GenerateOptions, choices, "run")
    if prompt is None and sys.stdin.isatty():
        _converse(load(artifact, verify=verify), chosen, chat=chat, system=system)
        return
    if system is not None and not chat:
        raise UserError("--system has no meaning without --chat")
    prompt = _piped() if prompt is None else prompt
    model = load(artifact, verify=verify)
    ids = model.chat_prompt(conversation(prompt, system)) if chat else model.encode(prompt)
    _answer(model, prompt, ids, chosen, as_json=as_json)
