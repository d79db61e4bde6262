"""The command line: `moqc COMMAND`.

Exit codes: 0 done, 1 moqc failed, 2 the input is wrong (one line says how), 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

import moqc
from moqc import log
from moqc.commands import (
    bench,
    compare,
    compile,
    doctor,
    evaluate,
    export_onnx,
    inspect,
    lists,
    models,
    opt,
    plan,
    recipe,
    run,
    synth,
    tune,
    verify,
)
from moqc.errors import InternalError, MoqcError, UserError

INTERRUPTED = 130

app = typer.Typer(
    name="moqc",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would double the time of --help
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

# The base of typer's usage errors has no public name: newer versions bring a copy of click along.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "plan": (plan.command, "moqc plan qwen3-30b-a3b --size 12GiB --bandwidth 80"),
    "compile": (compile.command, "moqc compile examples/models/tiny-moe -o out/tiny --bits 2.5"),
    "recipe": (recipe.command, "moqc recipe > recipe.yaml"),
    "run": (run.command, 'moqc run out/tiny --prompt "Il était une" --max-tokens 64'),
    "eval": (
        evaluate.command,
        "moqc eval out/tiny --text examples/data/test.txt --reference examples/models/tiny-moe",
    ),
    "compare": (
        compare.command,
        "moqc compare examples/models/tiny-moe --text examples/data/test.txt --bits 2,2.5 "
        "--allocators uniform:rtn,global",
    ),
    "bench": (bench.command, "moqc bench out/tiny --prompt 128,512 --generate 64"),
    "bench-kernels": (
        bench.kernels,
        "moqc bench-kernels --shape qwen3-30b-a3b --bits 4,2,4/2 --tokens 1,32",
    ),
    "tune": (
        tune.command,
        "moqc tune --target native --shape olmoe-1b-7b --bits 4,2 --trials 8 -o records.json",
    ),
    "inspect": (inspect.command, "moqc inspect out/tiny"),
    "verify": (verify.command, "moqc verify out/tiny"),
    "synth": (synth.command, "moqc synth olmoe-1b-7b -o out/olmoe --packed --bits int2-g64:3,int4-g64:1"),
    "export-onnx": (export_onnx.command, "moqc export-onnx out/tiny -o out/tiny-onnx --uniform int4-g64-sym"),
    "opt": (
        opt.command,
        'moqc opt ir/005_allocate-bits.py --pipeline "allocate-bits{bits=2.2}"',
    ),
    "models": (models.command, "moqc models --verify mixtral"),
    "passes": (lists.passes, "moqc passes --json"),
    "targets": (lists.targets, "moqc targets --json"),
    "allocators": (lists.allocators, "moqc allocators --json"),
    "formats": (lists.formats, "moqc formats --json"),
    "doctor": (doctor.command, "moqc doctor --json"),
}
"""Name -> what it does, and an example for its help."""
for name, (function, example) in COMMANDS.items():
    app.command(name, epilog=f"Example: {example}")(function)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moqc {moqc.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more about what is done.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Ahead-of-time compiler for low-bit Mixture-of-Experts language models."""
    log.setup(verbose=verbose)


def main() -> None:
    """Run the command line and exit. Errors become one line on stderr, unless they are bugs."""
    with _noted_interrupts() as interrupts:
        try:
            code = app(standalone_mode=False) or 0
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception as error:
            # An interrupt inside of a call of TVM comes out as an error of TVM's, and so of a pass.
            code = INTERRUPTED if interrupts else _report(error)
        if code == INTERRUPTED:
            typer.echo("interrupted", err=True)
    sys.exit(code)


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Interrupts raise KeyboardInterrupt as ever, and are noted in the list."""
    noted: list[int] = []

    def note(number: int, _frame: FrameType | None) -> NoReturn:
        noted.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not where a shell made background jobs ignore it
        signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _report(error: Exception) -> int:
    """Say on stderr what went wrong; the exit code."""
    if isinstance(error, UsageError):
        return _report_usage(error)
    if isinstance(error, MoqcError) and not isinstance(error, InternalError):
        typer.echo(f"error: {' '.join(str(error).splitlines())}", err=True)
        return error.exit_code
    return _report_bug(error)


def _report_usage(error: Any) -> int:
    """One line for a wrong command line; the whole help for an empty one."""
    message = str(error.format_message()).strip()
    if "\n" in message:
        typer.echo(message, err=True)
    else:
        command = error.ctx.command_path if error.ctx else "moqc"
        typer.echo(f"error: {message.rstrip('.')}; see `{command} -h`", err=True)
    return UserError.exit_code


def _report_bug(error: Exception) -> int:
    """The last resort of a process: say that it is our fault, and how to report it."""
    traceback.print_exception(error)
    typer.echo(
        f"error: this is a bug in moqc {moqc.__version__}; please report it with the lines above "
        "and the output of `moqc doctor`",
        err=True,
    )
    return 1
