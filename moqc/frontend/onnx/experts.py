"""com.microsoft's MoE and QMoE nodes as moqc sees experts: canonical matrices, exact codes, a routing rule.

What the operators compute is in onnxruntime's ContribOperators.md, and was measured with its CPU kernels
where that page is silent (1.31): the k largest of ``router_probs`` choose; without ``router_weights`` an
expert's weight is its softmax among the chosen (MoE without ``normalize_routing_weights``: among all), with
them it is theirs. ``fc1`` rows of a fused SwiGLU alternate gate, up (``swiglu_fusion`` 1) or come one after
the other (2). "gelu" is its tanh approximation. Codes are unsigned, the first in the low bits; without zero
points the zero is ``2 ** (bits - 1)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper

from moqc.errors import ModelError
from moqc.frontend.onnx.reader import MICROSOFT, OnnxModel
from moqc.log import logger
from moqc.quant.formats import GROUPS, Format
from moqc.quant.tensor import Quantized

OPERATORS = ("MoE", "QMoE")
_BITS = (2, 4, 8)
# Where each matrix's codes (or values), scales, bias and zero points are among a node's inputs.
_QMOE = {"fc1": (2, 3, 4, 11), "fc2": (5, 6, 7, 12), "fc3": (8, 9, 10, 13)}
_MOE = {"fc1": (2, None, 3, None), "fc2": (4, None, 5, None), "fc3": (6, None, 7, None)}
_ROUTER_WEIGHTS = 14

Array = NDArray[Any]


@dataclass(frozen=True)
class Routing:
    """How ``router_probs`` become weights: `top_k` are chosen, shares are among these or among all."""

    top_k: int
    normalize: bool
    among_all: bool


@dataclass(frozen=True)
class OnnxExperts:
    """One block. `matrices` are canonical ([E, I, H], [E, I, H], [E, H, I]): floats, or exact codes.

    `inputs` are the names of x, router_probs and, where given, router_weights; without a `routing` rule those
    of x, expert ids and their weights.
    """

    site: str
    inputs: tuple[str, ...]
    activation: str
    routing: Routing | None
    matrices: dict[str, torch.Tensor | Quantized]
    biases: dict[str, torch.Tensor]

    @property
    def packed(self) -> bool:
        """Whether the matrices are quantized already."""
        return isinstance(self.matrices["down"], Quantized)


def is_experts_node(node: onnx.NodeProto) -> bool:
    """Whether `node` is an MoE or QMoE of com.microsoft."""
    return node.domain == MICROSOFT and node.op_type in OPERATORS


def read_experts(node: onnx.NodeProto, model: OnnxModel) -> OnnxExperts:
    """Read a node's weights and attributes. Raises ModelError for what moqc does not compute exactly."""
    return _Reader(node, model).read()


