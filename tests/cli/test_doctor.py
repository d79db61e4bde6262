"""`moqc doctor`: every problem comes with the command that mends it."""

import dataclasses
import importlib.metadata

from moqc.commands import doctor
from moqc.targets import TARGETS


def test_clashes_and_what_is_missing(monkeypatch):
    needed = ["numpy>=99", "no-such-package>=1", "typer>=0.1", 'pytest>=999; extra == "test"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: needed)
    found = {name: problem for name, _, problem in doctor.requirements()}
    assert found["typer"] is None
    assert "pytest" not in found
    assert found["numpy"].endswith("moqc needs >=99; `pip install 'numpy>=99'`")
    assert found["no-such-package"] == (
        "no-such-package is not installed; `pip install 'no-such-package>=1'`"
    )


def test_a_problem_is_exit_code_1(moqc, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["no-such-package>=1"])
    code, out, _ = moqc("doctor")
    assert code == 1
    assert "problem: no-such-package is not installed" in out


def test_targets_say_what_this_machine_lacks():
    target = dataclasses.replace(TARGETS["x86-64-v3"], features=frozenset({"warp_drive"}))
    assert doctor.target_state(target) == "compiles; this machine cannot run it, it lacks warp_drive"
    native = dataclasses.replace(target, features=frozenset())
    assert doctor.target_state(native) == "compiles and runs here"


def test_completion_of_targets(moqc, monkeypatch):
    """What the shell's script asks for."""
    monkeypatch.setenv("_MOQC_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "moqc compile m --target x86-64-v4-")
    monkeypatch.setenv("COMP_CWORD", "4")
    _, out, _ = moqc()
    assert out.split() == ["x86-64-v4-vnni", "x86-64-v4-gfni", "x86-64-v4-amx"]
