"""The ``hive`` command as a user runs it: in a pipe, or on a terminal of 80 columns."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tests.cluster import clean_env, hive_command, until

COLUMNS = 80
ROWS = 50
PATIENCE_S = 30.0

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][A-Z0-9]|\r")

# What a shell does for its child: makes the terminal its controlling one, so that Ctrl-C arrives.
_ADOPT = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    " os.execvp(sys.argv[1], sys.argv[1:])"
)


@dataclass(frozen=True)
class Ran:
    """What became of a command in a pipe."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        """The error that ``--json`` printed."""
        return json.loads(self.err)["error"]


async def hive(
    *arguments: str,
    url: str | None = None,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
) -> Ran:
    """Run ``hive`` in a pipe to its end. ``url`` becomes ``HIVE_QUEEN_URL``."""
    process = await start(*arguments, url=url, env=env)
    async with asyncio.timeout(PATIENCE_S):
        out, err = await process.communicate(stdin)
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


async def start(
    *arguments: str, url: str | None = None, env: Mapping[str, str] | None = None
) -> asyncio.subprocess.Process:
    """Start ``hive`` in a pipe, in a process group of its own."""
    return await asyncio.create_subprocess_exec(
        *hive_command(),
        *arguments,
        env=environment(url, env),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        process_group=0,
    )


def environment(url: str | None, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """A clean environment in which ``hive`` finds this daemon, or else none."""
    named = {"HIVE_QUEEN_URL": url or "http://127.0.0.1:9"}
    return {**clean_env(), "TERM": "xterm", **named, **(env or {})}


class Terminal:
    """A command on a terminal of 80 columns; ends with the block."""

    def __init__(self, arguments: tuple[str, ...], env: Mapping[str, str]) -> None:
        self._arguments = arguments
        self._env = env
        self._raw = bytearray()
        self._process: asyncio.subprocess.Process | None = None
        self._master = -1

    async def __aenter__(self) -> Self:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        os.set_blocking(self._master, False)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _ADOPT, *hive_command(), *self._arguments),
                env=self._env,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                start_new_session=True,
            )
        finally:
            os.close(slave)
        asyncio.get_running_loop().add_reader(self._master, self._read)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
        self._stop_reading()
        os.close(self._master)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def raw(self) -> str:
        """Everything that came, escape sequences too."""
        return bytes(self._raw).decode("utf-8", "replace")

    @property
    def text(self) -> str:
        """Everything that came, without escape sequences."""
        return _ESCAPES.sub("", self.raw)

    @property
    def words(self) -> str:
        """The text on one line, as if the terminal were endlessly wide."""
        return " ".join(self.text.split())

    async def shows(self, text: str) -> None:
        """Wait until this has appeared."""
        await until(lambda: text in self.words, f"{text!r} on the terminal", within_s=PATIENCE_S)

    def types(self, keys: str) -> None:
        """``\\r`` is Enter, ``\\x03`` Ctrl-C, ``\\x04`` Ctrl-D."""
        os.write(self._master, keys.encode())

    async def ends(self) -> int:
        """Wait for the end of the command; its exit code."""
        assert self._process is not None
        async with asyncio.timeout(PATIENCE_S):
            code = await self._process.wait()
        self._read()
        return code

    def _read(self) -> None:
        while True:
            try:
                chunk = os.read(self._master, 65536)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.EIO:  # EIO: the other side has closed
                    raise
                chunk = b""
            if not chunk:
                self._stop_reading()
                return
            self._raw += chunk

    def _stop_reading(self) -> None:
        asyncio.get_running_loop().remove_reader(self._master)


@contextlib.asynccontextmanager
async def terminal(
    *arguments: str, url: str | None = None, env: Mapping[str, str] | None = None
) -> AsyncIterator[Terminal]:
    """``hive`` on a terminal."""
    async with Terminal(arguments, environment(url, env)) as shown:
        yield shown
