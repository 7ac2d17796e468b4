"""Where a command's words go: results to stdout, everything said beside them to stderr.

A terminal gets tables and colours, a pipe plain aligned text, ``--json`` one JSON document (and
streams one line of JSON an event). ``NO_COLOR`` is honoured. What daemons, drones and callers have
said is shown with its control characters escaped (:func:`keeper.words.printable`), in a pipe too:
it may end in a terminal all the same. Only a model's answer leaves a pipe as the model gave it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from keeper import exits
from keeper.words import printable, printable_json, printable_line

if TYPE_CHECKING:
    from rich.console import Console

    from operations.errors import HiveError

GAP = 2  # between columns
NARROWEST_TEXT = 12

STATE_STYLES = {
    "ready": "green",
    "online": "green",
    "completed": "green",
    "free": "green",
    "holds": "green",
    "yes": "green",
    "open": "green",
    "active": "green",
    "approved": "green",
    "running": "cyan",
    "assigned": "cyan",
    "in_progress": "cyan",
    "starting": "cyan",
    "installing": "cyan",
    "queued": "cyan",
    "idle": "cyan",
    "restarting": "yellow",
    "review_pending": "yellow",
    "rework_needed": "yellow",
    "escalated": "yellow",
    "paused": "yellow",
    "offline": "yellow",
    "stopping": "yellow",
    "suspect": "yellow",
    "cancelled": "yellow",
    "failed": "red",
    "rejected": "red",
    "error": "red",
    "broken": "red",
    "gone": "red",
    "revoked": "red",
    "no": "red",
    "expired": "yellow",
}


@dataclass(frozen=True)
class Column:
    """One column of a table.

    ``id``: what a user copies, never cut and broken only if the terminal is too narrow;
    ``text`` may be broken over lines; ``number`` stands to the right; ``state`` has a colour.
    A terminal is spared columns without any value, and with ``if_differs`` those whose values are
    all the same.
    """

    title: str
    kind: Literal["id", "text", "number", "state"] = "text"
    if_differs: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells, and what to say when there are none."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    empty: str


@dataclass(frozen=True)
class Fields:
    """Names and values, shown one pair a line; pairs without a value are left out.

    Further lines of a value stand below its first, where no name can.

    ``width``: the names take at least so many characters, so that what follows later aligns.
    """

    pairs: Sequence[tuple[str, str]]
    width: int = 0


class Output:
    """:param as_json: results leave as JSON, errors as the envelope, and little else is said"""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.rich_out = sys.stdout.isatty() and not as_json
        self.rich_err = sys.stderr.isatty()

    @cached_property
    def console(self) -> Console:
        from rich.console import Console

        return Console(highlight=False, markup=False, emoji=False)

    @cached_property
    def err_console(self) -> Console:
        from rich.console import Console

        return Console(stderr=True, highlight=False, markup=False, emoji=False)

    # -- results ---------------------------------------------------------------------------------

    def result(self, value: Any, shown: Table | Fields | str) -> None:
        """What a command found: ``value`` as JSON, or else as it is shown to people."""
        if self.as_json:
            self.document(value)
        elif isinstance(shown, Table):
            self.table(shown)
        elif isinstance(shown, Fields):
            self.fields(shown)
        else:
            self.say(shown)

    def document(self, value: Any) -> None:
        """One JSON document."""
        indent = 2 if sys.stdout.isatty() else None
        self.write(_json(value, indent) + "\n")

    def json_line(self, value: Any) -> None:
        """One line of a stream of JSON."""
        self.write(_json(value) + "\n")

    def say(self, text: str, style: str = "", *, block: bool = False) -> None:
        """A result in words.

        :param block: it may have several lines
        """
        shown = printable(text, block=block)
        if self.rich_out:
            self.console.print(shown, style=style or None)
        else:
            self.write(shown + "\n")

    def line(self, text: str) -> None:
        """One line as it stands elsewhere, in a log: a terminal does not break it at words."""
        self.write(printable_line(text) + "\n")

    def write(self, text: str) -> None:
        """Text at once, in a pipe as it is: a model's answer, or what is printable already."""
        sys.stdout.write(printable(text, block=True) if self.rich_out else text)
        sys.stdout.flush()

    def table(self, table: Table) -> None:
        if not table.rows:
            self.note(table.empty)
            return
        table = replace(table, rows=[[printable(cell) for cell in row] for row in table.rows])
        if self.rich_out:
            self._rich_table(table)
        else:
            self.write("".join(f"{line}\n" for line in aligned(table)))

    def fields(self, fields: Fields) -> None:
        kept = [(name, value) for name, value in fields.pairs if value]
        width = max((len(name) for name, _ in kept), default=0)
        width = max(width, fields.width)
        below = "\n" + " " * (width + 2)
        for name, value in kept:
            shown = printable(value.strip("\r\n"), block=True).replace("\n", below)
            if self.rich_out:
                self.console.print(f"{name:<{width}}  ", style="dim", end="")
                self.console.print(shown, style=STATE_STYLES.get(value), soft_wrap=True)
            else:
                self.write(f"{name:<{width}}  {shown}\n")

    # -- beside the results ----------------------------------------------------------------------

    def note(self, text: str, style: str = "dim") -> None:
        """A word to the person at the terminal; scripts that asked for JSON are spared."""
        if self.rich_err:
            self.err_console.print(printable(text), style=style)
        elif not self.as_json:
            print(printable(text), file=sys.stderr, flush=True)

    def hint(self, text: str) -> None:
        """What to do next, for a person at a terminal only."""
        if self.rich_out and self.rich_err:
            self.note(text)

    def aside(self, text: str) -> None:
        """A piece of a stream beside the results, dim, without a line break."""
        shown = printable(text, block=True)
        if self.rich_err:
            self.err_console.print(shown, style="dim", end="", soft_wrap=True)
        else:
            print(shown, end="", file=sys.stderr, flush=True)

    def error(self, error: HiveError) -> None:
        """One line: what went wrong, what to do, and who said so."""
        if self.as_json:
            print(_json(exits.as_json(error)), file=sys.stderr, flush=True)
            return
        cancelled = exits.exit_for(error) is exits.Exit.CANCELLED
        label = "" if cancelled else "error: "
        message = printable(error.message, block=True)  # a daemon's last lines may be in it
        source = printable(exits.where(error))
        if not self.rich_err:
            tail = f" ({source})" if source else ""
            print(f"{label}{message}{tail}", file=sys.stderr, flush=True)
            return
        from rich.text import Text

        line = Text()
        line.append(label, style="bold red")
        line.append(message, style="yellow" if cancelled else "red")
        if source:
            line.append(f" ({source})", style="dim")
        self.err_console.print(line)

    def _rich_table(self, table: Table) -> None:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        shown = RichTable(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            show_edge=False,
            padding=(0, 1, 0, 0),
            header_style="bold",
        )
        kept = [place for place in range(len(table.columns)) if worth_showing(table, place)]
        breakable = {"text"} if fits(table, kept, self.console.width) else {"text", "id"}
        for place in kept:
            column = table.columns[place]
            shown.add_column(
                column.title,
                justify="right" if column.kind == "number" else "left",
                no_wrap=column.kind not in breakable,
                overflow="fold",
            )
        for row in table.rows:
            shown.add_row(
                *(
                    Text(row[place], style=_style(table.columns[place], row[place]))
                    for place in kept
                )
            )
        self.console.print(shown)


