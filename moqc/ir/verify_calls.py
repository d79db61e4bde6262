"""What each of moqc's operators promises: shapes, dtypes and names of its operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax, tirx
from tvm.sym import Analyzer

from moqc.errors import UserError, VerifyError
from moqc.ir import ops
from moqc.ir.calls import attributes, bit_classes, describe, operands, plain
from moqc.ir.packed import mixed_operands, packed_names, packed_types
from moqc.quant.activations import parse_activation
from moqc.quant.formats import Format
from moqc.quant.kv_cache import DTYPES, stored_columns

INTEGERS = ("int32", "int64")


def verify_call(call: relax.Call) -> None:
    """Raise VerifyError, naming operator and site, unless the operands are what `moqc.ir.ops` states."""
    try:
        RULES[str(call.op.name)](call)
    except UserError as error:  # a format or an activation that does not parse
        raise VerifyError(f"{describe(call)}: {error}") from error


def _check_experts(call: relax.Call) -> None:
    named = operands(call)
    names = attributes(call)["operands"]
    if names != [name for name in ops.EXPERT_OPERANDS if name in names] or not {"up", "down"} <= set(names):
        order = ", ".join(ops.EXPERT_OPERANDS)
        raise VerifyError(f"{describe(call)}: operands {names} are not up and down among {order}, in order")
    _check_gate(call, "gate" in names)
    if parse_activation(attributes(call)["activation"]).rotated:
        raise VerifyError(f"{describe(call)}: only packed experts are rotated")
    experts, hidden, intermediate = _extents(call, "down", 3)
    wide = (experts, intermediate, hidden)
    shapes = {"gate": wide, "up": wide, **_bias_shapes(experts, hidden, intermediate)}
    _check_routing(call, hidden)
    for name in names:
        if name in shapes:
            _check(call, name, named[name].ty, shapes[name])


def _check_mixed(call: relax.Call) -> None:
    named, attrs, classes = operands(call), attributes(call), bit_classes(call)
    intermediate, inputs = attrs["intermediate"], _extents(call, "x", 2)[1]
    hidden = attrs.get("hidden", inputs)
    _check_gate(call, "gate" in classes)
    _check_choice(call, "activations", ("float", "int8"))
    _check_routing(call, inputs)
    biases = [name for name in attrs["operands"] if name.endswith("_bias")]
    if attrs["operands"] != mixed_operands(classes, biases):
        expected = mixed_operands(classes, biases)
        raise VerifyError(f"{describe(call)}: operands {attrs['operands']}, its classes need {expected}")
    experts = _extents(call, "table", 3)[1]
    _check(call, "table", named["table"].ty, (3, experts, 2), ("int32",))
    for projection, formats in classes.items():
        rows, columns = (hidden, intermediate) if projection == "down" else (intermediate, inputs)
        stacked = 0
        for number, format in enumerate(formats):
            prefix = f"{projection}.{number}."
            count = _extents(call, prefix + "codes", 5)[0]
            _check_packed(call, prefix, format, rows, columns, (count,))
            stacked += count
        if stacked + len(attrs.get("removed", ())) != experts:
            raise VerifyError(f"{describe(call)}: {projection} has {stacked} experts, the table {experts}")
    for name in biases:
        _check(call, name, named[name].ty, _bias_shapes(experts, hidden, intermediate)[name])


def _check_linear(call: relax.Call) -> None:
    attrs, named = attributes(call), operands(call)
    columns = _extents(call, "x", named["x"].ty.ndim, last=True)[-1]
    _check_choice(call, "activations", ("float", "int8"))
    _check_names(call, Format.parse(attrs["format"]), ["bias"])
    _check_packed(call, "", Format.parse(attrs["format"]), attrs["rows"], columns)
    if "bias" in named:
        _check(call, "bias", named["bias"].ty, (attrs["rows"],))


def _check_embedding(call: relax.Call) -> None:
    attrs = attributes(call)
    format = Format.parse(attrs["format"])
    _check_names(call, format, [])
    # The number of rows is not known here, only that of row tiles.
    padded_rows = _extents(call, "codes", 4)[0] * 16
    _check_packed(call, "", format, padded_rows, attrs["columns"])
    ids = operands(call)["ids"].ty
    _check(call, "ids", ids, tuple(ids.shape), INTEGERS)


def _check_attention(call: relax.Call) -> None:
    named = operands(call)
    batch, heads, tokens, width = named["q"].ty.shape
    key_heads, value_width = named["v"].ty.shape[1], named["v"].ty.shape[3]
    if attributes(call).get("latent"):
        width -= value_width
    _check(call, "k", named["k"].ty, (batch, key_heads, tokens, width))
    _check(call, "v", named["v"].ty, (batch, key_heads, tokens, value_width))
    _check(call, "positions", named["positions"].ty, (batch, tokens), ("int64",))
    if int(heads) % int(key_heads):
        raise VerifyError(
            f"{describe(call)}: {int(heads)} heads are no multiple of {int(key_heads)} key heads"
        )
    if "sinks" in named:
        _check(call, "sinks", named["sinks"].ty, (heads,))
    for name in ("scale", "softcap"):
        _check_number(call, name)
    if "k_cache" in named:
        slots, capacity = named["k_cache"].ty.shape[0], named["k_cache"].ty.shape[2]
        for name, columns in (("k_cache", width), ("v_cache", value_width)):
            stored = stored_columns(str(named["k_cache"].ty.dtype), int(columns))
            _check(call, name, named[name].ty, (slots, key_heads, capacity, stored), DTYPES)


def _check_prune_routing(call: relax.Call) -> None:
    named = operands(call)
    hidden = _extents(call, "x", 2, last=True)[-1]
    _check_routing(call, hidden)
    _check(call, "positions", named["positions"].ty, (named["x"].ty.shape[0],), ("int64",))
    if attributes(call)["operands"] not in (["strength", "limits"], ["strength", "limits", "slopes"]):
        raise VerifyError(f"{describe(call)}: its operands are strength, limits and in some cases slopes")
    experts = _extents(call, "strength", 1, last=True)[0]
    _check(call, "strength", named["strength"].ty, (experts,))
    _check(call, "limits", named["limits"].ty, (3,))
    if "slopes" in named:
        _check(call, "slopes", named["slopes"].ty, (experts, hidden), ("float16",))
    _check_choice(call, "rule", ("mass", "ratio"))
    _check_number(call, "exponent")


def _check_recurrent(call: relax.Call) -> None:
    named, names = operands(call), attributes(call)["operands"]
    batch, tokens, heads, width = named["v"].ty.shape
    _, _, keys, key_width = named["k"].ty.shape
    lead = (batch, tokens)
    for name in ("q", "k"):
        _check(call, name, named[name].ty, (*lead, keys, key_width))
    decay = named["decay"].ty
    _check(call, "decay", decay, (*lead, heads) if decay.ndim == 3 else (*lead, heads, key_width))
    _check(call, "positions", named["positions"].ty, lead, ("int64",))
    if int(heads) % int(keys):
        raise VerifyError(f"{describe(call)}: {int(heads)} heads are no multiple of {int(keys)} key heads")
    if names != [name for name in ("beta", "rate") if name in names] or ("rate" in names and decay.ndim == 4):
        raise VerifyError(f"{describe(call)}: operands {names} do not fit a decay of {decay.ndim} dimensions")
    shapes = {"beta": (*lead, heads), "rate": (heads, key_width)}
    for name in names:
        _check(call, name, named[name].ty, shapes[name])
    if "state" in named:
        state = named["state"].ty
        _check(call, "state", state, (state.shape[0], heads, key_width, width))


def _check_causal_conv(call: relax.Call) -> None:
    named = operands(call)
    batch, tokens, channels = named["x"].ty.shape
    window = named["weight"].ty.shape[1]
    _check(call, "weight", named["weight"].ty, (channels, window))
    _check(call, "positions", named["positions"].ty, (batch, tokens), ("int64",))
    if "bias" in named:
        _check(call, "bias", named["bias"].ty, (channels,))
    if "state" in named:
        state = named["state"].ty
        _check(call, "state", state, (state.shape[0], window - 1, channels))


RULES: dict[str, Callable[[relax.Call], None]] = {
    ops.EXPERTS: _check_experts,
    ops.MIXED_EXPERTS: _check_mixed,
    ops.LINEAR: _check_linear,
    ops.EMBEDDING: _check_embedding,
    ops.ATTENTION: _check_attention,
    ops.CACHED_ATTENTION: _check_attention,
    ops.PRUNE_ROUTING: _check_prune_routing,
    ops.RECURRENT: _check_recurrent,
    ops.CACHED_RECURRENT: _check_recurrent,
    ops.CAUSAL_CONV: _check_causal_conv,
    ops.CACHED_CAUSAL_CONV: _check_causal_conv,
}


# ---- parts of rules


def _bias_shapes(experts: int, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    wide = (experts, intermediate)
    return {"gate_bias": wide, "up_bias": wide, "down_bias": (experts, hidden)}


def _check_gate(call: relax.Call, has_gate: bool) -> None:
    name = attributes(call)["activation"]
    if parse_activation(name).has_gate != has_gate:
        verb = "has" if has_gate else "lacks"
        raise VerifyError(f"{describe(call)} {verb} a gate projection, which does not fit activation {name}")


def _check_routing(call: relax.Call, hidden: int) -> None:
    named = operands(call)
    tokens = named["x"].ty.shape[0]
    chosen = named["ids"].ty.shape[1]
    _check(call, "x", named["x"].ty, (tokens, hidden))
    _check(call, "ids", named["ids"].ty, (tokens, chosen), INTEGERS)
    _check(call, "weights", named["weights"].ty, (tokens, chosen))


def _check_names(call: relax.Call, format: Format, optional: list[str]) -> None:
    names = attributes(call)["operands"]
    needed = list(packed_names(format))
    if names[: len(needed)] != needed or names[len(needed) :] not in ([], optional):
        raise VerifyError(f"{describe(call)}: operands {names}, a matrix of format {format} needs {needed}")


def _check_packed(
    call: relax.Call, prefix: str, format: Format, rows: int, columns: int, matrices: tuple[int, ...] = ()
) -> None:
    named = operands(call)
    for part, expected in packed_types(format, rows, columns, matrices, attributes(call)["layout"]).items():
        _check(call, prefix + part, named[prefix + part].ty, tuple(expected.shape), (str(expected.dtype),))


def _check_choice(call: relax.Call, name: str, choices: tuple[str, ...]) -> None:
    if attributes(call)[name] not in choices:
        raise VerifyError(f"{describe(call)}: {name} is {attributes(call)[name]!r}, not one of {choices}")


def _check_number(call: relax.Call, name: str) -> None:
    text = attributes(call)[name]
    try:
        float(text)
    except ValueError:
        raise VerifyError(f"{describe(call)}: {name} is {text!r}, not a number") from None


def _extents(call: relax.Call, name: str, ndim: int, *, last: bool = False) -> list[int]:
    """Extents of an operand of `ndim` dimensions; -1 for symbolic ones, which may not be the `last`."""
    shape = operands(call)[name].ty.shape
    extents = [int(extent) if isinstance(extent, tirx.IntImm) else -1 for extent in shape]
    if len(extents) != ndim or (last and extents[-1] < 0):
        raise VerifyError(
            f"{describe(call)}: {name} has shape {_text(list(shape))}, expected {ndim} dimensions"
        )
    return extents


def _check(
    call: relax.Call, name: str, ty: Any, shape: tuple[Any, ...], dtypes: tuple[str, ...] = ("float32",)
) -> None:
    """VerifyError unless the operand `name`, of type `ty`, is a tensor of `shape` and one of `dtypes`."""
    expected = f"{' or '.join(dtypes)} {_text(shape)}"
    if not isinstance(ty, relax.TensorType) or ty.shape is None:
        raise VerifyError(f"{describe(call)}: {name} is {ty}, expected {expected}")
    given = list(ty.shape)
    same = len(given) == len(shape) and all(map(Analyzer().can_prove_equal, given, shape))
    if not same or str(ty.dtype) not in dtypes:
        raise VerifyError(f"{describe(call)}: {name} is {ty.dtype} {_text(given)}, expected {expected}")


def _text(shape: Sequence[Any]) -> str:
    """``[tokens, 64]``: TVM's own text would have ``T.int64(64)``."""
    return f"[{', '.join(str(plain(extent)) for extent in shape)}]"
