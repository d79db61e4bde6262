"""The conversation behind `moqc run ARTIFACT` without a prompt: lines in, answers out, a few commands."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moqc.errors import UserError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from moqc.runtime.artifact import Artifact
    from moqc.runtime.sampling import Sampling

HELP = """\
/help              this text
/reset             forget the conversation
/system TEXT       tell the model TEXT first, and forget the conversation (chat only)
/temperature X     0 takes the most likely token
/top-p X           draw from the fewest tokens of this probability
/top-k N           draw from the N most likely tokens, 0: all
/max-tokens N      tokens of an answer at most
/seed N            makes drawing repeatable
/chat, /continue   answer messages in the model's template, or continue text
/quit              or Ctrl-D; Ctrl-C stops an answer"""


@dataclass
class Conversation:
    """What was said, and how answers are drawn. Without `chat` every line is continued by itself."""

    model: Artifact
    chat: bool
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...] = ()
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    last: tuple[int, int, float] = (0, 0, 0.0)
    """Prompt tokens, produced tokens and seconds of the last answer."""

    def ask(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece; kept as part of the conversation, also where it was stopped.

        Raises UserError for a prompt that does not fit, before anything is produced.
        """
        from moqc.runtime.generate import generate_text

        told = [] if self.system is None else [{"role": "system", "content": self.system}]
        said = [*self.messages, {"role": "user", "content": text}]
        ids = self.model.chat_prompt([*told, *said]) if self.chat else self.model.encode(text)
        room = self.model.manifest.cache.context - len(ids)
        if room < 1:
            raise UserError(f"{len(ids)} tokens fill the context; /reset starts anew")
        produced: list[int] = []
        tokens = self.model.tokens(ids, self.sampling, max_tokens=min(self.max_tokens, room))
        return self._answer(said, ids, tokens, produced, generate_text)

    def _answer(
        self,
        said: list[dict[str, str]],
        ids: list[int],
        tokens: Iterator[int],
        produced: list[int],
        generate: Callable[..., Iterator[str]],
    ) -> Iterator[str]:
        pieces: list[str] = []

        def counted() -> Iterator[int]:
            for token in tokens:
                produced.append(token)
                yield token

        start = time.perf_counter()
        try:
            for piece in generate(self.model.tokenizer, ids, counted(), self.stop):
                pieces.append(piece)
                yield piece
        finally:
            self.last = len(ids), len(produced), time.perf_counter() - start
            if self.chat:
                self.messages = [*said, {"role": "assistant", "content": "".join(pieces)}]

    def stats(self) -> str:
        """A line on the last answer."""
        prompt, produced, seconds = self.last
        return f"{prompt} + {produced} tokens, {produced / max(seconds, 1e-9):.0f} tokens/s"

    def change(self, line: str) -> str:
        """Do what a line that starts with ``/`` says; what to show. Raises UserError for one that is none."""
        name, _, value = line[1:].strip().partition(" ")
        value = value.strip()
        if name == "help":
            return HELP
        if name == "reset":
            self.messages = []
            return "forgotten"
        if name == "system":
            self.system, self.messages = value or None, []
            return "told" if value else "told nothing"
        if name in ("chat", "continue"):
            if name == "chat":
                self.model.chat_prompt(
                    [{"role": "user", "content": "x"}]
                )  # refuses models without a template
            self.chat, self.messages = name == "chat", []
            return "answering messages" if self.chat else "continuing text"
        return self._set(name, value)

    def _set(self, name: str, value: str) -> str:
        try:
            if name == "max-tokens":
                count = int(value)
                if count < 1:
                    raise UserError(f"max-tokens {value}: must be at least 1")
                self.max_tokens = count
            elif name == "seed":
                self.sampling = replace(self.sampling, seed=int(value))
            elif name == "top-k":
                self.sampling = replace(self.sampling, top_k=int(value))
            elif name == "temperature":
                self.sampling = replace(self.sampling, temperature=float(value))
            elif name == "top-p":
                self.sampling = replace(self.sampling, top_p=float(value))
            else:
                raise UserError(f"no command /{name}; /help lists them")
        except ValueError as error:
            raise UserError(f"/{name} {value}: expected a number") from error
        return f"{name} {value}"


def converse(
    conversation: Conversation,
    read: Callable[[], str],
    write: Callable[[str], Any],
    note: Callable[[str], Any],
) -> None:
    """Read lines until the end of input or ``/quit``; Ctrl-C stops an answer, not the conversation."""
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            continue
        if line in ("/quit", "/exit"):
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                note(conversation.change(line))
                continue
            for piece in conversation.ask(line):
                write(piece)
            write("\n")
            note(conversation.stats())
        except UserError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            write("\n")
            note(f"stopped; {conversation.stats()}")


def prompt_session() -> PromptSession[str]:
    """A prompt with history, kept in moqc's cache folder, and the commands completed."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.output import create_output

    from moqc.calibrate.workspace import default_root

    words = sorted({word.rstrip(",") for word in HELP.split() if word.startswith("/")})
    root = default_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        history: FileHistory | InMemoryHistory = FileHistory(str(root / "history"))
    except OSError:
        history = InMemoryHistory()
    # Standard output is for answers alone.
    screen = create_output(stdout=sys.stderr)
    return PromptSession(history=history, completer=WordCompleter(words, sentence=True), output=screen)
