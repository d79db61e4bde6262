"""The numerics certificate: every compiled packed kernel against the reference, when the model is compiled.

The library has a function for each packed kernel, made by legalize, that calls the code main calls. It is run
on random inputs with the real packed weights of one of its sites, and compared with `moqc.quant.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from numpy.typing import NDArray
from tvm import IRModule, relax

from moqc.errors import InternalError
from moqc.ir import ops
from moqc.ir.annotations import KERNELS
from moqc.ir.sites import weight_names
from moqc.log import track
from moqc.manifest import KernelNumerics
from moqc.quant import reference
from moqc.quant.formats import ROW_TILE, Format
from moqc.quant.layouts import find_layout
from moqc.quant.pack import Packed
from moqc.targets import Target, missing_features
from moqc.tensorfile import StoredTensor

TOLERANCES = {"float": 1e-4, "int8": 2e-3}
"""Largest relative error (Frobenius) allowed, by mode of activations. int8 is wider: an input that a float
rounding moves across the middle of two codes changes by a whole step."""

TOKENS = (1, 5)
"""Tokens of the shapes a kernel is run on: decode, and enough for the code that serves prefill."""

SLAB = 256
"""Tiles of rows whose weights are dequantized at once: an output projection's are gigabytes together."""

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class _Kernel:
    """An entry of KERNELS: a packed operator, how it is called and the weights it gets."""

    function: str
    operator: str
    attributes: dict[str, Any]
    arguments: dict[str, dict[str, Any]]
    """name -> shape (-1 where it is symbolic) and dtype."""
    parameters: dict[str, str]
    """operand -> parameter of main."""

    @property
    def activations(self) -> str:
        """What is done with the input; an embedding has none that could be rounded."""
        return str(self.attributes.get("activations", "float"))

    def __str__(self) -> str:
        attrs, first = self.attributes, next(iter(self.arguments.values()))["shape"]
        shape = "(" + ", ".join("n" if extent < 0 else str(extent) for extent in first) + ")"
        biases = [name for name in self.parameters if name.endswith("bias")]
        if self.operator == ops.EMBEDDING:
            parts = ["embedding", attrs["format"], f"{attrs['columns']} columns of {shape}"]
        elif self.operator == ops.LINEAR:
            parts = ["linear", attrs["format"], f"{attrs['rows']} rows of {shape}", *biases, self.activations]
        else:
            top = f"top-{self.arguments['ids']['shape'][1]}"
            size = f"{attrs['intermediate']} rows of {shape}"
            parts = ["experts", *attrs["classes"], top, size, attrs["activation"], *biases, self.activations]
        return " ".join(parts)

    def shape(self, argument: str, tokens: int) -> tuple[int, ...]:
        """The argument's shape for so many tokens: the last symbolic extent; others are 1."""
        extents = list(self.arguments[argument]["shape"])
        symbolic = [axis for axis, extent in enumerate(extents) if extent < 0]
        for axis in symbolic:
            extents[axis] = tokens if axis == symbolic[-1] else 1
        return tuple(extents)


def certify(
    library: Path, mod: IRModule, target: Target, load: Callable[[str], StoredTensor]
) -> dict[str, KernelNumerics]:
    """Measure every packed kernel of the compiled `library`, built from `mod`; description -> what was found.

    `load` gives the stored form of a parameter of main. Where this machine lacks a feature of `target`
    nothing is run, and the entries say so. Raises InternalError when an error is over its tolerance.
    """
    kernels = [_Kernel(**entry) for entry in KERNELS.get(mod) or []]
    missing = [*missing_features(target)]
    missing += [f"TVM's runtime for {target.device}"] if target.launched else []
    missing += [f"a GPU of {' or '.join(target.architectures)}"] if target.architectures else []
    if missing:
        reason = f"host lacks {', '.join(missing)}"
        return {
            str(kernel): KernelNumerics(site=kernel.attributes["site"], not_run=reason) for kernel in kernels
        }
    if not kernels:
        return {}
    types = {name: variable.ty for variable, name in weight_names(mod).items()}
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
    found = {}
    for kernel in track(kernels, "certifying kernels"):
        weights = {
            name: _array(types[parameter], load(parameter)) for name, parameter in kernel.parameters.items()
        }
        found[str(kernel)] = _measure(kernel, machine[kernel.function], weights)
    return found


def _array(ty: relax.TensorType, stored: StoredTensor) -> NDArray[Any]:
    array = np.empty([int(extent) for extent in ty.shape], str(ty.dtype))
    stored.copy_to(array)
    return array


def _measure(kernel: _Kernel, run: Callable[..., Any], weights: Arrays) -> KernelNumerics:
    """Run one kernel on all shapes. Raises InternalError when it is wrong."""
    generator, tolerance = np.random.default_rng(0), TOLERANCES[kernel.activations]
    site, worst, shapes = kernel.attributes["site"], 0.0, []
    for tokens in TOKENS:
        inputs = _inputs(kernel, weights, tokens, generator)
        arrays = [np.ascontiguousarray(array) for array in (*inputs.values(), *weights.values())]
        result = run(*(tvm.runtime.tensor(array) for array in arrays)).numpy()
        error = _relative_error(result, _expected(kernel, inputs, weights))
        shapes.append(kernel.shape(next(iter(kernel.arguments)), tokens))
        if not error <= tolerance:  # NaN too
            raise InternalError(
                f"{site}: the compiled kernel '{kernel}' has a relative error of {error:.1e} against the "
                f"reference for input {shapes[-1]}, more than {tolerance:g}; nothing was written"
            )
        worst = max(worst, error)
    return KernelNumerics(site=site, shapes=tuple(shapes), max_relative_error=worst)


