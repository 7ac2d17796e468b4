"""A process of a test's own, and the lines that it says."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator

from tests.cluster import clean_env


class Told:
    """What a process has said so far: its whole lines, as words."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[list[str]] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            if line.endswith(b"\n"):
                self.lines.append(line.decode().split())

    def said(self, word: str) -> list[str]:
        """The rest of each line that begins with a word."""
        return [" ".join(rest) for first, *rest in self.lines if first == word]

    async def end(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Signal it, and wait until it has ended and all is read. Fine to call twice."""
        if self.process.returncode is None:
            self.process.send_signal(how)
        await self.process.wait()
        await self._reading


@contextlib.asynccontextmanager
async def told(module: str, *words: object, **env: str) -> AsyncIterator[Told]:
    """``python -m module words…``, killed in the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *map(str, words)),
        env={**clean_env(), **env},
        stdout=subprocess.PIPE,
        limit=1 << 20,
    )
    one = Told(process)
    try:
        yield one
    finally:
        await one.end()
