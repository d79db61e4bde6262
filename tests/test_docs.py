"""The documentation names what there is: annotations, passes, manifest keys, commands, options, files."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def commands():
    from moqc.cli import app

    return get_command(app).commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text):
        there = (page.parent / target) if target else page
        assert there.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor[1:] in slugs, f"{page.name} links to {target}{anchor}"


def test_passes_page_lists_annotations_and_passes():
    from moqc.ir.annotations import KEYS
    from moqc.passes.registry import BUILTIN

    text = (DOCS / "passes.md").read_text()
    rows = re.findall(r"^\| `(moqc\.\w+)` \| `(\w+)` \| ([\w-]+)", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(KEYS)
    listed = text.partition("## The passes there are")[2].partition("\n## ")[0]
    assert re.findall(r"^\| ([a-z-]+) \|", listed, re.MULTILINE)[1:] == list(BUILTIN)


def test_passes_page_has_the_default_pipeline():
    from moqc.pipelines import default_pipeline
    from moqc.recipe import Recipe

    text = (DOCS / "passes.md").read_text().partition("runs this (")[2].partition("\n    ")[2]
    said = text.partition("\n")[0]
    passes = default_pipeline(Recipe(bits=2.5), activations="int8", context=1024, kv_cache="float16")
    assert said == str(passes)


def test_artifact_page_lists_the_manifest():
    from moqc.manifest import Manifest

    table = (DOCS / "artifact.md").read_text().partition("## moqc.json")[2].partition("\n## ")[0]
    keys = {name.partition(".")[0] for name in re.findall(r"^\| `([\w.]+)`", table, re.MULTILINE)}
    assert keys == set(Manifest.model_fields)


def test_cli_page_lists_commands_and_options():
    text = (DOCS / "cli.md").read_text()
    sections = dict(re.findall(r"^## moqc ([\w-]+)[^\n]*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(commands())
    common = text.partition("\n## ")[0]
    for name, command in commands().items():
        for option in command.params:
            for spelling in option.opts:
                if spelling.startswith("--"):
                    assert f"`{spelling}" in sections[name] + common, f"moqc {name} {spelling}"


def test_readme_has_the_two_commands():
    """One command each, which `.ci/run` and a reader can paste."""
    text = (ROOT / "README.md").read_text()
    for title in ("Install and run the main job", "Run the tests"):
        section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        (block,) = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        assert len(block.splitlines()) == 1
        subprocess.run(["bash", "-n", "-c", block], check=True)
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for pin in config["project"]["dependencies"]:
        assert "==" not in pin or pin in text, f"README.md does not name the pin {pin}"
