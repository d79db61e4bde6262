"""Plans that a search on a machine found to be faster than the rules', by target and shape.

``schedules/records/NAME.json``, NAME a GPU architecture or a target, has the outcome of searches by
`moqc tune`:

    {"schema": 1, "source": "machine, versions: command", "target": "x86-64-v4-amx",
     "records": [{"kernel": "down", "tokens": 1, "experts": 128, "top_k": 8, "hidden": 2048,
                  "intermediate": 768, "bits": 4, "several": false, "zeros": true,
                  "format": "int4-g128", "plan": "t2a128u1", "microseconds": 60.1,
                  "rule": "t8a64u1", "rule_microseconds": 68.2, "tried": 12, "date": "2026-11-22"}, ...]}

`bits` is the width of the widest code, `several`: whether there are several formats, `zeros`: whether any is
asymmetric; of formats that share all that, the last record decides. `rule` is the plan used without a record.
"format", where all experts have the same one, is what was measured. "timed" is "layer" where the times are
those of whole layers, in which the plan was chosen; such a record has no format, and no kernel's time is made
of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moqc.errors import TargetError
from moqc.quant.formats import Format
from moqc.targets import Target

FOLDER = Path(__file__).parent / "records"
SCHEMA = 1
KEY = ("kernel", "tokens", "experts", "top_k", "hidden", "intermediate", "bits", "several", "zeros")
"""What a record goes by."""

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Records:
    """A file of records: where they are from, the rows, and the plans by `KEY`."""

    source: str
    rows: tuple[Mapping[str, Any], ...]
    plans: Mapping[Key, str]
    target: str | None = None
    """Whose plans they are; None in files that do not say."""


def record_key(kernel: str, tokens: int, sizes: Sequence[int], formats: Sequence[Format]) -> Key:
    """The values of `KEY`; `sizes` are experts, top_k, hidden and intermediate."""
    zeros = any(not fmt.symmetric for fmt in formats)
    return (kernel, tokens, *sizes, max(fmt.bits for fmt in formats), len(set(formats)) > 1, zeros)


def read(path: Path) -> Records:
    """The records of a file. Raises TargetError for one that is none."""
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise TargetError(f"{path}: {error.strerror}; make it with `moqc tune`") from error


@cache
def _read(path: Path, _changed: int) -> Records:
    """Every layer asks; `_changed` tells one version of a file from the next."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise TargetError(f"{path}: schema {content['schema']}, and this moqc reads {SCHEMA}")
        rows = tuple(content["records"])
        plans = {tuple(row[name] for name in KEY): str(row["plan"]) for row in rows}
        return Records(str(content["source"]), rows, plans, content.get("target"))
    except (KeyError, TypeError, ValueError) as error:
        raise TargetError(f"{path}: no records of plans ({type(error).__name__}: {error})") from error


def shipped(name: str) -> Records | None:
    """The records that come with moqc for a target or an architecture."""
    path = FOLDER / f"{name}.json"
    return read(path) if path.is_file() else None


def find(target: Target, key: Key) -> tuple[str, str] | None:
    """The plan of a key and its source: the file that the user gave first, then what ships."""
    files = [] if target.records is None else [read(Path(target.records))]
    files += [each for each in [shipped(target.name)] if each is not None]
    return next(((each.plans[key], each.source) for each in files if key in each.plans), None)
