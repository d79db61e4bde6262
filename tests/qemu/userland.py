"""Make an aarch64 userland for the tests marked ``qemu``: Debian's Python, moqc's runtime wheels.

``python tests/qemu/userland.py [FOLDER]`` on Debian or Ubuntu; FOLDER is by default $MOQC_AARCH64, else
~/.cache/moqc-aarch64. Nothing is installed: packages are unpacked there. TVM's compiler is left out, so that
what runs is known to need its runtime only.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NEEDS = "qemu-user g++-aarch64-linux-gnu"
WHEELS = ("apache-tvm", "apache-tvm-ffi", "numpy", "pydantic", "tokenizers", "jinja2")
"""What `moqc.load` imports; tvm.rpc takes the next two."""
PACKAGES = ("python3", "libstdc++6", "libpcre2-dev")
"""Debian's; the last is what the C++ loader is built with."""
RPC = ("cloudpickle", "tornado")
PLATFORMS = ("manylinux_2_28", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


def default_folder() -> Path:
    """Where the tests look."""
    return Path(os.environ.get("MOQC_AARCH64", Path.home() / ".cache" / "moqc-aarch64"))


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder()
    if platform.system() != "Linux" or shutil.which("dpkg") is None:
        raise SystemExit("needs Debian or Ubuntu: apt-get and dpkg")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".moqc-aarch64-", dir=folder.parent) as name:
        unpack_python(Path(name))
        install_wheels(Path(name))
        shutil.rmtree(folder, ignore_errors=True)
        Path(name).rename(folder)
        Path(name).mkdir()  # for the context to remove
    print(f"{folder}: ready for `pytest -m qemu`; also needs `apt-get install {NEEDS}`")


def unpack_python(folder: Path) -> None:
    """Debian's python3 for arm64 with all it depends on, by an apt that knows nothing of this machine."""
    with tempfile.TemporaryDirectory() as name:
        state = Path(name)
        for part in ("lists/partial", "archives/partial"):
            (state / part).mkdir(parents=True)
        (state / "status").touch()
        settings = {
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "APT::Sandbox::User": "",
            "Dir::State::lists": state / "lists",
            "Dir::State::status": state / "status",
            "Dir::Cache": state,
            "Dir::Cache::archives": state / "archives",
        }
        apt = [
            "apt-get",
            "-q",
            *(part for key, value in settings.items() for part in ("-o", f"{key}={value}")),
        ]
        subprocess.run([*apt, "update"], check=True, stdout=subprocess.DEVNULL)
        install = ["install", "-y", "--download-only", "--no-install-recommends"]
        subprocess.run([*apt, *install, *PACKAGES], check=True, stdout=subprocess.DEVNULL)
        for package in sorted((state / "archives").glob("*.deb")):
            subprocess.run(["dpkg", "-x", package, folder], check=True)


def install_wheels(folder: Path) -> None:
    """The wheels, of the versions that are installed here, under ``site``."""
    python = next((folder / "usr" / "bin").glob("python3.*[0-9]")).name.removeprefix("python")
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS] + list(RPC)
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder / "site")]
    command += ["--python-version", python, "--only-binary=:all:"]
    command += [part for name in PLATFORMS for part in ("--platform", f"{name}_aarch64")]
    subprocess.run([*command, *wanted], check=True)
    (folder / "site" / "tvm" / "lib" / "libtvm_compiler.so").unlink()


if __name__ == "__main__":
    main()
