"""`moqc doctor`: what is installed, what each target needs, and how to mend what is wrong."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Iterator

import typer

from moqc.commands.options import Json, print_json
from moqc.errors import TargetError
from moqc.targets import TARGETS, Target, find_target, missing_features
from moqc.toolchains import check_toolchain, linker


def command(as_json: Json = False) -> None:
    """Check the installation, this machine and the targets. Every problem comes with its fix."""
    found, problems = diagnose()
    targets = {name: target_state(target) for name, target in TARGETS.items()}
    if as_json:
        print_json({"found": found, "targets": targets, "problems": problems})
    else:
        for name, value in found.items():
            typer.echo(f"{name:16} {value}")
        for name, state in targets.items():
            typer.echo(f"{'target':16} {name}: {state}")
        for problem in problems:
            typer.echo(f"problem: {problem}")
        typer.echo("no problems" if not problems else f"{len(problems)} to mend")
    if problems:
        raise typer.Exit(1)


def diagnose() -> tuple[dict[str, str], list[str]]:
    """What is installed, and what is wrong with it."""
    from moqc.calibrate.workspace import default_root
    from moqc.runtime.tvm_runtime import available_cores

    found = {"python": sys.version.split()[0], "machine": platform.machine()}
    found["moqc"] = importlib.metadata.version("moqc")
    problems = []
    for name, version, problem in requirements():
        found[name] = version
        if problem is not None:
            problems.append(problem)
    try:
        found["native target"] = find_target("native").name
    except TargetError as error:
        problems.append(str(error))
    try:
        import moqc.codegen  # noqa: F401
    except (ImportError, OSError) as error:
        problems.append(f"the compiler does not load: {error}; `pip install --force-reinstall apache-tvm`")
    try:
        found["linker"] = str(linker(platform.machine()).require())
    except TargetError as error:
        problems.append(str(error))
    found["cores"] = str(available_cores())
    root = default_root()
    found["cache"] = str(root)
    if root.exists():
        free = shutil.disk_usage(root).free
        found["cache space"] = f"{free / 2**30:.1f} GiB free"
    return found, problems


def requirements() -> Iterator[tuple[str, str, str | None]]:
    """(package, version installed, problem or None) of everything moqc needs."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires("moqc") or ():
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        fix = f"`pip install '{needed.name}{needed.specifier}'`"
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            yield needed.name, "none", f"{needed.name} is not installed; {fix}"
            continue
        clash = not needed.specifier.contains(version, prereleases=True)
        problem = f"{needed.name} {version} is installed, moqc needs {needed.specifier}; {fix}"
        yield needed.name, version, problem if clash else None


def target_state(target: Target) -> str:
    """What compiling for `target` and running that here takes; one line."""
    try:
        check_toolchain(target)
    except TargetError as error:
        return f"not ready: {error}"
    if target.device != "cpu":
        return "compiles; runs where there is such a GPU"
    if missing := missing_features(target):
        return f"compiles; this machine cannot run it, it lacks {', '.join(missing)}"
    return "compiles and runs here"
