"""GPUs that are programmed in OpenCL: phones, tablets and boards."""

from __future__ import annotations

from dataclasses import replace

from moqc.machines.target import Roofline, Target

_OPS_A_WEIGHT = 6
"""Instructions a weight takes, loads included (`schedules/portable/counts.json`)."""
_LAUNCHES = 30
"""Launches a decoder layer makes for one token."""
_LAUNCH_SECONDS = 1e-5
"""An assumption, no data sheet has it: what a queued launch costs a mobile driver."""

_MALI = Roofline(
    bandwidth=3.4e10,
    weight_rate=5.1e11 / _OPS_A_WEIGHT,
    layer_seconds=_LAUNCHES * _LAUNCH_SECONDS,
    source="Mali-G610 MP4 of an RK3588, data sheets: LPDDR4X-4224 on 64 bits is 34 GB/s; 4 cores of 128 "
    "float32 lanes at 1 GHz, 6 instructions a weight; 30 launches a layer at an assumed 10 us. Not measured",
)
_ADRENO = Roofline(
    bandwidth=6.7e10,
    weight_rate=1.7e12 / _OPS_A_WEIGHT,
    layer_seconds=_LAUNCHES * _LAUNCH_SECONDS,
    source="Adreno 740 of a Snapdragon 8 Gen 2, data sheets: LPDDR5X-4200 on 64 bits is 67 GB/s; 2560 "
    "float32 lanes at 0.68 GHz, 6 instructions a weight; 30 launches a layer at an assumed 10 us. Not "
    "measured",
)

_OPENCL = Target(
    "opencl",
    {"kind": "opencl", "max_num_threads": 256, "host": {"kind": "llvm"}},
    frozenset(),
    schedules="portable",
    activations=("float",),
    caches=("float32",),
    machine="any",
    library_bytes=(275_000, 690_000),
    largest_binding=1 << 30,
    doc="any OpenCL 1.2 device, with float16 products where it has cl_khr_fp16; run here through pyopencl",
    verified="logits on PoCL (float32) and Intel's CPU runtime (float16) against the CPU artifact",
)
OPENCL = (
    _OPENCL,
    replace(_OPENCL, name="opencl-mali", doc="ARM Mali GPUs (Valhall)", roofline=_MALI),
    replace(_OPENCL, name="opencl-adreno", doc="Qualcomm Adreno GPUs (6xx on)", roofline=_ADRENO),
)
