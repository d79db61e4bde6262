"""A board that is this machine with qemu: what runs there runs aarch64 code."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

CORES = {"aarch64-neon": "cortex-a72", "aarch64": "cortex-a76", "aarch64-i8mm": "max"}
"""Target -> the CPU qemu has: one that lacks the instructions of the next."""
SERVE = """
import sys, time
sys.modules["torch"] = None
from tvm.rpc.server import PopenRPCServerState
port = int(sys.argv[1])
print(PopenRPCServerState("127.0.0.1", port, port + 100, silent=True).port, flush=True)
while True:
    time.sleep(1)
"""


def userland() -> Path:
    """The aarch64 userland. Fails the test where it was not made."""
    folder = Path(os.environ.get("MOQC_AARCH64", Path.home() / ".cache" / "moqc-aarch64"))
    if not (folder / "site" / "tvm").is_dir() or shutil.which("qemu-aarch64") is None:
        pytest.fail(
            f"no qemu-aarch64, or no userland in {folder}: `apt-get install qemu-user g++-aarch64-linux-gnu` "
            "and `python tests/qemu/userland.py`"
        )
    return folder


def emulated(command: Sequence[str | Path], core: str) -> list[str]:
    """The command line that runs an aarch64 program with its libraries."""
    return ["qemu-aarch64", "-cpu", core, "-L", str(userland()), *map(str, command)]


def python(core: str) -> list[str]:
    """Python there."""
    return emulated([next((userland() / "usr" / "bin").glob("python3.*[0-9]"))], core)


def environment() -> dict[str, str]:
    """Variables for TVM's runtime and moqc there."""
    root = Path(__file__).parents[2]
    return {
        "PATH": "/usr/bin",
        "PYTHONPATH": f"{userland() / 'site'}:{root}",
        "TVM_USE_RUNTIME_LIB": "1",
        "TVM_NUM_THREADS": "2",
        "LD_LIBRARY_PATH": str(userland() / "usr" / "lib" / "aarch64-linux-gnu"),
    }


@contextmanager
def rpc_server(core: str) -> Iterator[int]:
    """The port of one of TVM's RPC servers there. No emulation where this machine is of that kind."""
    command = ["python3"] if platform.machine() == "aarch64" else python(core)
    with socket.socket() as free:  # servers that looked for a port in one range at one time took the same
        free.bind(("127.0.0.1", 0))
        command = [*command, "-c", SERVE, str(free.getsockname()[1])]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as server:
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline())
        finally:
            os.killpg(server.pid, 9)


def connect(port: int):  # type: ignore[no-untyped-def]
    """A session with a server."""
    from tvm import rpc

    for _ in range(100):
        try:
            return rpc.connect("127.0.0.1", port)
        except RuntimeError:
            time.sleep(0.1)
    return rpc.connect("127.0.0.1", port)
