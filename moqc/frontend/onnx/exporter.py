"""From a hooked transformers model to an ONNX graph without weights, through torch's own exporter.

Attention is spelled out in onnx's operators, token i at index i; experts blocks are left as placeholders
``ai.moqc::Experts``, for whoever has their weights to replace.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import onnx
import onnx_ir
import torch
import transformers
from onnxscript import opset20, values
from torch._subclasses.fake_tensor import FakeTensor

from moqc.errors import ModelError
from moqc.frontend.hf import export
from moqc.frontend.onnx.operator import register
from moqc.frontend.onnx.reader import MOQC
from moqc.frontend.skeleton import first_line

OPSET = 20
INPUTS = ("input_ids", "positions")
OUTPUT = "logits"
_PREFIX = "model."  # of the module that is exported
_MAX_TOKENS = 512
op: Any = opset20  # its types know values, not the symbols that torch gives


def export_graph(model: transformers.PreTrainedModel) -> onnx.ModelProto:
    """The model as (input_ids, positions) int64 [batch, seq] -> logits float32 [batch, seq, vocabulary].

    Weights are undefined names, those of the transformers model; what it computes in its constructor is
    stored. Raises ModelError for operators that torch cannot express in ONNX.
    """
    kind = model.config.model_type
    program = export(model, max_chunk=_MAX_TOKENS)
    table = translations() | {torch.ops.moqc.experts.default: _placeholder}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations of torch against itself
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table=table,
                optimize=False,
            )
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(f"{kind}: torch cannot express it in ONNX: {first_line(error)}") from error
    if made is None:
        raise ModelError(f"{kind}: torch made no ONNX graph of it")
    return _without_weights(made.model)


def _without_weights(model: Any) -> onnx.ModelProto:
    """The model's proto with weights by their own names, named inputs and output, and no traces of us."""
    graph = model.graph
    for name in list(graph.initializers):
        if isinstance(getattr(graph.initializers[name].const_value, "raw", None), FakeTensor):
            graph.initializers.pop(name).name = name.removeprefix(_PREFIX)
    for value, name in zip(graph.inputs, INPUTS, strict=True):
        value.name = name
        value.shape = onnx_ir.Shape(["batch", "seq"])
    (output,) = graph.outputs
    output.name, output.shape = OUTPUT, onnx_ir.Shape(["batch", "seq", output.shape[2]])
    proto: onnx.ModelProto = onnx_ir.serde.serialize_model(model)
    for node in proto.graph.node:
        del node.metadata_props[:]  # paths and stack traces
    del proto.graph.value_info[:]
    del proto.graph.metadata_props[:]
    return proto


def translations() -> dict[Any, Any]:
    """For torch.onnx.export's `custom_translation_table`: a model changed by `moqc.frontend.hooks.hook`.

    Experts become nodes of moqc's operator with their weights, which `moqc compile` reads; attention is
    spelled out.
    """
    register()
    return {torch.ops.moqc.experts.default: _experts, torch.ops.moqc.attention.default: _attention}


def _experts(*inputs: Any) -> Any:
    *tensors, site, activation = inputs
    return values.Opset(MOQC, 1).Experts(*tensors, site=site, activation=activation)


def _placeholder(x: Any, ids: Any, weights: Any, *operands: Any, **_more: Any) -> Any:
    site, activation = operands[-2:]
    return values.Opset(MOQC, 1).Experts(x, ids, weights, site=site, activation=activation, k=ids.shape[1])


def _ints(*numbers: int) -> Any:
    return op.Constant(value_ints=list(numbers))


def _attention(
    q: Any,
    k: Any,
    v: Any,
    sinks: Any = None,
    site: str = "",
    scale: float = 1.0,
    window: int = 0,
    chunk: int = 0,
    most: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
    latent: bool = False,
) -> Any:
    """``moqc::attention`` (see `moqc.frontend.hooks`) with groups of heads as an axis of their own."""
    if most:
        raise ModelError(f"{site}: attention that selects {most} tokens has no form in ONNX")
    heads, shared, width = q.shape[1], k.shape[1], v.shape[3]
    k = op.Concat(k, v, axis=-1) if latent else k
    grouped = op.Reshape(q, _ints(0, shared, heads // shared, -1, q.shape[3]))
    turned = op.Unsqueeze(op.Transpose(k, perm=[0, 1, 3, 2]), _ints(2))
    scores = op.Mul(op.MatMul(grouped, turned), op.Constant(value_float=scale))
    if softcap:
        cap = op.Constant(value_float=softcap)
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    if causal or window or chunk:
        scores = op.Where(_allowed(q, window, chunk, causal), scores, op.Constant(value_float=float("-inf")))
    if sinks is not None:
        column = op.Reshape(sinks, _ints(1, shared, heads // shared, 1, 1))
        first = op.Slice(scores, _ints(0), _ints(1), _ints(4))
        zeros = op.Where(
            op.IsInf(first), op.Constant(value_float=0.0), op.Mul(first, op.Constant(value_float=0.0))
        )
        scores = op.Concat(scores, op.Add(zeros, column), axis=-1)
    shares = op.Softmax(scores, axis=-1)
    if sinks is not None:
        shares = op.Slice(shares, _ints(0), _ints(-1), _ints(4))
    mixed = op.MatMul(shares, op.Unsqueeze(v, _ints(2)))
    return op.Transpose(op.Reshape(mixed, _ints(0, heads, -1, width)), perm=[0, 2, 1, 3])


def _allowed(q: Any, window: int, chunk: int, causal: bool) -> Any:
    """Which key (last axis) a query sees."""
    tokens = op.Squeeze(op.Shape(q, start=2, end=3))
    places = op.Range(op.Constant(value_int=0), tokens, op.Constant(value_int=1))
    key, query = op.Unsqueeze(places, _ints(0)), op.Unsqueeze(places, _ints(1))
    rules = [op.LessOrEqual(key, query)] if causal else []
    if window:
        rules.append(op.Greater(key, op.Sub(query, op.Constant(value_int=window))))
    if chunk:
        size = op.Constant(value_int=chunk)
        rules.append(op.Equal(op.Div(key, size), op.Div(query, size)))
    return functools.reduce(op.And, rules)
