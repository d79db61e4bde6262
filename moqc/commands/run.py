"""`moqc run`: continue a prompt."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from moqc import log
from moqc.commands.options import ArtifactArgument, Json, Quiet, print_json
from moqc.commands.repl import Conversation, converse, prompt_session
from moqc.errors import UserError

if TYPE_CHECKING:
    from moqc.runtime.artifact import Artifact

DEFAULT_TOKENS = 128


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


def _converse(talk: Conversation) -> None:
    """The conversation on a terminal: answers on stdout, notes on stderr."""
    manifest = talk.model.manifest
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


def command(
    artifact: ArtifactArgument,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Text to continue. [default: what is piped in; on a terminal, a conversation]",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "-n",
            metavar="N",
            help=f"Tokens to produce at most. [default: {DEFAULT_TOKENS}, or what fits]",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="X", help="0 takes the most likely token. [default: the model's own]"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            metavar="X",
            help="Draw from the fewest tokens of this probability. [default: the model's own]",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            metavar="N",
            help="Draw from the N most likely tokens. [default: the model's own]",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Makes drawing repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before it; repeatable.")] = None,
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
    """Continue a prompt, or answer it with --chat; the text goes to stdout as it comes."""
    from moqc.runtime.artifact import load
    from moqc.runtime.generate import generate_text

    if quiet or as_json:
        log.be_quiet()
    if prompt is None and sys.stdin.isatty():
        model = load(artifact, verify=verify)
        talk = Conversation(
            model,
            chat or has_template(model),
            model.sampling(temperature, top_p, top_k, seed),
            max_tokens or DEFAULT_TOKENS,
            tuple(stop or ()),
            system,
        )
        _converse(talk)
        return
    if system is not None and not chat:
        raise UserError("--system has no meaning without --chat")
    prompt = _piped() if prompt is None else prompt
    model = load(artifact, verify=verify)
    ids = model.chat_prompt(conversation(prompt, system)) if chat else model.encode(prompt)
    room = model.manifest.cache.context - len(ids)
    limit = max_tokens if max_tokens is not None else max(1, min(DEFAULT_TOKENS, room))
    produced: list[int] = []
    start = time.perf_counter()
    sampling = model.sampling(temperature, top_p, top_k, seed)
    tokens = model.tokens(ids, sampling, max_tokens=limit)
    pieces = []
    for piece in generate_text(model.tokenizer, ids, _recorded(tokens, produced), stop or ()):
        pieces.append(piece)
        if not as_json:
            typer.echo(piece, nl=False)
    seconds = time.perf_counter() - start
    if as_json:
        print_json(
            {
                "prompt": prompt,
                "text": "".join(pieces),
                "prompt_tokens": len(ids),
                "tokens": len(produced),
                "seconds": seconds,
            }
        )
        return
    typer.echo()
    log.logger.info("%d + %d tokens in %.2f s", len(ids), len(produced), seconds)
