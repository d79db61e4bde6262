"""`moqc passes`, `targets`, `allocators`, `formats`: what there is to choose from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moqc.commands.options import Json, print_json, print_table

if TYPE_CHECKING:
    from moqc.targets import Target


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
    """List the machines moqc compiles for. Whether that works here, and how the code was verified."""
    from moqc.errors import TargetError
    from moqc.targets import TARGETS, find_target, runs_here

    try:
        native = find_target("native").name
    except TargetError:
        native = None
    rows = [
        {**_target(target), "native": target.name == native, "runs_here": runs_here(target)}
        for target in TARGETS.values()
    ]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("target", "compiles", "runs", "activations", "what it is", "verified"),
        [
            (
                row["name"],
                "; ".join(row["missing_tools"]) or "here",
                "native" if row["native"] else "here" if row["runs_here"] else "",
                ", ".join(row["activations"]),
                row["doc"],
                row["verified"],
            )
            for row in rows
        ],
    )


def _target(target: Target) -> dict[str, Any]:
    """What is known of a target, and the tools it lacks here with the command that installs them."""
    from moqc.toolchains import tools

    needed = tools(target)
    return {
        "name": target.name,
        "doc": target.doc,
        "device": target.device,
        "machine": target.machine,
        "features": sorted(target.features),
        "architectures": list(target.architectures),
        "activations": list(target.activations),
        "caches": list(target.caches),
        "layout": target.layout,
        "largest_binding": target.largest_binding,
        "verified": target.verified,
        "tools": [str(found) for tool in needed if (found := tool.find())],
        "missing_tools": [f"{tool.what}: {tool.install}" for tool in needed if tool.find() is None],
        "tvm": target.tvm,
    }


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
