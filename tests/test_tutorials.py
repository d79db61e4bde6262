"""The tutorials do what they say: Python blocks run, commands have the options they are given."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.main import get_command

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/tutorial-*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_there_are_tutorials():
    assert len(PAGES) == 5
    index = (ROOT / "README.md").read_text()
    assert all(f"docs/{page.name}" in index for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run(page, toy, tmp_path, monkeypatch):
    """In one namespace, from a folder with the examples, and the toy artifact for what was compiled."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tiny").symlink_to(toy.folder)
    monkeypatch.chdir(tmp_path)
    # Dataclasses look their module up: the blocks are one of their own.
    module = type(sys)("tutorial")
    monkeypatch.setitem(sys.modules, "tutorial", module)
    found = blocks(page, "python")
    assert found
    for block in found:
        exec(compile(block, str(page), "exec"), module.__dict__)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda page: page.stem
)
def test_commands_parse(page):
    """Every `moqc` line of a shell block or an indented one: the command exists, and so do its options."""
    from moqc.cli import app

    commands = get_command(app).commands
    indented = re.findall(r"^    (moqc .*(?:(?<=\\)\n.*)*)$", page.read_text(), re.MULTILINE)
    for block in [*blocks(page, "sh"), *indented]:
        text = block.replace("\\\n", " ").replace("…", "x")
        for part in re.split(r"\n|;|&&|(?<!\{)\|(?!\|)", text):
            words = shlex.split(part.partition(">")[0], comments=True)
            if not words or os.path.basename(words[0]) != "moqc":
                continue
            assert words[1] in commands, part
            command = commands[words[1]]
            context = command.make_context(words[1], words[2:], resilient_parsing=False)
            assert context.params, part


def test_every_help_has_an_example_that_parses():
    from moqc.cli import COMMANDS, app

    commands = get_command(app).commands
    assert set(commands) == set(COMMANDS)
    for name, (_, example) in COMMANDS.items():
        words = shlex.split(example.partition(">")[0])
        assert words[:2] == ["moqc", name]
        commands[name].make_context(name, words[2:])
        assert commands[name].epilog == f"Example: {example}"
        assert commands[name].help, name
        # One line each in `moqc --help`, on a terminal of 80 columns.
        assert not commands[name].get_short_help_str(80 - 17).endswith("..."), name