def aligned(table: Table) -> list[str]:
    """A table as plain text: a heading and one line a row, columns two spaces apart."""
    lines = [[column.title for column in table.columns], *table.rows]
    lines = [[" ".join(cell.split()) or "-" for cell in line] for line in lines]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    numbers = [column.kind == "number" for column in table.columns]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in lines
    ]


def worth_showing(table: Table, place: int) -> bool:
    """Whether the column at ``place`` tells a person anything."""
    values = {row[place] for row in table.rows}
    return len(values) > 1 or (not table.columns[place].if_differs and values != {""})


def fits(table: Table, places: Sequence[int], width: int) -> bool:
    """Whether these columns fit ``width`` characters if only texts are broken over lines."""
    needed = GAP * (len(places) - 1)
    for place in places:
        column = table.columns[place]
        widest = max(len(cell) for cell in (column.title, *(row[place] for row in table.rows)))
        needed += min(widest, NARROWEST_TEXT) if column.kind == "text" else widest
    return needed <= width


def _json(value: Any, indent: int | None = None) -> str:
    return printable_json(json.dumps(value, ensure_ascii=False, indent=indent))


def _style(column: Column, cell: str) -> str:
    match column.kind:
        case "state":
            return STATE_STYLES.get(cell, "")
        case "id":
            return "cyan"
    return ""
