"""The installations that run: each engine version once, whoever asks for it.

An installation goes on while somebody waits for it. When the last one leaves it ends, and nothing
of it stays: neither a process nor an unfinished environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hive_agent.engines.environments import Environment
from hive_agent.engines.install import Installer, Said
from hive_agent.engines.processes import end_leftovers
from hive_agent.engines.recipes import Recipe
from hive_agent.models.progress import human_size
from operations.errors import HiveError, Unavailable, WontFit
from wire.log import outcome

log = logging.getLogger(__name__)

GONE = ".gone-"
"""Begins the name of a folder that is being deleted."""


@dataclass
class Installation:
    """One that runs, and who listens.

    :param ending: it has been cancelled and cleans up
    """

    recipe: Recipe
    version: str
    listeners: list[Said] = field(default_factory=list)
    said: str = ""
    ending: bool = False

    def tell(self, text: str) -> None:
        self.said = text
        for listener in self.listeners:
            listener(text)

    @contextlib.contextmanager
    def heard_by(self, said: Said) -> Iterator[None]:
        """Who comes later hears first where it stands."""
        if self.said:
            said(self.said)
        self.listeners.append(said)
        try:
            yield
        finally:
            self.listeners.remove(said)


class Installations:
    """What is being installed, by the folder that it goes to."""

    def __init__(self, check_unused: Callable[[Path], None]) -> None:
        """:param check_unused: raises a :class:`HiveError` while a worker runs in an environment"""
        self._check_unused = check_unused
        self._running: dict[Path, tuple[Installation, asyncio.Task[None]]] = {}

    def targets(self) -> list[Environment]:
        return [Environment(folder) for folder in self._running]

    async def install(self, recipe: Recipe, version: str, target: Environment, said: Said) -> None:
        """Make an environment, or wait with others until it is made; one that is whole stays.

        :param said: told how far it is
        :raises HiveError: why it could not be made, and what to do
        """
        while (known := self._running.get(target.folder)) and known[0].ending:
            said(f"Waiting for a cancelled installation of {recipe.name} {version} to clean up")
            await asyncio.wait([known[1]])
        running, task = known or self._begin(recipe, version, target)
        try:
            with running.heard_by(said):
                await asyncio.shield(task)
        finally:
            if not running.listeners and not task.done():
                await _end(running, task)

    async def close(self) -> None:
        """End all that run. Fine to call twice."""
        await asyncio.gather(*(_end(*running) for running in list(self._running.values())))

    def _begin(
        self, recipe: Recipe, version: str, target: Environment
    ) -> tuple[Installation, asyncio.Task[None]]:
        running = Installation(recipe, version)
        task = asyncio.create_task(self._own(running, target), name=f"install {target.folder.name}")
        self._running[target.folder] = running, task

        def done(task: asyncio.Task[None]) -> None:
            del self._running[target.folder]
            if not task.cancelled():
                task.exception()  # whoever waits is told; nobody may be waiting

        task.add_done_callback(done)
        return running, task

    async def _own(self, running: Installation, target: Environment) -> None:
        status = "failed"
        try:
            if await self._stands(running, target):
                status = "found"
                return
            check_room(running.recipe, target.folder.parent)
            log_path = target.folder.with_name(f"{target.folder.name}.log")
            try:
                await Installer(
                    running.recipe, running.version, target, log_path, running.tell
                ).install()
            except OSError as error:
                raise _unwritable(error, target.folder) from error
            status = "installed"
        except asyncio.CancelledError:
            status = "cancelled"
            raise
        finally:
            if not target.finished:
                await asyncio.shield(asyncio.to_thread(discard, target.folder))
            name, version = running.recipe.name, running.version
            outcome("engine", engine=name, version=version, status=status)

    async def _stands(self, running: Installation, target: Environment) -> bool:
        """Whether it is there and whole; what is there and is not, is removed.

        :raises HiveError: a worker runs in it
        """
        if target.finished:
            problem = await asyncio.to_thread(target.problem)
            if problem is None:
                return True
            self._check_unused(target.folder)
            running.tell(f"{running.recipe.name} {running.version} is broken ({problem}): anew")
        await asyncio.to_thread(discard, target.folder)
        return False


async def _end(running: Installation, task: asyncio.Task[None]) -> None:
    """Cancel it once, and wait until it has cleaned up."""
    if not running.ending:
        running.ending = True
        task.cancel()
    await asyncio.wait([task])


def check_room(recipe: Recipe, folder: Path) -> None:
    """:raises WontFit: the disk of ``folder`` has less free than an installation takes"""
    free = shutil.disk_usage(folder).free
    if free < recipe.needs_bytes:
        raise WontFit(
            f"{recipe.name} takes up to {human_size(recipe.needs_bytes)} of disk, and "
            f"{folder} has {human_size(free)} free. Free some space, or give the agent a "
            "--state-dir on a larger disk.",
            code="disk_full",
        )


def discard(folder: Path) -> None:
    """Remove an environment with whatever works on it. Blocks; fine if there is none.

    It is renamed first: if this is cut short, :func:`sweep` finishes it.
    """
    if not folder.exists():
        return
    end_leftovers(folder)
    try:
        shutil.rmtree(set_aside(folder), ignore_errors=True)
    except FileNotFoundError:  # somebody who was cancelled was at it, too
        pass
    except OSError as error:
        log.warning("%s cannot be removed: %s; the next install tries again", folder, error)


def set_aside(folder: Path) -> Path:
    """Rename an environment to what is deleted by the next :func:`sweep`; its new path."""
    return folder.rename(folder.with_name(f"{GONE}{folder.name}-{secrets.token_hex(4)}"))


def sweep(folder: Path) -> None:
    """Delete what was set aside."""
    for path in folder.glob(f"{GONE}*"):
        shutil.rmtree(path, ignore_errors=True)


def _unwritable(error: OSError, folder: Path) -> HiveError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WontFit(
            f"The disk of {folder} is full. Free some space, or give the agent a --state-dir on a "
            "larger disk, and install it again.",
            code="disk_full",
        )
    return Unavailable(
        f"The environment {folder} cannot be made: {error.strerror or error}. See that the agent "
        "may write there, or give it another --state-dir.",
        code="engine_install_failed",
        retryable=False,
    )
