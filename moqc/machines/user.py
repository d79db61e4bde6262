"""Targets of the user's own: a small TOML file that starts from a known target.

```toml
base = "aarch64:cortex-a76"      # everything that is not said below is this target's
doc = "Radxa Rock 5B"            # optional
[roofline]                       # optional; for `moqc plan`
bandwidth = 2.4e10               # bytes a second from memory
weight_rate = 1.5e10             # weights a second, unpacked and multiplied, in cache
layer_seconds = 2e-4             # what a layer takes beside its weights
source = "bench-kernels on the board"
```

``mcpu`` and ``mattr`` (lists of ``+feature`` and ``-feature``) change what LLVM is told for the CPU; then
``features`` has to list the CPU flags that a machine must have, by their Linux names. The target is named
after the file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from moqc.errors import TargetError, reason
from moqc.machines.target import Roofline, Target

_KEYS = {"base", "doc", "mcpu", "mattr", "features", "roofline"}
_NUMBERS = ("bandwidth", "weight_rate", "layer_seconds")


def read_target(path: Path, find: Callable[[str], Target]) -> Target:
    """The target in a TOML file; `find` resolves its base. Raises TargetError that names file and key."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TargetError(f"{path}: cannot read the target ({reason(error)})") from error
    if unknown := sorted(content.keys() - _KEYS):
        raise TargetError(f"{path}: unknown key {unknown[0]!r}: known are {', '.join(sorted(_KEYS))}")
    base = content.get("base")
    if not isinstance(base, str) or base.endswith(".toml"):
        raise TargetError(f'{path}: needs base = "NAME", one of `moqc targets`')
    target = find(base)
    target = replace(target, name=path.stem, verified="", doc=str(content.get("doc", target.doc)))
    if content.keys() & {"mcpu", "mattr"}:
        target = _with_cpu(path, target, content)
    elif "features" in content:
        raise TargetError(f"{path}: features follow from mcpu or mattr, and neither is given")
    if "roofline" in content:
        target = replace(target, roofline=_roofline(path, content["roofline"]))
    return target


def _with_cpu(path: Path, target: Target, content: dict[str, Any]) -> Target:
    """`target` with another CPU."""
    mattr, features = content.get("mattr", []), content.get("features")
    if not isinstance(features, list) or not all(isinstance(flag, str) for flag in features):
        raise TargetError(f"{path}: mcpu and mattr need features = [...], the CPU flags a machine must have")
    if not isinstance(mattr, list) or not all(str(flag)[:1] in "+-" for flag in mattr):
        raise TargetError(f'{path}: mattr is a list such as ["+dotprod"]')
    if target.device != "cpu":
        raise TargetError(f'{path}: mcpu and mattr are for CPUs; give base = "cuda:...@HOST" its host')
    tvm = {key: value for key, value in target.tvm.items() if key != "mattr"}
    tvm["mcpu"] = str(content.get("mcpu", tvm["mcpu"]))
    # What the base turned off stays off, unless it is asked for here.
    kept = [flag for flag in target.tvm.get("mattr", []) if f"+{flag[1:]}" not in mattr]
    return replace(target, tvm={**tvm, "mattr": [*kept, *mattr]}, features=frozenset(features))


def _roofline(path: Path, table: Any) -> Roofline:
    """The table ``[roofline]``."""
    names = {field.name for field in fields(Roofline)}
    if not isinstance(table, dict) or table.keys() != names:
        raise TargetError(f"{path}: [roofline] needs exactly {', '.join(sorted(names))}")
    for name in _NUMBERS:
        if not isinstance(table[name], int | float) or table[name] <= 0:
            raise TargetError(f"{path}: {name} of [roofline] is not a positive number")
    numbers = {name: float(table[name]) for name in _NUMBERS}
    return Roofline(**numbers, source=str(table["source"]))
