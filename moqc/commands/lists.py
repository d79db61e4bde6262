"""`moqc passes`, `targets`, `allocators`, `formats`: what there is to choose from."""

from __future__ import annotations

from typing import Any

from moqc.commands.options import Json, print_json, print_table


def passes(as_json: Json = False) -> None:
    """List the passes, their options, what they read and write."""
    from dataclasses import fields

    from moqc.passes.registry import find_pass, pass_names

    rows: list[dict[str, Any]] = []
    for name in pass_names():
        cls = find_pass(name)
        rows.append(
            {
                "name": name,
                "options": {field.name: str(field.default) for field in fields(cls)},
                "reads": [str(key) for key in cls.reads],
                "writes": [str(key) for key in cls.writes],
                "doc": _first_line(cls.__doc__),
            }
        )
    if as_json:
        print_json(rows)
        return
    print_table(
        ("pass", "options", "what it does"),
        [
            (
                row["name"],
                " ".join(f"{key}={value}" for key, value in row["options"].items()) or "-",
                row["doc"],
            )
            for row in rows
        ],
    )


def targets(as_json: Json = False) -> None:
    """List the machines moqc compiles for."""
    from moqc.errors import TargetError
    from moqc.targets import TARGETS, find_target

    try:
        native = find_target("native").name
    except TargetError:
        native = None
    rows = [
        {"name": target.name, "native": target.name == native, "doc": target.doc, "tvm": target.tvm}
        for target in TARGETS.values()
    ]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("target", "this machine", "what it is"),
        [(row["name"], "native" if row["native"] else "", row["doc"]) for row in rows],
    )


def allocators(as_json: Json = False) -> None:
    """List the allocators and quantizers a plan may name."""
    from moqc.calibrate.quantize import QUANTIZERS
    from moqc.quant.allocators.table import ALLOCATORS

    rows = {name: _first_line(function.__doc__) for name, function in ALLOCATORS.items()}
    if as_json:
        print_json({"allocators": rows, "quantizers": list(QUANTIZERS)})
        return
    print_table(("allocator", "what it does"), list(rows.items()))
    print_table(("quantizer", "what it does"), list(QUANTIZERS.items()))


def formats(as_json: Json = False) -> None:
    """List the formats of matrices, with their bits per weight."""
    from moqc.quant.formats import ALL_FORMATS

    size = 4096
    rows = [
        {"name": str(fmt), "bits": fmt.bits, "file_bits_per_weight": fmt.stored_bits(size, size) / size**2}
        for fmt in ALL_FORMATS
    ]
    if as_json:
        print_json(rows)
    else:
        print_table(
            ("format", "code bits", "file bits"),
            [(row["name"], row["bits"], row["file_bits_per_weight"]) for row in rows],
        )


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().partition("\n")[0]
