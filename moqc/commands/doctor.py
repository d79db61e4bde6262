"""`moqc doctor`: check whether moqc can work here."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys

import typer

from moqc.commands.options import Json, print_json
from moqc.errors import TargetError

PACKAGES = (
    "moqc",
    "apache-tvm",
    "apache-tvm-ffi",
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "numpy",
    "scipy",
)


def command(as_json: Json = False) -> None:
    """Check the installation and this machine."""
    found, problems = diagnose()
    if as_json:
        print_json({"found": found, "problems": problems})
    else:
        for name, value in found.items():
            typer.echo(f"{name:16} {value}")
        for problem in problems:
            typer.echo(f"problem: {problem}")
    if problems:
        raise typer.Exit(1)


def diagnose() -> tuple[dict[str, str], list[str]]:
    """What is installed, and what is wrong with it."""
    from moqc.calibrate.workspace import default_root
    from moqc.runtime.tvm_runtime import available_cores
    from moqc.targets import find_target

    found = {"python": sys.version.split()[0], "machine": platform.machine()}
    problems = []
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{package} is not installed; pip install moqc")
    for pin in importlib.metadata.requires("moqc") or ():
        name, _, version = pin.partition("==")
        if version and ";" not in pin and found.get(name, version) != version:
            problems.append(f"{name} {found[name]} is installed, moqc needs exactly {version}")
    try:
        found["native target"] = find_target("native").name
    except TargetError as error:
        problems.append(str(error))
    try:
        from moqc.codegen import LINKERS
    except (ImportError, OSError) as error:
        problems.append(f"the compiler does not load: {error}")
    else:
        linker = next((path for name in LINKERS if (path := shutil.which(name))), None)
        if linker is None:
            problems.append(f"no C compiler to link libraries with; install one of {', '.join(LINKERS)}")
        else:
            found["linker"] = linker
        from moqc.schedules.cuda.toolchain import find_nvcc

        try:
            found["nvcc"] = str(find_nvcc())
        except TargetError as error:
            found["nvcc"] = f"none, so no target cuda: {error}"
    found["cores"] = str(available_cores())
    found["cache"] = str(default_root())
    return found, problems
