"""GPUs behind a browser's WebGPU."""

from __future__ import annotations

from moqc.machines.target import Roofline, Target

BINDING_BYTES = 128 << 20
"""What every adapter can bind as one storage buffer (the specification's maxStorageBufferBindingSize)."""
SHARD_BYTES = 512 << 20
"""Parameter files are at most this long: browsers cache and fetch them one by one."""

WEBGPU = Target(
    "webgpu",
    {"kind": "webgpu", "max_num_threads": 256, "host": {"kind": "llvm"}},
    frozenset(),
    schedules="portable",
    activations=("float",),
    caches=("float32",),
    machine="any",
    library_bytes=(275_000, 690_000),
    largest_binding=BINDING_BYTES,
    shard_bytes=SHARD_BYTES,
    doc="browsers with WebGPU: a static folder with kernels in WGSL and a page",
    verified="text and logits in headless Chromium (float32) and Dawn (float16) against the CPU artifact",
    roofline=Roofline(
        bandwidth=1.0e11,
        weight_rate=3.6e12 / 2 / 6,
        layer_seconds=30 * 1e-5,
        source="Apple M2, data sheet: 100 GB/s, 3.6 TFLOPS of float32 (1.8e12 instructions a second), 6 a "
        "weight; 30 launches a layer at an assumed 10 us. Not measured",
    ),
)
