"""The architecture as tests: layers, packages, lean imports, one copy of every module."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOTS = {"moqc": ROOT / "moqc", "moqc.passes": ROOT / "passes", "moqc.schedules": ROOT / "schedules"}

# A module imports from layers below its own, and from its own folder; the modules of layer 7 know each other.
# The longest matching prefix decides.
LAYERS = {
    "moqc.errors": 0,
    "moqc.log": 0,
    "moqc.units": 0.5,
    "moqc.keywords": 0.5,
    "moqc.quant": 1,
    "moqc.machines": 1.5,
    "moqc.targets": 2,
    "moqc.toolchains": 2.5,
    "moqc.ir": 3,
    "moqc.frontend": 4,
    "moqc.calibrate": 4.5,
    "moqc.schedules": 5,
    "moqc.passes": 6,
    "moqc.pipelines": 7,
    "moqc.certificate": 7,
    "moqc.launches": 7,
    "moqc.launch_plan": 7,
    "moqc.device_code": 7,
    "moqc.limits": 7,
    "moqc.page": 7,
    "moqc.codegen": 7,
    "moqc.package": 7,
    "moqc.manifest": 7,
    "moqc.describe": 7,
    "moqc.recipe": 7,
    "moqc.options": 7,
    "moqc.card": 7,
    "moqc.tensorfile": 7,
    "moqc.assemble": 7,
    "moqc.runtime": 8,
    "moqc.evaluate": 9,
    "moqc.bench": 9,
    "moqc.predict": 8.5,
    "moqc.report": 9,
    "moqc.inputs": 10,
    "moqc.artifact": 10.2,
    "moqc.synthesis": 10.5,
    "moqc.graphs": 10.3,
    "moqc.onnx_export": 10.3,
    "moqc.compiling": 10.5,
    "moqc.planning": 10.5,
    "moqc.scoring": 10.5,
    "moqc.reporting": 10.5,
    "moqc.api": 10.6,
    "moqc.commands": 11,
    "moqc.cli": 12,
}
OUTSIDE = {"moqc", "moqc.__main__"}
# Folders whose code must not know a library, at module level or inside a function.
FORBIDDEN = {
    "moqc.errors": {"tvm", "torch", "transformers", "numpy"},
    "moqc.log": {"tvm", "torch", "transformers", "numpy"},
    "moqc.quant": {"tvm", "tvm_ffi", "transformers"},
    "moqc.runtime": {"torch", "transformers"},
    "moqc.schedules": {"torch", "transformers"},
}
# Modules of other layers the runtime may use: it works where the compiler's layers are absent.
RUNTIME_MAY_USE = {
    "moqc.errors",
    "moqc.log",
    "moqc.machines",
    "moqc.targets",
    "moqc.launches",
    "moqc.manifest",
    "moqc.tensorfile",
}


def modules() -> dict[str, Path]:
    """Every module of the tree by its import name."""
    found = {}
    for package, folder in ROOTS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            found[name] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """Absolute names imported anywhere in a file, at type-checking time too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def prefix(name: str, table) -> str | None:
    """The longest entry of `table` that `name` lies in."""
    parts = name.split(".")
    candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((candidate for candidate in candidates if candidate in table), None)


MODULES = modules()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name: str) -> None:
    home = prefix(name, LAYERS)
    if home is None:
        assert name in OUTSIDE, f"{name} is in no layer: add it to LAYERS"
        return
    for imported in imports(MODULES[name]):
        other = prefix(imported, LAYERS)
        if other is None or other == home:
            continue
        same_layer = LAYERS[other] == LAYERS[home] == 7
        assert LAYERS[other] < LAYERS[home] or same_layer, f"{name} imports {imported} from a layer above"
        if home == "moqc.runtime":
            assert other in RUNTIME_MAY_USE, f"{name} imports {imported}, which is absent on a device"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_libraries_stay_in_their_layers(name: str) -> None:
    home = prefix(name, FORBIDDEN)
    banned = FORBIDDEN[home] if home else set()
    assert not {imported.partition(".")[0] for imported in imports(MODULES[name])} & (
        banned | {"passes", "schedules"}
    )


def test_package_list_equals_the_tree() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tree = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(config["tool"]["setuptools"]["packages"]) == tree


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for path in MODULES.values()}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_package_init_files_hold_no_code() -> None:
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name != "moqc":
            body = ast.parse(path.read_text()).body
            assert all(isinstance(node, ast.Expr) for node in body), f"{path} has code"
            assert len(body) <= 1, f"{path} has more than a docstring"


def test_no_utils() -> None:
    assert [name for name in MODULES if re.search(r"\b(utils?|helpers|misc|common)$", name)] == []


def test_one_copy_of_passes_and_schedules() -> None:
    """With the root on sys.path, `import passes` would make a second copy with a second registry."""
    import moqc.passes.pipeline  # noqa: F401

    assert not {"passes", "schedules"} & sys.modules.keys()


@pytest.mark.parametrize("module", ["moqc", "moqc.cli"])
def test_imports_are_lean(module: str) -> None:
    """What `moqc --help` imports loads neither a compiler nor a framework."""
    heavy = ("tvm", "tvm_ffi", "torch", "transformers", "scipy", "numpy")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
