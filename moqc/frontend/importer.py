"""TVM's torch importer, with moqc's operators and the fixes that mixture-of-experts models need.

Every fix is for something seen on a real architecture: results in a wrong dtype, reshapes that the importer
cannot tell to be identities, symbolic minimum and maximum, complex rotary embeddings, and parameters that
have no data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import tvm
import tvm_ffi
from torch._subclasses.fake_tensor import FakeTensor
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from moqc.frontend.complex_numbers import Complex, complex_converters
from moqc.frontend.slices import slice_converters
from moqc.ir import ops

Node = torch.fx.Node


class Importer(ExportedProgramImporter):  # type: ignore[misc]  # tvm ships no types
    """Translate an exported, hooked model to a Relax function.

    `symbols` names the symbolic sizes (torch's ``s44`` -> ``batch``).
    """

    def __init__(self, symbols: dict[str, str]) -> None:
        """Make an importer for one program."""
        self._symbols = symbols
        super().__init__()

    def create_convert_map(self) -> dict[str, Callable[[Node], Any]]:
        """TVM's converters, overridden by moqc's."""
        base = super().create_convert_map()
        complex_ = complex_converters(self, base)
        return {
            **base,
            **self._moqc_converters(),
            **complex_,
            **slice_converters(self, base | complex_),
        }

    def _process_derived_symbol(self, symbol: Any, known: Any) -> tuple[str, Any]:
        """Name of a symbolic size, in moqc's words."""
        name, derived = super()._process_derived_symbol(symbol, known)
        return self._symbols.get(name, name), derived

    @staticmethod
    def _convert_pytorch_tensor_to_tvm(tensor_value: torch.Tensor) -> tvm.runtime.Tensor:
        """A tensor's data; a fake tensor has none, and what stands for it is thrown away with `params`."""
        if isinstance(tensor_value, FakeTensor):
            return tvm.runtime.empty((1,), "float32")
        return ExportedProgramImporter._convert_pytorch_tensor_to_tvm(tensor_value)

    def emit(self, expr: relax.Expr) -> relax.Var:
        """Bind `expr` to a new variable."""
        return self.block_builder.emit(expr)

    def _moqc_converters(self) -> dict[str, Callable[[Node], Any]]:
        ignored = dict.fromkeys(
            # Checks without a result. What the scalar ones assert has been examined before the import
            # (`moqc.frontend.hf.check_assertions`); sym_not only feeds them.
            (
                "_assert_scalar.default",
                "_assert_tensor_metadata.default",
                "sym_constrain_range_for_size.default",
                "sym_not",
            ),
            lambda _node: None,
        )
        return {
            **ignored,
            "experts.default": self._experts,
            "attention.default": self._attention,
            "recurrent.default": self._recurrent,
            "causal_conv.default": self._causal_conv,
            "positions.default": self._positions,
            "embedding.default": self._embedding_rows,
            **dict.fromkeys(("view.default", "reshape.default", "_unsafe_view.default"), self._view),
            **dict.fromkeys(("mm.default", "bmm.default", "matmul.default"), self._product),
            "addmm.default": self._add_product,
            "linear.default": self._linear_product,
            "topk.default": self._top,
            "layer_norm.default": self._layer_norm,
            "amax.default": self._largest,
            **dict.fromkeys(("to.device", "to.dtype", "to.dtype_layout", "type_as.default"), self._cast),
            "empty.memory_format": self._filled(0, 0, None),
            "zeros.default": self._filled(0, 0, None),
            "ones.default": self._filled(0, 1, None),
            "full.default": self._filled(0, None, 1),
            "new_empty.default": self._filled(1, 0, None),
            "new_zeros.default": self._filled(1, 0, None),
            "new_ones.default": self._filled(1, 1, None),
            "new_full.default": self._filled(1, None, 2),
            "sym_min": self._fold(min, tvm.tirx.min),
            "sym_max": self._fold(max, tvm.tirx.max),
        }

    def _experts(self, node: Node) -> relax.Var:
        x, ids, weights, *tensors, site, activation = self._all_arguments(node)
        given = dict(zip(ops.EXPERT_OPERANDS, tensors, strict=True))
        present = [name for name, tensor in given.items() if tensor is not None]
        call = ops.experts(
            x, ids, weights, *(given[n] for n in present), site=site, activation=activation, operands=present
        )
        return self.emit(call)

    def _attention(self, node: Node) -> relax.Var:
        q, k, v, sinks, site, scale, window, chunk, most, softcap, causal, latent = self._all_arguments(node)
        operands = [] if sinks is None else ["sinks"]
        call = ops.attention(
            q,
            k,
            v,
            self._positions(node),
            *([] if sinks is None else [sinks]),
            site=site,
            scale=repr(scale),
            window=window,
            chunk=chunk,
            most=most,
            latent=int(latent),
            softcap=repr(softcap),
            causal=int(causal),
            operands=operands,
        )
        return self.emit(call)

    def _recurrent(self, node: Node) -> relax.Var:
        q, k, v, decay, beta, rate, site = self._all_arguments(node)
        given = {name: value for name, value in (("beta", beta), ("rate", rate)) if value is not None}
        positions = self._positions(node)
        call = ops.recurrent(q, k, v, decay, positions, *given.values(), site=site, operands=list(given))
        return self.emit(call)

    def _causal_conv(self, node: Node) -> relax.Var:
        x, weight, bias, site = self._all_arguments(node)
        further = [] if bias is None else [bias]
        names = ["bias"] if further else []
        call = ops.causal_conv(x, weight, self._positions(node), *further, site=site, operands=names)
        return self.emit(call)

    def _positions(self, node: Node) -> relax.Var:
        """The input called positions: the torch operator has no such argument, the Relax one needs it."""
        for placeholder in node.graph.find_nodes(op="placeholder"):
            if placeholder.name == "positions":
                return self.env[placeholder]
        raise LookupError("the exported program has no input called positions")

    def _all_arguments(self, node: Node) -> list[Any]:
        """Arguments of a custom operator in its order, defaults filled in."""
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        given = list(node.args) + [node.kwargs[entry.name] for entry in schema[len(node.args) :]]
        return [self._retrieve_args(argument) for argument in given]

    def given(self, node: Node, *defaults: Any) -> list[Any]:
        """The node's positional arguments, completed with the defaults of the last ones."""
        given = list(self._retrieve_args(node.args))
        known = len(node.target._schema.arguments) - len(defaults)  # type: ignore[union-attr]
        return given + list(defaults)[len(given) - known :]

    def _embedding_rows(self, node: Node) -> relax.Var:
        """``W[ids]`` as one take; TVM's flattens the ids first."""
        return self.emit(relax.op.take(self.env[node.args[0]], self.env[node.args[1]], axis=0))

    def _view(self, node: Node) -> relax.Var:
        x, dims = self.env[node.args[0]], self._retrieve_args(node.args[1])
        if isinstance(x, Complex):
            return x.map(lambda half: self._reshape_to(half, dims))
        return self._reshape_to(x, dims)

    def _reshape_to(self, x: relax.Expr, dims: Any) -> relax.Var:
        if x.ty.shape is not None and _same_shape(list(x.ty.shape.values), list(dims)):
            return x
        return self._emit_torch_reshape(x, dims)

    def _product(self, node: Node) -> relax.Var:
        left, right = (self.env[argument] for argument in node.args[:2])
        return self.emit(relax.op.matmul(left, right, out_dtype=dtype_of(node)))

    def _add_product(self, node: Node) -> relax.Var:
        if node.kwargs:
            raise NotImplementedError("addmm with alpha or beta")
        bias, left, right = (self.env[argument] for argument in node.args[:3])
        return self.emit(
            relax.op.add(self.emit(relax.op.matmul(left, right, out_dtype=dtype_of(node))), bias)
        )

    def _linear_product(self, node: Node) -> relax.Var:
        x, weight, *rest = (self._retrieve_args(argument) for argument in node.args)
        transposed = self.emit(relax.op.permute_dims(weight))
        product = self.emit(relax.op.matmul(x, transposed, out_dtype=dtype_of(node)))
        return product if not rest or rest[0] is None else self.emit(relax.op.add(product, rest[0]))

    def _layer_norm(self, node: Node) -> relax.Var:
        """Layer norm; TVM's converter wants a weight and a bias."""
        x, shape, weight, bias, epsilon, _ = self.given(node, None, None, 1e-5, True)
        dtype = dtype_of(node)
        gamma = relax.const(np.ones(shape, dtype)) if weight is None else weight
        beta = relax.const(np.zeros(shape, dtype)) if bias is None else bias
        axes = list(range(-len(shape), 0))
        return self.emit(relax.op.nn.layer_norm(x, gamma, beta, axes=axes, epsilon=epsilon))

    def _top(self, node: Node) -> relax.Var:
        """topk; an unsorted one may come sorted."""
        x, k, axis, largest, _ = self.given(node, -1, True, True)
        call = relax.op.topk(x, k=k, axis=axis, largest=largest, ret_type="both", dtype="int64")
        return self.emit(call)

    def _largest(self, node: Node) -> relax.Var:
        x, axes, keep = self.given(node, None, False)
        return self.emit(relax.op.max(x, axis=axes or None, keepdims=bool(keep)))

    def _cast(self, node: Node) -> relax.Var:
        x, dtype = self.env[node.args[0]], dtype_of(node)
        return x if str(x.ty.dtype) == dtype else self.emit(relax.op.astype(x, dtype))

    def _filled(self, shape_at: int, value: int | None, value_at: int | None) -> Callable[[Node], relax.Var]:
        """Converter of a creation operator: its dtype is that of the traced result, not torch's default."""

        def convert(node: Node) -> relax.Var:
            fill = node.args[value_at] if value_at is not None else value
            shape, dtype = self._retrieve_args(node.args[shape_at]), dtype_of(node)
            return self.emit(relax.op.full(relax.ShapeExpr(list(shape)), relax.const(fill, dtype), dtype))

        return convert

    def _fold(self, known: Callable[..., Any], symbolic: Callable[..., Any]) -> Callable[[Node], Any]:
        """Converter of a function of two sizes, either of which may be symbolic."""

        def convert(node: Node) -> Any:
            first, second = self._retrieve_args(node.args)
            both = isinstance(first, int) and isinstance(second, int)
            return known(first, second) if both else symbolic(first, second)

        return convert


def dtype_of(node: Node) -> str:
    """Dtype of the traced result, as TVM writes it."""
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _same_shape(have: list[Any], want: list[Any]) -> bool:
    """Whether two shapes of integers and TIR expressions are structurally equal."""
    return len(have) == len(want) and all(map(_same_size, have, want))


def _same_size(have: Any, want: Any) -> bool:
    first, second = (int(size) if isinstance(size, tvm.tirx.IntImm) else size for size in (have, want))
    if isinstance(first, int) or isinstance(second, int):
        return isinstance(first, int) and isinstance(second, int) and first == second
    return bool(tvm_ffi.structural_equal(first, second))
