"""From a Hugging Face model to an IR module: export on fake tensors, import, canonicalize.

The result has one function,

    main(input_ids [batch, seq] int64, positions [batch, seq] int64, *weights) -> logits [batch, seq, vocab]

in float32, with ``R.moqc.experts`` for every experts block and ``R.moqc.attention`` for every attention.
`moqc.ir.annotations.PARAMS` names the weights: parameters of the transformers model, and canonical experts
operands such as ``model.layers.0.mlp.experts.gate``.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any

import sympy
import torch
import transformers
from tvm import IRModule, relax

from moqc.errors import InternalError, ModelError
from moqc.frontend import masks
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.importer import Importer
from moqc.frontend.repeat import expand, repeated
from moqc.frontend.skeleton import fake_parameters, first_line
from moqc.ir.annotations import PARAMS, SCHEMA, SCHEMA_VERSION
from moqc.ir.sites import find_experts, input_count

MAX_BATCH = 4
MAX_CHUNK = 512
_LEAST_BOUND = 16  # torch treats a size that can only be 1, or 2, as a constant

# Whatever a model's own code and torch raise while it is traced.
_TRACING_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
)
# Composite operators that passes want whole.
_KEPT = ("aten::linear", "aten::silu", "aten::gelu")


def import_model(
    checkpoint: Checkpoint, *, max_batch: int = MAX_BATCH, max_chunk: int = MAX_CHUNK, latent: bool = False
) -> IRModule:
    """The IR module of a checkpoint, without reading its weights.

    `max_batch` and `max_chunk` bound the two symbolic sizes (memory is planned for them). `latent`: where
    attention compresses keys and values, caches are to hold what is compressed. Raises ModelError for a model
    that cannot be exported or imported, naming the reason.
    """
    return import_torch(checkpoint.meta_model(latent=latent), max_batch=max_batch, max_chunk=max_chunk)


def import_torch(
    model: transformers.PreTrainedModel, *, max_batch: int = MAX_BATCH, max_chunk: int = MAX_CHUNK
) -> IRModule:
    """The IR module of a hooked model, whose parameters may be on the meta device."""
    mod = translate(model, max_batch=max_batch, max_chunk=max_chunk)[1]
    bounds = {"batch": max_batch, "seq": max_chunk}
    mod.update_func(mod.get_global_var("main"), mod["main"].with_attr("tir_var_upper_bound", bounds))
    return mod


def translate(
    model: transformers.PreTrainedModel, *, max_batch: int = MAX_BATCH, max_chunk: int = MAX_CHUNK
) -> tuple[torch.export.ExportedProgram, IRModule]:
    """The exported program of a hooked model, and its IR module.

    Raises ModelError for a model that cannot be exported or imported, naming the reason.
    """
    program = export(model, max_batch=max_batch, max_chunk=max_chunk)
    return program, import_program(program, model)


class _Logits(torch.nn.Module):
    """What is exported: (input_ids, positions) -> logits."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, position_ids=positions, use_cache=False).logits
        return logits


def export(
    model: transformers.PreTrainedModel,
    *,
    max_batch: int = MAX_BATCH,
    max_chunk: int = MAX_CHUNK,
) -> torch.export.ExportedProgram:
    """Export a hooked model with symbolic batch and seq; meta parameters become fake tensors.

    The graph has operators that the importer knows, and none that writes in place. Of layers that are alike
    one is traced (`moqc.frontend.repeat`).

    Raises ModelError naming the model type when torch cannot export it for all sizes.
    """
    kind = model.config.model_type
    sizes = {
        0: torch.export.Dim("batch", min=1, max=max(max_batch, _LEAST_BOUND)),
        1: torch.export.Dim("seq", min=1, max=max(max_chunk, _LEAST_BOUND)),
    }
    fake_parameters(model)
    try:
        with torch.no_grad(), _quiet(), masks.unpacked():
            with repeated(model):
                program = _trace(model, sizes)
            return program if expand(program) else _trace(model, sizes)
    except _TRACING_ERRORS as error:
        raise ModelError(f"{kind}: cannot be exported: {first_line(error)}") from error


