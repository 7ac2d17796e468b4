"""Daemons as child processes.

A child stops when its standard input closes, so it never outlives the process that started it,
however that ends. It is in a process group of its own: Ctrl-C in the terminal reaches only the
starter, which stops its children in order.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from operations.errors import HiveError

READY_S = 60.0
LAST_LINES = 12
LINE_BYTES = 1024 * 1024

_LISTENS = re.compile(r"(queen|hive) (?P<id>\S+) listens on (?P<url>https?://\S+)")


class Child:
    """A queen or an agent that runs; see :func:`running`."""

    def __init__(
        self, name: str, process: Process, heard: Callable[[str, str], None], port_flag: str
    ) -> None:
        self.name = name
        self.process = process
        self.id = ""
        self.url = ""
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._heard = heard
        self._port_flag = port_flag
        self._listens = asyncio.Event()
        self._readers = [
            asyncio.create_task(self._read_stdout()),
            asyncio.create_task(self._read_stderr()),
        ]

    async def listening(self) -> None:
        """Wait until it listens; then ``id`` and ``url`` are set.

        :raises HiveError: it ended instead, or took too long
        """
        waits = [asyncio.ensure_future(self._listens.wait()), asyncio.ensure_future(self.ended())]
        done, pending = await asyncio.wait(
            waits, timeout=READY_S, return_when=asyncio.FIRST_COMPLETED
        )
        for wait in pending:
            wait.cancel()
        if not done:
            raise HiveError(
                f"The {self.name} did not start within {READY_S:.0f} s.{self._lines()}",
                code="cannot_start",
            )
        if not self._listens.is_set():
            raise HiveError(
                f"The {self.name} could not start: {self._last_words()}", code="cannot_start"
            )

    async def ended(self) -> int:
        """Wait for its end and for all that it said; its exit status."""
        code = await self.process.wait()
        await asyncio.wait(self._readers, timeout=1)
        return code

    def died(self) -> HiveError:
        """What to say when it has ended and nobody asked it to."""
        code = self.process.returncode
        how = f"status {code}" if code is None or code >= 0 else _signal_name(-code)
        return HiveError(f"The {self.name} ended ({how}).{self._lines()}", code="daemon_died")

    def stop(self) -> None:
        """Ask it to stop; asked twice, it stops at once. Fine after its end."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it without asking."""
        with suppress(ProcessLookupError):
            self.process.kill()

    async def close(self, patience_s: float | None) -> None:
        """Stop it and wait; kill it if it takes longer than ``patience_s``."""
        if self.process.returncode is None:
            self.stop()
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            async with asyncio.timeout(patience_s):
                await self.process.wait()
        except TimeoutError:
            self.kill()
            await self.process.wait()
        finally:
            for reader in self._readers:
                reader.cancel()

    async def _read_stdout(self) -> None:
        async for line in _lines(self.process.stdout):
            match = _LISTENS.match(line)
            if match and not self.url:
                self.id, self.url = match["id"], match["url"]
                self._listens.set()

    async def _read_stderr(self) -> None:
        async for line in _lines(self.process.stderr):
            self.last_lines.append(line)
            self._heard(self.name, line)

    def _last_words(self) -> str:
        for line in reversed(self.last_lines):
            if line.startswith("error: "):
                return line.removeprefix("error: ").replace(
                    "with --port", f"with {self._port_flag}"
                )
        return self._lines().strip() or "it said nothing."

    def _lines(self) -> str:
        lines = "".join(f"\n  {line}" for line in self.last_lines)
        return f" Its last lines:{lines}" if lines else " It said nothing."


@asynccontextmanager
async def running(
    name: str,
    arguments: Sequence[str],
    *,
    env: Mapping[str, str],
    heard: Callable[[str, str], None] = lambda name, line: None,
    port_flag: str = "--port",
    patience_s: float | None = None,
) -> AsyncIterator[Child]:
    """``hive <arguments>`` as a child that listens; it is stopped at the end.

    :param port_flag: how the starter's own flag for the child's port is called
    :param heard: gets the child's name and each line of its log
    :param patience_s: what it gets to stop in, seconds; None leaves it to its own deadline
    :raises HiveError: it could not start; the message holds its own words
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "keeper", *arguments, "--exit-with-parent"),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env={**env, "PYTHONSAFEPATH": "1"},
        process_group=0,
        limit=LINE_BYTES,
    )
    child = Child(name, process, heard, port_flag)
    try:
        await child.listening()
        yield child
    finally:
        await asyncio.shield(child.close(patience_s))


def environment(*, without_settings: bool = False) -> dict[str, str]:
    """This process's environment; ``without_settings`` less the ``HIVE_*`` variables."""
    return {
        name: value
        for name, value in os.environ.items()
        if not (without_settings and name.startswith("HIVE_"))
    }


async def _lines(stream: asyncio.StreamReader | None) -> AsyncIterator[str]:
    while stream is not None:
        try:
            line = await stream.readline()
        except ValueError:  # longer than anybody should log; dropped
            continue
        if not line:
            return
        yield line.decode("utf-8", "replace").rstrip("\n")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
