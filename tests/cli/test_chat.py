"""`moqc run --chat`."""

import json
import shutil


def test_run_chat(moqc, refused, toy, tmp_path):
    """The toy recites its text from where the prompt ends."""
    chatty = shutil.copytree(toy.folder, tmp_path / "chatty")
    (chatty / "chat_template.jinja").write_text("{{ messages | length }}{{ messages[-1].content }}<end>")
    assert moqc("run", chatty, "--chat", "-p", "x", "-q") == (0, toy.text[3:] + "\n", "")
    code, out, _ = moqc("run", chatty, "--chat", "--system", "s", "-p", "x", "--json")
    assert (code, json.loads(out)["prompt_tokens"]) == (0, 3)
    assert "no chat template" in refused("run", toy.folder, "--chat", "-p", "x")
    assert "--system has no meaning" in refused("run", chatty, "--system", "s", "-p", "x")