def _trace(model: transformers.PreTrainedModel, sizes: dict[int, Any]) -> torch.export.ExportedProgram:
    """The program of `model` in the operators that the importer knows."""
    ids = torch.zeros(2, 8, dtype=torch.int64)
    program = torch.export.export(
        _Logits(model),
        (ids, torch.arange(8).repeat(2, 1)),
        dynamic_shapes={"input_ids": sizes, "positions": sizes},
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    check_assertions(program, model.config.model_type)
    decomposed: torch.export.ExportedProgram = program.run_decompositions(_decompositions())
    return decomposed


def check_assertions(program: torch.export.ExportedProgram, kind: str) -> None:
    """Refuse a program with run-time checks, which the import drops, that are not true for every size.

    That both inputs have one shape is moqc's own promise. A check of sizes is tried for each size that the
    program allows. Raises ModelError quoting the first check that may fail.
    """
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        checks = getattr(node.target, "__name__", "") in ("_assert_scalar.default", "_assert_async.msg")
        if not checks or _equates_inputs(node.args[0], inputs):
            continue
        if not _always_true(node.args[0], program.range_constraints):
            raise ModelError(f"{kind}: depends on a condition that moqc cannot check: {node.args[-1]}")


def _always_true(condition: Any, ranges: Mapping[Any, Any]) -> bool:
    """Whether `condition`, an expression of sizes, holds for all sizes in their `ranges`."""
    value = condition.meta.get("val") if isinstance(condition, torch.fx.Node) else condition
    if not isinstance(value, torch.SymBool):
        return value is True
    expression = value.node.expr
    symbols = sorted(expression.free_symbols, key=str)
    if not all(symbol in ranges for symbol in symbols):
        return False
    spans = [range(int(ranges[symbol].lower), int(ranges[symbol].upper) + 1) for symbol in symbols]
    return all(
        expression.subs(dict(zip(symbols, sizes, strict=True))) == sympy.true for sizes in product(*spans)
    )


def _equates_inputs(condition: Any, inputs: set[str]) -> bool:
    """Whether `condition` says that a dimension of one input equals the same dimension of another."""
    if getattr(condition, "target", None) is not operator.eq:
        return False
    sizes = [argument.args for argument in condition.args if _is_size(argument)]
    return len(sizes) == 2 and {node.name for node, _ in sizes} <= inputs and sizes[0][1] == sizes[1][1]


def _is_size(node: Any) -> bool:
    return getattr(node, "target", None) is torch.ops.aten.sym_size.int


def import_program(program: torch.export.ExportedProgram, model: transformers.PreTrainedModel) -> IRModule:
    """The program exported from `model` as an IR module with named sizes, moqc's operators and PARAMS.

    Raises ModelError for operators the importer does not know, and when no experts block came through.
    """
    kind = model.config.model_type
    try:
        mod = Importer(_symbols(program)).from_exported_program(program, True, True, False, None)
    except _TRACING_ERRORS as error:
        raise ModelError(f"{kind}: cannot be imported: {first_line(error)}") from error
    main = mod["main"].without_attr("params").without_attr("num_input")
    mod = drop_unused(IRModule({"main": main}), _weight_names(program, model))
    if not find_experts(mod):
        raise ModelError(f"{kind}: no experts block reached the graph")
    return SCHEMA.put(mod, SCHEMA_VERSION)


def _symbols(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Torch's names of the two symbolic sizes -> ``batch`` and ``seq``."""
    ids = next(node for node in program.graph.find_nodes(op="placeholder") if node.name == "input_ids")
    return dict(zip((str(size) for size in ids.meta["val"].shape), ("batch", "seq"), strict=True))


def _weight_names(program: torch.export.ExportedProgram, model: transformers.PreTrainedModel) -> list[str]:
    """Names of main's parameters after the two inputs, in order; a tied one by the name it is tied to."""
    kinds = torch.export.graph_signature.InputKind
    specs = program.graph_signature.input_specs
    names = [str(spec.target).removeprefix("model.") for spec in specs if spec.kind == kinds.PARAMETER]
    return [model.all_tied_weights_keys.get(name, name) for name in names]


def drop_unused(mod: IRModule, names: list[str]) -> IRModule:
    """Remove dead bindings and the weights nothing uses; annotate the names of the others."""
    mod = relax.transform.DeadCodeElimination()(relax.transform.CanonicalizeBindings()(mod))
    main = mod["main"]
    count = input_count(main)
    inputs, weights = list(main.params)[:count], list(main.params)[count:]
    if len(weights) != len(names):
        raise InternalError(f"{len(weights)} parameters were imported, {len(names)} exported")
    used = set(relax.analysis.free_vars(main.body))
    kept = [(weight, name) for weight, name in zip(weights, names, strict=True) if weight in used]
    parameters = [*inputs, *(weight for weight, _ in kept)]
    main = relax.Function(parameters, main.body, main.ret_ty, main.is_pure, main.attrs)
    return PARAMS.put(IRModule({"main": main}), [name for _, name in kept])


def _decompositions() -> dict[Any, Any]:
    """Torch's default decompositions without the operators in `_KEPT`."""
    table = dict(torch.export.default_decompositions())
    return {operator: rule for operator, rule in table.items() if operator.name() not in _KEPT}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch: a deprecation that 2.13 raises against itself, and the log of errors it raises too."""
    tracer = logging.getLogger("torch._subclasses.fake_tensor")
    level = tracer.level
    tracer.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        tracer.setLevel(level)
