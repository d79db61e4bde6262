import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("setup", "threads"), [("", "None"), ("os.environ['TVM_NUM_THREADS'] = '1'", "1")], ids=["unset", "set"]
)
def test_threads_are_the_available_cores_unless_set(setup, threads):
    code = (
        f"import os\n{setup}\n"
        "from moqc.runtime.tvm_runtime import available_cores, import_runtime\n"
        "tvm = import_runtime()\n"
        f"assert os.environ['TVM_NUM_THREADS'] == str({threads} or available_cores())\n"
        "assert tvm is import_runtime()\n"
        "import torch\n"  # hidden only while TVM was imported
        "assert torch.ones(1).item() == 1\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
