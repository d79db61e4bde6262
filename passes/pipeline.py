"""A list of passes: read from text, printed, checked, run.

pipeline = Pipeline.parse("profile-activation,allocate-bits{bits=2.5}")
str(pipeline)                     the same text
print(pipeline.describe())        what each reads and writes
mod = pipeline.run(mod, ctx)
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import IRModule

from moqc.errors import PassError, PipelineError, UserError
from moqc.ir.annotations import PARAMS, SCHEMA, Key
from moqc.ir.text import print_module
from moqc.ir.verify import verify
from moqc.log import logger
from moqc.passes.base import Pass, PassContext
from moqc.passes.options import VALUE, parse_options, print_pass, suggest
from moqc.passes.registry import find_pass

FRONT_END: tuple[Key[Any], ...] = (SCHEMA, PARAMS)
"""Annotations a module has when it leaves the front end."""

_NAME = re.compile(r"\s*([A-Za-z][\w-]*)")
_OPTION = re.compile(rf"\s*(\w+)=({VALUE})(?=[\s}}])")


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Passes in the order they run. `parse` and `str` are inverses."""

    passes: tuple[Pass, ...]

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read ``a,b{x=1 y=2.5}``. Raises PipelineError for bad syntax, an unknown pass or a bad option."""
        return cls(tuple(_scan(text)))

    def __str__(self) -> str:
        return ",".join(print_pass(item) for item in self.passes)

    def describe(self) -> str:
        """One numbered line a pass: its text, what it reads and what it writes."""
        texts = [print_pass(item) for item in self.passes]
        width = max(map(len, texts), default=0)
        return "\n".join(
            f"{number:2d} {text:{width}}  {_names(item.required())} -> {_names(item.writes)}"
            for number, (text, item) in enumerate(zip(texts, self.passes, strict=True), start=1)
        )

    def check(self, available: Iterable[Key[Any] | str] = FRONT_END) -> None:
        """Refuse options that cannot be, and an order that cannot work.

        PipelineError when a pass reads an annotation that is neither `available` nor written before it.
        """
        present = {str(key) for key in available}
        for number, item in enumerate(self.passes, start=1):
            item.check()
            missing = [key for key in item.required() if key.name not in present]
            if missing:
                key = missing[0]
                raise PipelineError(
                    f"pass {number}, {item.name}, reads {key}, which nothing before it writes: "
                    f"put {key.writer} before it"
                )
            present |= {key.name for key in item.writes}

    def after(self, name: str) -> Pipeline:
        """The passes that follow the first one called `name`: what remains to be run from its dump."""
        return Pipeline(self.passes[self._index(name) + 1 :])

    def until(self, name: str) -> Pipeline:
        """The passes up to and including the first one called `name`."""
        return Pipeline(self.passes[: self._index(name) + 1])

    def run(
        self,
        mod: IRModule,
        ctx: PassContext,
        *,
        verify_each: bool = False,
        dump_dir: Path | None = None,
        print_after: tuple[str, ...] = (),
        time_passes: bool = False,
        stop_after: str | None = None,
        progress: Callable[[int, int, str], None] | None = None,
        report: Callable[[str], None] = logger.info,
    ) -> IRModule:
        """The module after all passes, or after the first one called `stop_after`.

        `verify_each` runs `moqc.ir.verify` on the input and after every pass. `dump_dir` receives the module
        after each pass as ``000_<pass>.py``; `report` is given the module after each pass named in
        `print_after`, and with `time_passes` a table of seconds. `progress` is called before each pass with
        its number from 1, the number of passes, and its text.

        Raises UserError as the pass raised it, and PassError, naming a reproducer, for any other failure.
        """
        pipeline = self if stop_after is None else self.until(stop_after)
        for name in print_after:
            pipeline._index(name)
        pipeline.check(map(str, mod.attrs.keys()) if mod.attrs is not None else ())
        if verify_each:
            verify(mod)
        seconds = []
        for number, item in enumerate(pipeline.passes):
            if progress is not None:
                progress(number + 1, len(pipeline.passes), print_pass(item))
            start = time.perf_counter()
            mod = pipeline._step(number, mod, ctx, verify_each, dump_dir)
            seconds.append(time.perf_counter() - start)
            if dump_dir is not None:
                _write(dump_dir / f"{number:03d}_{item.name}.py", print_module(mod))
            if item.name in print_after:
                report(f"# after {print_pass(item)}\n{print_module(mod)}")
        if time_passes:
            report(_timing(pipeline.passes, seconds))
        return mod

    def to_tvm(self, ctx: PassContext) -> tvm.transform.Sequential:
        """The same passes as a TVM Sequential, for TVM's instruments (DumpIR, PassTimingInstrument)."""
        return tvm.transform.Sequential([_tvm_pass(item, ctx) for item in self.passes], name="moqc")

    def _index(self, name: str) -> int:
        names = [item.name for item in self.passes]
        if name not in names:
            there = ", ".join(names) or "no pass"
            raise PipelineError(f"the pipeline has no pass {name!r}{suggest(name, names)}; it has {there}")
        return names.index(name)

    def _step(
        self, number: int, mod: IRModule, ctx: PassContext, verify_result: bool, dump_dir: Path | None
    ) -> IRModule:
        """Run one pass; a failure that is not the user's leaves a reproducer and becomes a PassError."""
        item = self.passes[number]
        try:
            result = item(mod, ctx)
            if verify_result:
                verify(result)
        except UserError:
            raise
        except Exception as error:  # any error of any pass, also of a plug-in, is re-raised with its context
            before = ", ".join(done.name for done in self.passes[:number]) or "no other pass"
            folder = _reproducer(mod, Pipeline(self.passes[number:]), dump_dir)
            reason = f"{type(error).__name__}: {str(error).strip()}"
            raise PassError(
                f"{item.name} failed after {before}: {reason}; "
                f"reproduce with: moqc opt {folder / 'before.py'} --pipeline @{folder / 'pipeline.txt'}"
            ) from error
        return result


