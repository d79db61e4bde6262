"""TVM's tracker and a server over loopback, by the commands of docs/targets.md.

`pytest -m slow tests/test_rpc.py`.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import tvm
from tvm import rpc

from moqc.schedules.cpu.families import FAMILIES
from moqc.schedules.cpu.quantize_activations import activations_kernel
from moqc.targets import find_target
from moqc.toolchains import linker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # sockets TVM leaves open
]
COLUMNS = 96
SECONDS = 300
LOOPBACK = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


@contextmanager
def started(module: str, port: int, *options: str):
    """One of TVM's programs, which takes the first free port of a range."""
    place = ["--host", LOOPBACK, "--port", str(port), "--port-end", str(port + 1)]
    command = [sys.executable, "-m", f"tvm.exec.{module}", *place, *options]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, start_new_session=True, **quiet) as process:
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(port: int) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with socket.socket() as client:
            if client.connect_ex((LOOPBACK, port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"nothing listens on port {port}")


def test_a_kernel_is_sent_run_and_timed(tmp_path):
    target, library, tracker = find_target("native"), tmp_path / "gather.so", free_port()
    kernel = activations_kernel(FAMILIES[target.dot], COLUMNS, mode="float", top_k=2)
    module = tvm.IRModule({"gather": kernel.with_attr("global_symbol", "gather")})
    tvm.compile(module, tvm.target.Target(target.tvm)).export_library(
        str(library), cc=str(linker(target.machine).require())
    )
    x = np.random.default_rng(0).standard_normal((3, COLUMNS), np.float32)
    order = np.array([5, 0, 1, 2, 4, 3], np.int32)
    board = ("--tracker", f"{LOOPBACK}:{tracker}", "--key", "board")
    with started("rpc_tracker", tracker), started("rpc_server", free_port(), *board):
        wait_for(tracker)
        remote = rpc.connect_tracker(LOOPBACK, tracker).request("board")  # waits for the server
        remote.upload(str(library))
        gather, device = remote.load_module("gather.so"), remote.cpu()
        inputs = [tvm.runtime.tensor(array, device) for array in (x, order)]
        output = tvm.runtime.tensor(np.zeros((6, COLUMNS), np.float32), device)
        gather["gather"](*inputs, output)
        np.testing.assert_array_equal(output.numpy(), x[order // 2])
        assert gather.time_evaluator("gather", device, number=10)(*inputs, output).mean > 0
