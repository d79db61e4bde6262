"""The one place that talks to the terminal while work is going on: a logger and progress bars on stderr.

Results (tables, JSON, generated text) go to stdout and are printed by `moqc.cli` alone. With `use_json`, each
line on stderr is a JSON object instead: what a program that watches a long compilation wants.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger("moqc")

T = TypeVar("T")

_LINE_SECONDS = 15.0
"""Between two lines on progress, where there is no terminal for a bar."""
_JSON_SECONDS = 1.0


def setup(*, verbose: bool = False) -> None:
    """Send moqc's log to stderr. Called once by the CLI; a library user configures `logging` instead."""
    logger.handlers[:] = [_handler()]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


def be_quiet() -> None:
    """Show no progress and no notes, only warnings."""
    logger.setLevel(logging.WARNING)


def use_json() -> None:
    """Write a JSON object a line from now on: `time`, `level`, `event`, `message`, fields of the event."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter())
    logger.handlers[:] = [handler]


def event(name: str, message: str, **fields: Any) -> None:
    """A note of something that programs may want to read: `fields` are in its JSON."""
    logger.info(message, extra={"event": name, "fields": fields})


class _JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "note"),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        return json.dumps(content, ensure_ascii=False)


def _handler() -> logging.Handler:
    """Colors on a terminal; one line a message in a file, where rich would wrap at 80 columns."""
    if not sys.stderr.isatty():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)-8s %(message)s"))
        return handler
    from rich.logging import RichHandler

    return RichHandler(console=_console(), show_path=False, show_time=False, markup=False)


@cache
def _console() -> Console:
    """One for messages and bars, so that neither writes over the other."""
    from rich.console import Console

    return Console(stderr=True)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items`, showing how far it is: a bar on a terminal, else a line now and then.

    `total` is needed only for iterables without a length. Nothing is shown where INFO is hidden.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not logger.isEnabledFor(logging.INFO):
        yield from items
    elif sys.stderr.isatty() and not _writes_json():
        yield from _bar(items, description, total)
    else:
        yield from _lines(items, description, total)


def _writes_json() -> bool:
    return any(isinstance(handler.formatter, _JsonFormatter) for handler in logger.handlers)


def _bar(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console(), transient=True) as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task)


def _lines(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    start = last = time.monotonic()
    wait = _JSON_SECONDS if _writes_json() else _LINE_SECONDS
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last < wait or done == total:
            continue
        last, spent = now, now - start
        left = None if total is None else round(spent / done * (total - done), 1)
        rest = "" if total is None else f" of {total}, {left:.0f} s left"
        fields = {"task": description, "done": done, "total": total, "seconds": round(spent, 1)}
        event("progress", f"{description}: {done}{rest}", **fields, seconds_left=left)
