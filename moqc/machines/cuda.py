"""NVIDIA GPUs: any architectures with any host CPU; Jetson boards are such pairs."""

from __future__ import annotations

import re
from dataclasses import replace

from moqc.errors import TargetError
from moqc.machines.cpus import find_cpu
from moqc.machines.target import LEAST_CHUNK, Roofline, Target

_H200 = Roofline(
    bandwidth=3.7e12,
    weight_rate=1.0e13,
    layer_seconds=3.4e-5,
    source="NVIDIA H200, in docs/benchmarks-h200.md: experts of mixtral-8x7b at 1 token; a layer's time from "
    "whole models, 10 to 13 launches each",
)

CUDA_ARCHITECTURES = {"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227}
"""NVIDIA architectures that there are kernels for, and the KiB of shared memory a block may have there."""
CUDA_ARCHITECTURES |= {name.replace("sm", "compute"): CUDA_ARCHITECTURES[name] for name in ("sm_80", "sm_87")}
"""PTX for the oldest: the driver of any later GPU makes machine code of it when an artifact is loaded."""
SERVERS, SERVER_CHUNK = {"sm_80", "sm_90"}, 2048
"""GPUs with memory to spare: their experts' kernels are faster a token with longer chunks."""
CUDA_DEFAULT = "cuda:sm_90@x86-64-v3"
"""What ``cuda`` stands for."""


_FORM = re.compile(r"cuda(?::(?P<archs>[\w+]+))?(?:@(?P<host>[\w:-]+))?")


def find_cuda(name: str) -> Target:
    """The target of ``cuda[:ARCHITECTURE[+ARCHITECTURE...]][@HOST]``; the default has what is left out.

    Raises TargetError with what is known.
    """
    form, defaults = _FORM.fullmatch(name), _FORM.fullmatch(CUDA_DEFAULT)
    if form is None or defaults is None:
        raise TargetError(f"target {name!r}: expected for example {CUDA_DEFAULT} or cuda:sm_80+sm_90")
    architectures = tuple(sorted(set((form["archs"] or defaults["archs"]).split("+"))))
    for architecture in architectures:
        if architecture not in CUDA_ARCHITECTURES:
            known = ", ".join(CUDA_ARCHITECTURES)
            raise TargetError(f"target {name!r}: unknown architecture {architecture!r}: known are {known}")
    try:
        host = find_cpu(form["host"] or defaults["host"])
    except TargetError as error:
        raise TargetError(f"target {name!r}: {error}") from error
    shared = min(CUDA_ARCHITECTURES[architecture] for architecture in architectures) * 1024
    arch = architectures[0].replace("compute", "sm")
    tvm = {"kind": "cuda", "arch": arch, "max_threads_per_block": 1024, "host": host.tvm}
    return Target(
        f"cuda:{'+'.join(architectures)}@{host.name}",
        {**tvm, "max_shared_memory_per_block": shared},
        host.features,
        schedules="cuda",
        layout="mma16x256",
        activations=("float",),
        caches=("float16",),
        architectures=architectures,
        machine=host.machine,
        library_bytes=(1_250_000, 1_250_000),
        chunk=SERVER_CHUNK if set(architectures) <= SERVERS else LEAST_CHUNK,
        tools=("nvcc",),
        verified="run on an H200 (sm_90), against the reference",
        roofline=_H200 if architectures == ("sm_90",) else None,
        doc="NVIDIA GPUs; cuda:ARCHITECTURE+...@HOST chooses, by default " + CUDA_DEFAULT,
    )


CUDA = (
    replace(find_cuda("cuda"), name="cuda"),
    replace(
        find_cuda("cuda:sm_87@aarch64:cortex-a78ae"),
        name="jetson-orin",
        roofline=Roofline(
            bandwidth=2.048e11,
            weight_rate=8.0e11,
            layer_seconds=_H200.layer_seconds,
            source="Jetson AGX Orin 64GB: data sheet's LPDDR5 bandwidth; the H200's rate of weights scaled "
            "by multiprocessors and clock (16 x 1.3 GHz to 132 x 1.98 GHz), its time of a layer's launches: "
            "upper bounds of the speed, not measured",
        ),
        doc="NVIDIA Jetson Orin (AGX, NX, Nano) with JetPack 7",
        verified="logits of the same kernels as PTX on an H200, against the CPU artifact; not on a board",
    ),
)
