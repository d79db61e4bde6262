"""The one place that talks to the terminal while work is going on: a logger and progress bars on stderr.

Results (tables, JSON, generated text) go to stdout and are printed by `moqc.cli` alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

logger = logging.getLogger("moqc")

T = TypeVar("T")


def setup(*, quiet: bool = False, verbose: bool = False) -> None:
    """Send moqc's log to stderr. Called once by the CLI; a library user configures `logging` instead."""
    from rich.console import Console
    from rich.logging import RichHandler

    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False, markup=False)
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` behind a progress bar; plain iteration when the log level hides INFO.

    `total` is needed only for iterables without a length.
    """
    if not logger.isEnabledFor(logging.INFO):
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
