"""The processes of an installation: run, read, and ended whatever became of their agent."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from hive_agent.processes import signal_group, without_secrets

log = logging.getLogger(__name__)

INSTALLING = "HIVE_ENGINE_FOLDER"
"""Stands in the environment of every process of an installation and names its folder, so that a
later agent knows what an earlier one left running."""

ROUNDS = 10

_ELSEWHERE = {
    *("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_PYTHON", "PIP_DRY_RUN"),
    *("PIP_REQUIREMENT", "PIP_EDITABLE", "PIP_QUIET", "PIP_VERBOSE"),
    *("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "PYTHONSAFEPATH", "VIRTUAL_ENV"),
}
"""What would send packages elsewhere, add to them, or change what is printed."""


def environment(agents: Mapping[str, str], folder: Path, temporary: Path) -> dict[str, str]:
    """The variables of a process of an installation: the agent's, without its secrets.

    The user's own settings of pip (index, certificates, proxies) are among them.

    :param folder: the environment that is being made
    :param temporary: where downloads and builds go
    """
    kept = {k: v for k, v in without_secrets(agents).items() if k not in _ELSEWHERE}
    return {**kept, "TMPDIR": str(temporary), INSTALLING: str(folder)}


async def run(
    argv: Sequence[str], env: Mapping[str, str], log: Path, said: Callable[[str], None]
) -> int:
    """Run a command in a process group of its own; its exit status, negative for a signal.

    Both its outputs go to the end of ``log``, and line by line to ``said``. A caller that is
    cancelled takes the group with it.
    """
    with log.open("ab") as kept:
        kept.write(f"$ {' '.join(argv)}\n".encode())
        kept.flush()
        process = await asyncio.create_subprocess_exec(
            *argv,
            env=env,
            cwd=env["TMPDIR"],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        begun = ""
        try:
            while chunk := await process.stdout.read(65536):
                kept.write(chunk)
                kept.flush()
                *lines, begun = (begun + decoder.decode(chunk)).split("\n")
                for line in lines:
                    said(line.rstrip())
            if begun:
                said(begun.rstrip())
            return await process.wait()
        finally:
            signal_group(process.pid, signal.SIGKILL)  # stragglers, too: a build's compiler
            await process.wait()


def end_leftovers(folder: Path) -> None:
    """Kill every process that works on the environment in ``folder``; blocks until they are gone.

    One that cannot be killed is left after a while, with a warning.
    """
    for _ in range(ROUNDS):  # more than one, for a process may have started another
        found = working_on(folder)
        if not found:
            return
        for process in found:
            log.warning("process %d works on %s, unfinished; it is ended", process.pid, folder)
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=1.0)
    log.warning("a process that works on %s could not be ended", folder)


def working_on(folder: Path) -> list[psutil.Process]:
    """The processes of the installation into ``folder``, whoever started them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(INSTALLING) == str(folder):
                found.append(process)
    return found