class _Reader:
    """Reads one node."""

    def __init__(self, node: onnx.NodeProto, model: OnnxModel) -> None:
        self._node, self._model = node, model
        self._attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        self._places = _QMOE if node.op_type == "QMoE" else _MOE
        self._site = node.name or node.output[0]

    def read(self) -> OnnxExperts:
        """The block."""
        self._check()
        gated, activation = self._activation()
        matrices: dict[str, Any] = {"down": self._matrix("fc2")}
        biases = {"down_bias": self._bias("fc2")}
        first, bias = self._matrix("fc1"), self._bias("fc1")
        if self._has("fc3"):
            matrices |= {"gate": first, "up": self._matrix("fc3")}
            biases |= {"gate_bias": bias, "up_bias": self._bias("fc3")}
        elif gated:
            rows = first.shape[1]
            for name, chosen in zip(("gate", "up"), self._halves(rows), strict=True):
                matrices[name] = _rows(first, chosen)
                biases[f"{name}_bias"] = None if bias is None else bias[:, chosen]
        else:
            matrices["up"], biases["up_bias"] = first, bias
        self._check_shapes(matrices)
        weights = self._input(_ROUTER_WEIGHTS) if self._node.op_type == "QMoE" else ""
        inputs = (self._node.input[0], self._node.input[1], *([weights] if weights else []))
        order = [name for name in ("gate", "up", "down") if name in matrices]
        return OnnxExperts(
            self._site,
            inputs,
            activation,
            self._routing(),
            {name: matrices[name] for name in order},
            self._complete(order, biases, matrices),
        )

    def _complete(
        self, order: Sequence[str], biases: dict[str, Any], matrices: dict[str, Any]
    ) -> dict[str, Any]:
        """All biases, zeros where only some are given; none where none is."""
        if all(bias is None for bias in biases.values()):
            return {}
        return {
            f"{name}_bias": torch.zeros(matrices[name].shape[:2])
            if biases[f"{name}_bias"] is None
            else biases[f"{name}_bias"].contiguous()
            for name in order
        }

    def _refuse(self, what: str) -> ModelError:
        return ModelError(f"{self._model.path}: {self._node.op_type} node {self._site}: {what}")

    def _input(self, index: int | None) -> str:
        inputs = self._node.input
        return inputs[index] if index is not None and index < len(inputs) else ""

    def _has(self, name: str) -> bool:
        return bool(self._input(self._places[name][0]))

    def _check(self) -> None:
        if self._attributes.get("use_sparse_mixer"):
            raise self._refuse("use_sparse_mixer, a routing that moqc does not have")
        kind = self._attributes.get("quant_type", b"int").decode()
        if kind != "int":
            raise self._refuse(f"quant_type {kind}; moqc reads integer codes only")
        if any(self._input(index) for index in range(_ROUTER_WEIGHTS + 1, len(self._node.input))):
            raise self._refuse("inputs of float8 and MXFP4 modes, which moqc does not read")

    def _routing(self) -> Routing:
        top_k, normalize = (
            int(self._attributes.get("k", 1)),
            bool(self._attributes.get("normalize_routing_weights", 0)),
        )
        return Routing(top_k, normalize, among_all=self._node.op_type == "MoE" and not normalize)

    def _activation(self) -> tuple[bool, str]:
        """Whether fc1 holds gate and up, and the canonical name."""
        kind = self._attributes.get("activation_type", b"relu").decode()
        alpha = round(float(self._attributes.get("activation_alpha", 1.0)), 6)
        beta = float(self._attributes.get("activation_beta", 0.0))
        limit = round(float(self._attributes.get("swiglu_limit", float("inf"))), 6)
        if self._has("fc3") and kind in ("silu", "gelu", "relu"):
            return True, {"silu": "silu_glu", "gelu": "gelu_tanh_glu", "relu": "relu_glu"}[kind]
        if kind == "silu":
            return False, "silu"
        if kind == "swiglu" and (alpha, beta) == (1.0, 0.0):
            return True, "silu_glu" if limit == float("inf") else f"silu_glu_clamp(limit={limit!r})"
        if kind == "swiglu" and beta == 1.0:
            return True, f"oai_swiglu(alpha={alpha!r},limit={limit!r})"
        gated = "gated" if self._has("fc3") or kind == "swiglu" else "plain"
        raise self._refuse(
            f"{gated} activation {kind} with alpha {alpha}, beta {beta}; moqc computes silu, gated silu, "
            "gelu and relu, and swiglu with beta 0 and alpha 1, or beta 1"
        )

    def _halves(self, rows: int) -> tuple[slice, slice]:
        """Rows of gate and of up in the fused matrix."""
        fusion = int(self._attributes.get("swiglu_fusion", 0))
        if fusion not in (1, 2) or rows % 2:
            raise self._refuse(f"swiglu_fusion {fusion} of {rows} rows without a third matrix")
        return (
            (slice(0, None, 2), slice(1, None, 2))
            if fusion == 1
            else (
                slice(0, rows // 2),
                slice(rows // 2, None),
            )
        )

    def _array(self, index: int | None) -> Array:
        return self._model.array(self._input(index))

    def _bias(self, name: str) -> torch.Tensor | None:
        index = self._places[name][2]
        return torch.from_numpy(self._array(index).astype(np.float32)) if self._input(index) else None

    def _matrix(self, name: str) -> torch.Tensor | Quantized:
        if not self._has(name):
            raise self._refuse(f"{name} has no weights")
        codes = self._array(self._places[name][0])
        if codes.ndim != 3:
            raise self._refuse(f"{name} has the shape {list(codes.shape)}, expected [experts, rows, columns]")
        if self._node.op_type == "MoE":
            return torch.from_numpy(codes.astype(np.float32))
        bits = int(self._attributes.get(f"{name}_expert_weight_bits", 0)) or int(
            self._attributes.get("expert_weight_bits", 4)
        )
        if bits not in _BITS or codes.dtype != np.uint8:
            raise self._refuse(f"{name} has {bits} bits in {codes.dtype}; moqc reads {_BITS} bits in uint8")
        return self._quantized(name, unpack_codes(codes, bits), bits)

    def _quantized(self, name: str, codes: Array, bits: int) -> Quantized:
        """Exact codes and zero points; scales become float16, with a note where that changes them."""
        columns, places = codes.shape[-1], self._places[name]
        block = int(self._attributes.get("block_size", 0)) or columns
        group = next((size for size in reversed(GROUPS) if block % size == 0 or block >= columns), None)
        if group is None:
            raise self._refuse(f"blocks of {block}; moqc's groups are {GROUPS}, and multiples of them")
        blocks = -(-columns // block)
        scales = self._array(places[1]).astype(np.float32).reshape(*codes.shape[:2], -1)
        if scales.shape[-1] != blocks:
            raise self._refuse(
                f"{name} has {scales.shape[-1]} scales a row, its blocks of {block} need {blocks}"
            )
        zeros = self._zeros(places[3], bits, codes.shape[1], blocks)
        which = np.arange(-(-columns // group)) * group // block
        halves = scales.astype(np.float16)
        change = float(np.abs(halves.astype(np.float32) - scales).max() / max(np.abs(scales).max(), 1e-30))
        if not np.isfinite(halves).all():
            raise self._refuse(f"{name} has scales beyond float16")
        if change:
            logger.warning("%s: %s: scales rounded to float16 (at most %.1e)", self._site, name, change)
        format = Format(bits, group, symmetric=zeros is None and bits != 2)
        if zeros is None and not format.symmetric:  # 2 bits: the zero is a code, moqc's symmetric one is not
            zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
        stored = (
            None if zeros is None else (zeros.astype(np.int64) * (255 // (format.levels - 1)))[..., which]
        )
        return Quantized(
            format,
            torch.from_numpy(codes),
            torch.from_numpy(np.ascontiguousarray(halves[..., which])),
            None if stored is None else torch.from_numpy(np.ascontiguousarray(stored.astype(np.uint8))),
        )

    def _zeros(self, index: int | None, bits: int, rows: int, blocks: int) -> Array | None:
        """Zero points as codes, [E, N, blocks]; packed along the blocks, or along rows where there is one."""
        if not self._input(index):
            return None
        stored = self._array(index)
        if stored.dtype != np.uint8:
            raise self._refuse(f"zero points of {stored.dtype}; moqc reads packed uint8")
        if stored.ndim == 2:
            return unpack_codes(stored, bits)[:, :rows, None]
        return unpack_codes(stored, bits)[..., :blocks]

    def _check_shapes(self, matrices: dict[str, Any]) -> None:
        experts, hidden, intermediate = matrices["down"].shape
        for name in ("gate", "up"):
            if name in matrices and tuple(matrices[name].shape) != (experts, intermediate, hidden):
                raise self._refuse(
                    f"{name} is {list(matrices[name].shape)}, down "
                    f"{[experts, hidden, intermediate]}: they do not fit"
                )
        if not 1 <= self._routing().top_k <= experts:
            raise self._refuse(f"takes {self._routing().top_k} of {experts} experts")


def unpack_codes(packed: Array, bits: int) -> Array:
    """Codes uint8 [..., K] of `packed` uint8 [..., K * bits / 8], the first in the low bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    fields = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.ascontiguousarray(fields.reshape(*packed.shape[:-1], -1))


def _rows(matrix: torch.Tensor | Quantized, chosen: slice) -> torch.Tensor | Quantized:
    if isinstance(matrix, torch.Tensor):
        return matrix[:, chosen].contiguous()
    zeros = None if matrix.zeros is None else matrix.zeros[:, chosen].contiguous()
    return Quantized(
        matrix.format, matrix.codes[:, chosen].contiguous(), matrix.scales[:, chosen].contiguous(), zeros
    )