def _scan(text: str) -> Iterator[Pass]:
    """The passes of a pipeline text, one by one."""
    position = 0
    while text.strip():
        match = _NAME.match(text, position)
        if match is None:
            raise PipelineError(f"expected the name of a pass {_where(text, position)}")
        cls, position = find_pass(match[1]), match.end()
        options = []
        if text[position : position + 1] == "{":
            position += 1
            while (option := _OPTION.match(text, position)) is not None:
                options.append((option[1], option[2]))
                position = option.end()
            closing = re.compile(r"\s*\}").match(text, position)
            if closing is None:
                raise PipelineError(
                    f"{cls.name}: expected name=value, separated by spaces, or }} {_where(text, position)}"
                )
            position = closing.end()
        yield parse_options(cls, options)
        if not text[position:].strip():
            return
        if not (comma := re.compile(r"\s*,").match(text, position)):
            raise PipelineError(f"expected a comma between passes {_where(text, position)}")
        position = comma.end()


def _where(text: str, position: int) -> str:
    rest = text[position:].strip()
    return f"at {rest[:20]!r}" if rest else "at the end of the pipeline"


def _names(keys: Iterable[Key[Any]]) -> str:
    return ", ".join(key.name for key in keys) or "-"


def _timing(passes: Iterable[Pass], seconds: list[float]) -> str:
    lines = [f"{spent:9.3f} s  {print_pass(item)}" for spent, item in zip(seconds, passes, strict=True)]
    return "\n".join([*lines, f"{sum(seconds):9.3f} s  total"])


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror})") from error


def _reproducer(mod: IRModule, rest: Pipeline, dump_dir: Path | None) -> Path:
    """A new folder with the module before the failing pass and the pipeline from that pass on."""
    folder = (
        Path(tempfile.mkdtemp(prefix="moqc-reproducer-")) if dump_dir is None else dump_dir / "reproducer"
    )
    _write(folder / "before.py", print_module(mod))
    _write(folder / "pipeline.txt", f"{rest}\n")
    return folder


def _tvm_pass(item: Pass, ctx: PassContext) -> tvm.transform.Pass:
    def transform(mod: IRModule, _tvm_context: tvm.transform.PassContext) -> IRModule:
        return item(mod, ctx)

    return tvm.transform.module_pass(transform, opt_level=0, name=item.name)
