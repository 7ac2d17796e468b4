"""A job's progress lines: live in a terminal, plain lines in a pipe, always on stderr."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from keeper.output import Output
from keeper.words import printable
from operations.events import Line, parse_line

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress, TaskID

_DOWNLOAD = re.compile(r"(?P<file>\S.*?) (?P<percent>\d{1,3}) % \((?P<detail>[^()]*)\)")


@dataclass(frozen=True)
class Download:
    """How far one file is. ``detail`` is for reading: sizes, speed, time left."""

    file: str
    percent: int
    detail: str


def parse_download(text: str) -> Download | None:
    """``x.gguf 45 % (287.3 of 639.4 MB, 21.4 MB/s, 16 s left)``; None for any other line."""
    match = _DOWNLOAD.fullmatch(text)
    if match is None:
        return None
    return Download(match["file"], min(int(match["percent"]), 100), match["detail"])


class Narrator:
    """Shows what a job says on the way. In a terminal a file that comes down is one bar.

    A context manager: the bars are left standing when it ends.

    :param passing: what is said matters only while one waits: in a terminal it is wiped away at
        the end, in a pipe only warnings are written
    """

    def __init__(self, out: Output, *, passing: bool = False) -> None:
        self._out = out
        self._passing = passing
        self._live: Live | None = None
        self._files: Progress | None = None
        self._clock: Progress | None = None
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to show that something runs. Fine to call twice; a pipe is shown nothing."""
        if self._out.rich_err and self._live is None:
            self._start()

    def stop(self) -> None:
        """Let the bars stand as they are. Fine to call twice, and before anything was shown."""
        live, self._live = self._live, None
        if live is not None and self._clock is not None:
            self._clock.remove_task(self._clock.task_ids[0])
            live.stop()

    def take(self, line: str) -> None:
        """One line of the job; what is no progress is not shown."""
        event = parse_line(line)
        if not isinstance(event, Line) or event.terminal or not event.text:
            return
        warns = event.type == "warn"
        if not self._out.rich_err:
            if warns or not self._passing:
                self._out.note(("warning: " if warns else "") + event.text)
            return
        self.start()
        download = parse_download(event.text)
        if download is not None:
            self._bar(download)
        elif warns or not self._passing:
            self._out.note(event.text, style="yellow" if warns else "dim")
        elif self._clock is not None:
            self._clock.update(self._clock.task_ids[0], description=printable(event.text))

    def _bar(self, download: Download) -> None:
        assert self._files is not None
        name, detail = printable(download.file), printable(download.detail)
        if name not in self._bars:
            self._bars[name] = self._files.add_task(name, total=100, detail="")
        self._files.update(self._bars[name], completed=download.percent, detail=detail)

    def _start(self) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.table import Column

        console = self._out.err_console
        name = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self._files = Progress(
            TextColumn("{task.description}", markup=False, table_column=name),
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn(
                "{task.fields[detail]}",
                style="dim",
                markup=False,
                table_column=Column(no_wrap=True),
            ),
            console=console,
            expand=True,
        )
        self._clock = Progress(
            SpinnerColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", style="dim", markup=False),
            console=console,
        )
        self._clock.add_task("")
        self._live = Live(
            Group(self._files, self._clock),
            console=console,
            transient=self._passing,
            refresh_per_second=8,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()
