"""Bytes of an artifact before it is made: its files, the memory to run it, and what one token reads.

The sizes follow the rules of the passes: every expert projection in a format (`Format.stored_bits`), the
other matrices as `quantize-linears` would leave them, all else in the checkpoint's dtype on disk and float32
in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moqc.errors import ModelError
from moqc.frontend.experts import ExpertLayout
from moqc.frontend.trace import MatrixUse, Outline
from moqc.passes.allocation_problem import TABLE_BITS
from moqc.quant.formats import ROW_TILE, Format

STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FLOAT_BYTES = 4
"""In memory, of a weight that is not quantized and of an activation."""
UNIT_BYTES = {"uniform": 21, "mixed": 115}
"""For each expert projection: its format in the manifest, what was measured of it in ``analysis.json``."""
TENSOR_BYTES = 290
"""Of manifest and safetensors header for a stored tensor."""
TENSORS = {"uniform": 3, "mixed": 8}
"""Stored tensors of a projection of an experts block: codes, scales and zeros of each bit class."""
OTHER_BYTES = 10_000
"""The rest of the manifest, and the model card."""
RUNTIME_BYTES = 92 << 20
"""Python, numpy, the tokenizer and TVM's runtime library before a model is loaded; measured."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How a model would be stored.

    `expert_bits` are file bits per expert weight, tables and all; `uniform` tells that one format serves all
    experts; `linears` is the format of the other matrices, None to leave them as they are; `library_bytes`
    is the size of the compiled library (`Target.library_bytes`).
    """

    expert_bits: float
    uniform: bool
    linears: Format | None
    library_bytes: int = 0

    @property
    def kind(self) -> str:
        """The key of the tables above."""
        return "uniform" if self.uniform else "mixed"


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a stored model takes, in bytes.

    `file_bytes` is the whole artifact but for its tokenizer; `weight_bytes` the weights in memory.
    `token_bytes` are read to decode one token with an empty cache, `token_weights` (a number) are decoded and
    multiplied, `token_expert_bytes` and `token_expert_weights` of them those of the routed experts;
    `kv_bytes_per_token` is what the cache of one sequence grows by.
    """

    parameter_bytes: int
    file_bytes: int
    weight_bytes: int
    token_bytes: int
    token_weights: int
    token_expert_bytes: int
    token_expert_weights: int
    kv_bytes_per_token: int


def projections(layout: ExpertLayout) -> Iterator[tuple[int, int]]:
    """(rows, columns) of each projection of one expert."""
    for projection in layout.projections:
        _, rows, columns = layout.shape(projection)
        yield rows, columns


def expert_weights(model: Outline, *, active: bool = False) -> int:
    """Weights of the routed experts without biases, of all or of those that one token takes."""
    return sum(
        (use.top_k if active else use.layout.experts) * rows * columns
        for use in model.experts
        for rows, columns in projections(use.layout)
    )


def uniform_bits(model: Outline, format: Format) -> float:
    """File bits per expert weight when every expert has `format`, tables included."""
    bits = sum(
        use.layout.experts
        * (TABLE_BITS + sum(format.stored_bits(rows, columns) for rows, columns in projections(use.layout)))
        for use in model.experts
    )
    return bits / expert_weights(model)


def footprint(model: Outline, storage: Storage, cache: str = "float32") -> Footprint:
    """The bytes of `model` stored as `storage` says, with caches of dtype `cache`.

    Raises ModelError for a dtype moqc does not store.
    """
    if model.dtype not in STORED_BYTES:
        raise ModelError(f"{model.model_type}: weights of dtype {model.dtype}; moqc reads float types only")
    stored = STORED_BYTES[model.dtype]
    experts = round(expert_weights(model) * storage.expert_bits / 8)
    active_weights = expert_weights(model, active=True)
    active = round(active_weights * storage.expert_bits / 8)
    disk, memory = experts + stored * model.other_weights, experts + FLOAT_BYTES * model.other_weights
    read, multiplied = active + FLOAT_BYTES * model.other_weights, active_weights
    for matrix in model.matrices:
        packed = _packed_bytes(matrix, storage.linears)
        weights = matrix.rows * matrix.columns
        disk += stored * weights if packed is None else packed
        held = FLOAT_BYTES * weights if packed is None else packed
        memory += held
        read += held if matrix.linear else held // matrix.rows
        multiplied += weights if matrix.linear else 0
    return Footprint(
        parameter_bytes=disk,
        file_bytes=disk + _overhead_bytes(model, storage),
        weight_bytes=memory,
        token_bytes=read,
        token_weights=multiplied,
        token_expert_bytes=active,
        token_expert_weights=active_weights,
        kv_bytes_per_token=sum(use.cache_bytes(cache) for use in model.attention),
    )


def _packed_bytes(matrix: MatrixUse, format: Format | None) -> int | None:
    """Bytes of a quantized matrix, None for one that `quantize-linears` leaves alone."""
    if format is None or matrix.router or matrix.rows < ROW_TILE:
        return None
    return format.stored_bits(matrix.rows, matrix.columns) // 8


def _overhead_bytes(model: Outline, storage: Storage) -> int:
    """Library, manifest and headers."""
    units = sum(use.layout.experts * len(use.layout.projections) for use in model.experts)
    blocks = sum(len(use.layout.projections) for use in model.experts)
    tensors = TENSORS[storage.kind] * blocks + 3 * len(model.matrices)
    return storage.library_bytes + OTHER_BYTES + UNIT_BYTES[storage.kind] * units + TENSOR_BYTES * tensors


def work_bytes(model: Outline, rows: int) -> int:
    """Memory of a call on `rows` tokens in all: logits and hidden states, fitted to measurements."""
    widest = max(use.top_k * use.layout.intermediate for use in model.experts)
    return FLOAT_BYTES * rows * (model.vocabulary + 8 * model.hidden + 2 * widest)
