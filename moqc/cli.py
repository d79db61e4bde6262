"""The command line: `moqc COMMAND`.

Exit codes: 0 done, 1 moqc failed, 2 the input is wrong (one line says how), 130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

import moqc
from moqc import log
from moqc.commands import compare, compile, doctor, evaluate, inspect, lists, opt, run, verify
from moqc.errors import InternalError, MoqcError

app = typer.Typer(
    name="moqc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would double the time of --help
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: dict[str, Callable[..., None]] = {
    "compile": compile.command,
    "run": run.command,
    "eval": evaluate.command,
    "compare": compare.command,
    "inspect": inspect.command,
    "verify": verify.command,
    "opt": opt.command,
    "passes": lists.passes,
    "targets": lists.targets,
    "allocators": lists.allocators,
    "formats": lists.formats,
    "doctor": doctor.command,
}
for name, function in COMMANDS.items():
    app.command(name)(function)


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
    if verbose:
        log.setup(verbose=True)


def main() -> None:
    """Run the command line and exit. Errors become one line on stderr, unless they are bugs."""
    try:
        app()
    except InternalError as error:
        _report_bug(error)
    except MoqcError as error:
        typer.echo(f"error: {' '.join(str(error).splitlines())}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except Exception as error:  # the last resort of a process: say that it is our fault, and how to report it
        _report_bug(error)


def _report_bug(error: BaseException) -> None:
    traceback.print_exception(error)
    typer.echo(
        f"error: this is a bug in moqc {moqc.__version__}; please report it with the lines above "
        "and the output of `moqc doctor`",
        err=True,
    )
    sys.exit(1)
