"""What a target is: one machine family that moqc compiles for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moqc.errors import TargetError
from moqc.quant.kv_cache import DTYPES


@dataclass(frozen=True, slots=True)
class Roofline:
    """What a machine sustains while one sequence is decoded; `moqc plan` predicts with it.

    `bandwidth`: bytes a second from memory. `weight_rate`: weights a second that are unpacked and multiplied,
    whatever their width. `layer_seconds`: time of a decoder layer that does not depend on its weights (norms,
    attention, router, launches). `source`: the machine and where the numbers are from.
    """

    bandwidth: float
    weight_rate: float
    layer_seconds: float
    source: str


LEAST_CHUNK, MOST_ROWS = 512, 1 << 15
"""Tokens of a row that every call has room for, and tokens of all rows for which larger chunks stop."""


@dataclass(frozen=True, slots=True)
class Target:
    """One machine family.

    `tvm` is the dict `tvm.target.Target` takes. `features` are the CPU flags (Linux names) the generated code
    uses; loading an artifact checks them. `schedules` names the folder under `schedules/`; `layout` the
    packed weight layout its kernels read (`moqc.quant.layouts`). `activations` are the modes its kernels
    have, the default first; `caches` are the dtypes its key-value caches can have, the default first
    (`moqc.quant.kv_cache`). `architectures` are those of the
    GPUs that the library has machine code for; empty for CPUs. `machine` is the host's CPU as
    `platform.machine` says, "any" where no code is made for it; `tools` are entries of
    `moqc.toolchains.TOOLS` beside its linker. `verified` says how its code was checked. `largest_binding` is
    the most bytes of a buffer that kernels read, None where there is no limit; `shard_bytes` those of a file
    of parameters, unless one tensor is larger. `roofline` is None where nothing is known. `records` is a file
    of plans (`moqc.schedules.plan_records`) that come before those that ship. `library_bytes` is the size of
    a library with one format of experts, and with several, as it was for tiny-moe: it depends on the
    kernels, some 0.1 MB for every set of formats that blocks have, hardly on the model. `chunk` is how many
    tokens of a prompt are run in one call where memory allows (`chunk_of`).
    """

    name: str
    tvm: dict[str, Any]
    features: frozenset[str]
    schedules: str = "cpu"
    layout: str = "interleaved16"
    activations: tuple[str, ...] = ("int8", "float")
    caches: tuple[str, ...] = DTYPES
    architectures: tuple[str, ...] = ()
    machine: str = "x86_64"
    tools: tuple[str, ...] = ()
    doc: str = ""
    verified: str = ""
    largest_binding: int | None = None
    shard_bytes: int = 2 << 30
    roofline: Roofline | None = None
    records: str | None = None
    library_bytes: tuple[int, int] = (760_000, 1_450_000)
    chunk: int = LEAST_CHUNK

    @property
    def device(self) -> str:
        """What runs the model: ``cpu``, or TVM's kind of GPU (``cuda``, ``opencl``, ``webgpu``)."""
        return "cpu" if self.tvm["kind"] == "llvm" else str(self.tvm["kind"])

    def mode(self, activations: str | None) -> str:
        """The mode of activations asked for, or the default. TargetError if there are no kernels for it."""
        if activations not in (None, *self.activations):
            modes = ", ".join(self.activations)
            raise TargetError(f"activations {activations!r}: the kernels of target {self.name} have {modes}")
        return activations or self.activations[0]

    def chunk_of(self, batch: int) -> int:
        """Tokens a row may have in one call of `batch` rows: memory is planned for all of them."""
        return max(min(self.chunk, MOST_ROWS // batch), LEAST_CHUNK)

    def kv_cache(self, dtype: str | None, activations: str) -> str:
        """The dtype of caches asked for, or the default: in float32 where activations are exact.

        TargetError if there are no kernels for it.
        """
        if dtype not in (None, *self.caches):
            known = ", ".join(self.caches)
            raise TargetError(f"kv-cache {dtype!r}: the kernels of target {self.name} have {known}")
        exact = activations == "float" and "float32" in self.caches
        return dtype or ("float32" if exact else self.caches[0])

    @property
    def rotates(self) -> bool:
        """Whether its kernels can rotate the inputs of down (`moqc.quant.hadamard`)."""
        return self.schedules in ("cpu", "portable")

    @property
    def launched(self) -> bool:
        """Whether it runs launches (`moqc.launches`), for want of TVM's virtual machine there."""
        return self.schedules == "portable"

    @property
    def warp_groups(self) -> bool:
        """Whether every GPU it is for has the warp groups and the early launches of NVIDIA's sm_90."""
        return self.architectures == ("sm_90",)

    @property
    def latent_attention(self) -> bool:
        """Whether its attention has kernels for keys that end in the values (`moqc.frontend.latents`)."""
        return self.schedules == "cpu"

    @property
    def vector_lanes(self) -> int:
        """float32 lanes of the widest vector register."""
        if self.machine == "aarch64":
            return 4
        return 16 if "avx512f" in self.features else 8

    @property
    def dot(self) -> str:
        """Instruction family for u8 x i8 dot products: a name of `moqc.schedules.cpu.families.FAMILIES`."""
        if self.machine == "aarch64":
            return "i8mm" if "i8mm" in self.features else "dotprod" if "asimddp" in self.features else "neon"
        if {"avx512_vnni", "avx512bw"} <= self.features:
            best = "vnni512-amx" if "amx_int8" in self.features else "vnni512-gfni"
            return best if "gfni" in self.features else "vnni512"
        return "bw512" if "avx512bw" in self.features else "avx2"
