"""An OpenCL device for tests: any driver that is installed, or PoCL from pip (pocl-binary-distribution)."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from tempfile import mkdtemp

import pytest


def require_device() -> None:
    """Skip the test where there is no OpenCL device. To be called before anything imports pyopencl."""
    pytest.importorskip("pyopencl", reason="no pyopencl: `pip install 'moqc[edge]'`")
    if not any(Path("/etc/OpenCL/vendors").glob("*.icd")):
        _use_packaged_driver()
    from moqc.errors import TargetError
    from moqc.runtime.opencl import OpenCl

    try:
        OpenCl()
    except TargetError as error:
        pytest.skip(str(error))


def _use_packaged_driver() -> None:
    """PoCL's wheel names its library without a path, which the loader of pyopencl's does not find."""
    try:
        files = importlib.metadata.files("pocl-binary-distribution") or ()
    except importlib.metadata.PackageNotFoundError:
        return
    (library,) = (file for file in files if file.match("libpocl*.so"))
    folder = Path(mkdtemp(prefix="moqc-opencl-"))
    (folder / "pocl.icd").write_text(str(library.locate()))
    os.environ.setdefault("OCL_ICD_VENDORS", f"{folder}/")
