"""Showing things: tables and bars on a terminal, plain columns in a pipe, documents with `--json`."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from conpaas.core import units
from conpaas.core.errors import ConpaasError
from conpaas.core.messages.base import Message
from conpaas.core.messages.model import OperationView

Column: TypeAlias = tuple[str, Callable[[Any], str]]
"""A heading, and how to say its cell of a row's message."""

_STYLES = {
    "RUNNING": "green",
    "SERVING": "green",
    "DONE": "green",
    "active": "green",
    "PROLOGUE": "yellow",
    "ADAPTING": "yellow",
    "EPILOGUE": "yellow",
    "BOOTING": "yellow",
    "CONFIGURING": "yellow",
    "DRAINING": "yellow",
    "ERROR": "red",
    "FAILED": "red",
    "DEGRADED": "red",
    "LOST": "red",
}


class Output:
    """Where answers go. With `as_json` standard output holds documents and nothing else."""

    def __init__(self) -> None:
        self.as_json = False

    def show(self, answer: Message | Sequence[Message], columns: Sequence[Column], *, empty: str = "") -> None:
        """Show one message, or a table of several."""
        if self.as_json:
            self.document(document(answer))
            return
        rows = [answer] if isinstance(answer, Message) else list(answer)
        if rows:
            table([heading for heading, _ in columns], [[cell(row) for _, cell in columns] for row in rows])
        elif empty:
            self.say(empty)

    def document(self, value: Any) -> None:
        """Print a JSON document."""
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))

    def done(self, answer: Message, text: str) -> None:
        """Print the document of `answer`, or `text` for people."""
        if self.as_json:
            self.document(document(answer))
        else:
            click.echo(text)

    def say(self, text: str) -> None:
        """Print a line for people; programs do not get it."""
        if not self.as_json:
            click.echo(text)

    def note(self, text: str) -> None:
        """Print a line beside the answer, to standard error."""
        click.echo(text, err=True)

    def error(self, exc: ConpaasError) -> None:
        """Print what failed and what to do next, to standard error."""
        if self.as_json:
            click.echo(json.dumps(exc.problem(), ensure_ascii=False), err=True)
            return
        click.echo(f"{click.style('error:', fg='red', bold=True)} {exc.message}", err=True)
        if exc.hint:
            click.echo(f"{click.style('hint:', fg='cyan')} {exc.hint}", err=True)

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Callable[[OperationView], None]]:
        """Give what shows an operation's progress on standard error: a bar, or a line for each change."""
        if not sys.stderr.isatty():
            yield _Lines(title)
            return
        with _bar(TextColumn("{task.fields[message]}", markup=False), TimeElapsedColumn()) as bar:
            task = bar.add_task(title, total=None, message="")
            yield lambda operation: _advance(bar, task, operation)

    @contextlib.contextmanager
    def transfer(self, title: str) -> Iterator[Callable[[int, int | None], None] | None]:
        """Give what shows how many bytes have gone; nothing without a terminal."""
        if not sys.stderr.isatty():
            yield None
            return
        with _bar(TextColumn("{task.fields[size]}", markup=False), TimeElapsedColumn()) as bar:
            task = bar.add_task(title, total=None, size="")
            yield lambda sent, total: bar.update(task, completed=sent, total=total, size=units.show_size(sent))


def document(answer: Message | Sequence[Message]) -> Any:
    """Return the JSON form of one or more messages; a secret in an answer is there to be shown, once."""
    if isinstance(answer, Message):
        return answer.model_dump(mode="json", context={"reveal": True})
    return [document(message) for message in answer]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: drawn on a terminal, else in columns without colour that programs can cut."""
    if not sys.stdout.isatty():
        click.echo("\n".join(plain_table(headings, rows)))
        return
    drawn = Table(*headings, header_style="bold", box=None, pad_edge=False)
    for row in rows:
        drawn.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    Console(file=sys.stdout).print(drawn)


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in columns, two spaces apart."""
    everything = [list(headings), *([" ".join(cell.split()) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in everything) for column in range(len(headings))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in everything
    ]


class _Lines:
    """Progress without a terminal: each message once."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._said = ""

    def __call__(self, operation: OperationView) -> None:
        if operation.message not in {"", self._said}:
            click.echo(f"{self._title}: {operation.message}", err=True)
        self._said = operation.message


def _bar(*more: Any) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *more)
    return Progress(*columns, console=Console(file=sys.stderr), transient=True)


def _advance(bar: Progress, task: TaskID, operation: OperationView) -> None:
    total = operation.total or None
    bar.update(task, completed=operation.done, total=total, message=operation.message)
