"""The one place that talks to the terminal while work is going on: a logger and progress bars on stderr.

Results (tables, JSON, generated text) go to stdout and are printed by `moqc.cli` alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

logger = logging.getLogger("moqc")

T = TypeVar("T")


def setup(*, verbose: bool = False) -> None:
    """Send moqc's log to stderr. Called once by the CLI; a library user configures `logging` instead."""
    logger.handlers[:] = [_handler()]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


def be_quiet() -> None:
    """Show no progress and no notes, only warnings."""
    logger.setLevel(logging.WARNING)


def _handler() -> logging.Handler:
    """Colors on a terminal; one line a message in a file, where rich would wrap at 80 columns."""
    if not sys.stderr.isatty():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)-8s %(message)s"))
        return handler
    from rich.console import Console
    from rich.logging import RichHandler

    return RichHandler(console=Console(stderr=True), show_path=False, show_time=False, markup=False)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` behind a progress bar; plainly where there is no terminal or INFO is hidden.

    `total` is needed only for iterables without a length.
    """
    if not (logger.isEnabledFor(logging.INFO) and sys.stderr.isatty()):
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task)