def _inputs(
    kernel: _Kernel, weights: Arrays, tokens: int, generator: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """Normal activations; distinct experts a token, with weights that add up to 1; any row of a table."""
    shapes = {name: kernel.shape(name, tokens) for name in kernel.arguments}
    inputs: dict[str, NDArray[Any]] = {}
    if kernel.operator == ops.EMBEDDING:
        inputs["ids"] = generator.integers(0, weights["codes"].shape[0] * ROW_TILE, shapes["ids"])
    else:
        inputs["x"] = generator.standard_normal(shapes["x"])
    if kernel.operator == ops.MIXED_EXPERTS:
        experts = weights["table"].shape[1]
        chosen = generator.random((shapes["ids"][0], experts)).argsort(axis=1)
        inputs["ids"] = chosen[:, : shapes["ids"][1]]
        shares = generator.random(shapes["weights"]) + 0.1
        inputs["weights"] = shares / shares.sum(axis=1, keepdims=True)
    return {name: array.astype(kernel.arguments[name]["dtype"]) for name, array in inputs.items()}


def _relative_error(result: NDArray[Any], expected: NDArray[Any]) -> float:
    difference = np.linalg.norm(result.astype(np.float64) - expected.astype(np.float64))
    size = np.linalg.norm(expected.astype(np.float64))
    return float(difference / size) if size else float(difference)


def _expected(kernel: _Kernel, inputs: Arrays, weights: Arrays) -> NDArray[Any]:
    if kernel.operator == ops.EMBEDDING:
        return _expected_rows(kernel, inputs["ids"], weights)
    if kernel.operator == ops.LINEAR:
        return _expected_product(kernel, inputs["x"], weights)
    return _expected_experts(kernel, inputs, weights)


def _expected_rows(kernel: _Kernel, ids: NDArray[Any], weights: Arrays) -> NDArray[Any]:
    format, columns = Format.parse(kernel.attributes["format"]), kernel.attributes["columns"]
    tiles, position = np.unique(ids // ROW_TILE, return_inverse=True)
    matrix = _dense(kernel, weights, "", tiles, format, len(tiles) * ROW_TILE, columns)
    rows: NDArray[Any] = matrix.numpy()[position.reshape(ids.shape) * ROW_TILE + ids % ROW_TILE]
    return rows


def _expected_product(kernel: _Kernel, x: NDArray[Any], weights: Arrays) -> NDArray[Any]:
    format, rows = Format.parse(kernel.attributes["format"]), kernel.attributes["rows"]
    parts = []
    for start in range(0, rows, SLAB * ROW_TILE):
        count = min(SLAB * ROW_TILE, rows - start)
        tiles = slice(start // ROW_TILE, start // ROW_TILE + SLAB)
        matrix = _dense(kernel, weights, "", tiles, format, count, x.shape[-1])
        bias = torch.from_numpy(weights["bias"][start : start + count]) if "bias" in weights else None
        parts.append(reference.linear(torch.from_numpy(x), matrix, bias, kernel.attributes["activations"]))
    return torch.cat(parts, dim=-1).numpy()


def _expected_experts(kernel: _Kernel, inputs: Arrays, weights: Arrays) -> NDArray[Any]:
    """The block as the sum of its hit experts, one dequantized at a time."""
    x, ids, shares = (torch.from_numpy(inputs[name]) for name in ("x", "ids", "weights"))
    total = torch.zeros(len(x), kernel.attributes.get("hidden", x.shape[1]))
    for expert in np.unique(inputs["ids"]).tolist():
        mine = torch.where(ids == expert, 0, -1)  # pairs of other experts are dropped
        total += reference.experts(
            x,
            mine,
            shares,
            **{name: _expert(kernel, weights, name, expert, x.shape[1]) for name in ops.PROJECTIONS},
            activation=kernel.attributes["activation"],
            activations=kernel.attributes["activations"],
            **{
                name: torch.from_numpy(weights[name][expert : expert + 1])
                for name in weights
                if name.endswith("_bias")
            },
        )
    return total.numpy()


def _expert(kernel: _Kernel, weights: Arrays, projection: str, expert: int, inputs: int) -> Any:
    """One expert's matrix, float32 [1, N, K]; None for a gate there is not."""
    classes = [
        entry.partition(":")[2] for entry in kernel.attributes["classes"] if entry.startswith(projection)
    ]
    if not classes:
        return None
    number, index = weights["table"][ops.PROJECTIONS.index(projection), expert].tolist()
    intermediate = kernel.attributes["intermediate"]
    hidden = kernel.attributes.get("hidden", inputs)
    rows, columns = (hidden, intermediate) if projection == "down" else (intermediate, inputs)
    chosen = slice(index, index + 1)
    format = Format.parse(classes[number])
    return _dense(kernel, weights, f"{projection}.{number}.", chosen, format, rows, columns)


def _dense(
    kernel: _Kernel,
    weights: Arrays,
    prefix: str,
    part: slice | NDArray[Any],
    format: Format,
    rows: int,
    columns: int,
) -> torch.Tensor:
    """Dequantize part (along the first axis) of a packed matrix, or of a stack of them."""
    zeros = weights.get(f"{prefix}zeros")
    packed = Packed(
        codes=weights[f"{prefix}codes"][part],
        scales=weights[f"{prefix}scales"][part],
        zeros=None if zeros is None else zeros[part],
    )
    return find_layout(kernel.attributes["layout"]).unpack(packed, format, rows, columns).dequantize()
