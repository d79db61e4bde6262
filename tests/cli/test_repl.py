"""The conversation of `moqc run`: answers, commands, interruptions, a terminal's history."""

import os
import pty
import subprocess
import sys

import pytest

import moqc
from moqc.commands.repl import HELP, Conversation, converse
from moqc.errors import UserError
from moqc.runtime.sampling import Sampling

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


@pytest.fixture
def talk(toy):
    """The toy says its text from the prompt's length on."""
    return Conversation(moqc.load(toy.folder), False, Sampling(), max_tokens=5)


class Terminal:
    """Gives lines, keeps what is written and noted."""

    def __init__(self, *lines):
        self.lines, self.written, self.notes = list(lines), "", []

    def read(self):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, piece):
        self.written += piece

    def run(self, talk):
        converse(talk, self.read, self.write, self.notes.append)
        return self


def test_lines_are_continued(talk, toy):
    terminal = Terminal("", toy.text[:1], "/quit", "never read").run(talk)
    assert terminal.written.strip() != ""
    assert toy.text[1:].startswith(terminal.written.rstrip("\n")[:1])
    assert terminal.notes[0].startswith("1 + 5 tokens, ")
    assert terminal.lines == ["never read"]


def test_commands(talk):
    terminal = Terminal(
        "/help", "/temperature 0.5", "/top-p 0.9", "/top-k 40", "/seed 3", "/max-tokens 2", "/frobnicate",
        "/seed x", "/temperature -1", "/max-tokens 0", KeyboardInterrupt(),
    ).run(talk)  # fmt: skip
    assert talk.sampling == Sampling(0.5, 0.9, 3, 40)
    assert talk.max_tokens == 2
    assert terminal.notes[0] == HELP
    errors = [note for note in terminal.notes if note.startswith("error: ")]
    assert len(errors) == 4
    assert "/help lists them" in errors[0]


def test_conversation_goes_through_the_template(talk, toy, tmp_path, monkeypatch):
    import shutil

    folder = tmp_path / "chatty"
    shutil.copytree(toy.folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setattr(talk.model, "path", folder)
    seen = []
    chat_prompt = talk.model.chat_prompt
    monkeypatch.setattr(talk.model, "chat_prompt", lambda messages: seen.append(messages) or [1])
    talk.chat, talk.system = True, "be brief"
    Terminal("hello", "again", "/reset", "anew", "/system", "bare").run(talk)
    first, second, third, fourth = seen
    assert [message["role"] for message in first] == ["system", "user"]
    assert [message["role"] for message in second] == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in third] == ["be brief", "anew"]
    assert fourth == [{"role": "user", "content": "bare"}]
    assert chat_prompt(first) == talk.model.tokenizer.encode(
        "[system]be brief[user]hello[assistant]", special=False
    )


def test_stopping_an_answer_keeps_the_conversation(talk):
    terminal = Terminal("x", "/seed 1")
    pieces = []

    def write(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    converse(talk, terminal.read, write, terminal.notes.append)
    assert terminal.notes[0].startswith("stopped; ")
    assert terminal.notes[1] == "seed 1"


def test_a_long_prompt_is_an_error_not_the_end(talk):
    terminal = Terminal("x" * 200, "y").run(talk)
    assert terminal.notes[0].startswith("error: ")
    assert "/reset" in terminal.notes[0]
    assert " tokens/s" in terminal.notes[1]


def test_chat_needs_a_template(talk):
    with pytest.raises(UserError, match="no chat template"):
        talk.change("/chat")


def test_prompt_from_a_pipe(toy):
    command = [sys.executable, "-m", "moqc", "run", str(toy.folder), "-n", "4", "-q"]
    found = subprocess.run(command, input=toy.text[0].encode(), capture_output=True, check=True, timeout=120)
    assert found.stdout.decode().rstrip("\n") == toy.text[1:4]


def test_a_real_terminal(toy, tmp_path):
    """Under a pseudo-terminal: prompt, answer, history in the cache folder."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "moqc", "run", str(toy.folder), "-n", "4"]
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "TERM": "dumb"}
    process = subprocess.Popen(command, stdin=slave, stdout=subprocess.PIPE, stderr=slave, env=env)
    os.close(slave)
    os.write(master, f"{toy.text[0]}\r/quit\r".encode())
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert out.decode() == f"{toy.text[1:4]}\n"
    assert f"+{toy.text[0]}" in (tmp_path / "moqc" / "history").read_text()
    os.close(master)
