"""The rules of moqc's IR, checked between passes with ``--verify-each`` and in tests.

* main exists; its parameters are input_ids, positions, one a name in PARAMS, then the caches of CACHE.
* Attributes under ``moqc.`` are known keys. BITS fits the experts it speaks of.
* A site names one experts block (and one attention).
* Every R.moqc.* call has the operands its attributes promise, of the shapes and dtypes `moqc.ir.ops` states.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import IRModule, relax

from moqc.errors import UserError, VerifyError
from moqc.ir import ops
from moqc.ir.annotations import BITS, CACHE, KEYS, LINEAR_BITS, PARAMS
from moqc.ir.calls import attributes, describe, is_call, operands
from moqc.ir.sites import bindings, input_count
from moqc.ir.verify_calls import RULES, verify_call
from moqc.quant.formats import Format


def verify(mod: IRModule) -> None:
    """Raise VerifyError, naming the operator and its site, at the first rule that `mod` breaks."""
    if "main" not in {variable.name_hint for variable in mod.get_global_vars()}:
        raise VerifyError("the module has no function main")
    _check_keys(mod)
    _check_parameters(mod)
    calls = [value for _, value in bindings(mod["main"]) if is_call(value, *RULES)]
    for call in calls:
        verify_call(call)
    _check_unique(calls)
    _check_bits(mod, calls)


def _check_keys(mod: IRModule) -> None:
    names = [] if mod.attrs is None else [str(name) for name in mod.attrs.keys()]  # noqa: SIM118
    unknown = [name for name in names if name.startswith("moqc.") and name not in KEYS]
    if unknown:
        raise VerifyError(f"unknown annotation {unknown[0]}: 'moqc.' is reserved for {', '.join(KEYS)}")


def _check_parameters(mod: IRModule) -> None:
    names = PARAMS.get(mod)
    if names is None:
        return
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise VerifyError(f"{PARAMS} names {twice} twice")
    cache = CACHE.get(mod)
    caches = 0 if cache is None else len(cache["tensors"])
    given, expected = len(mod["main"].params), input_count(mod["main"]) + len(names) + caches
    if given != expected:
        raise VerifyError(
            f"main has {given} parameters, expected {expected}: its inputs, "
            f"{len(names)} weights ({PARAMS}) and {caches} caches"
        )


def _check_unique(calls: Sequence[relax.Call]) -> None:
    seen = set()
    for call in calls:
        kind = str(call.op.name).replace("mixed_", "").replace("cached_", "")
        if kind in (ops.LINEAR, ops.EMBEDDING):  # a tied table or a shared projection is used more than once
            continue
        if (kind, attributes(call)["site"]) in seen:
            raise VerifyError(f"{describe(call)}: there is another with this site")
        seen.add((kind, attributes(call)["site"]))


def _check_bits(mod: IRModule, calls: Sequence[relax.Call]) -> None:
    """BITS and LINEAR_BITS hold format names; BITS one for each expert and projection of its site."""
    try:
        for name in (LINEAR_BITS.get(mod) or {}).values():
            Format.parse(name)
        for site, projections in (BITS.get(mod) or {}).items():
            for name in {name for formats in projections.values() for name in formats}:
                Format.parse(name)
            for call in calls:
                if is_call(call, ops.EXPERTS) and attributes(call)["site"] == site:
                    _check_plan(call, projections)
    except UserError as error:
        raise VerifyError(f"annotations: {error}") from error


def _check_plan(call: relax.Call, projections: dict[str, list[str]]) -> None:
    named = operands(call)
    experts = int(named["down"].ty.shape[0])
    expected = {name: experts for name in ops.PROJECTIONS if name in named}
    given = {name: len(formats) for name, formats in projections.items()}
    if given != expected:
        raise VerifyError(
            f"{BITS} of {attributes(call)['site']} has formats for {given}, expected {expected}"
        )
