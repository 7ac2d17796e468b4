"""How an environment is made: Python's own venv, then pip, then the manifest."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hive_agent.engines import pip_output
from hive_agent.engines.environments import Environment, Manifest
from hive_agent.engines.pip_output import Building, Downloading, Failure, Installing
from hive_agent.engines.processes import environment, run
from hive_agent.engines.recipes import Recipe
from hive_agent.models.progress import Meter, describe, human_size
from hive_agent.models.storage import write_json

PYTHON = sys.version.split()[0]
LOOK_S = 0.5  # between two looks at how far pip is
LARGE_BYTES = 5 * 10**6  # what a download must have to be told of; an engine has 150 small ones
KEPT_LINES = 400

Said = Callable[[str], None]


def requirements(of: Distribution, recipe: Recipe) -> list[str]:
    """What a distribution requires on this machine, without what its recipe excludes.

    What the recipe installs first is left out, too: it has been decided there.
    """
    decided = {canonicalize_name(Requirement(text).name) for text in recipe.first}
    left_out = recipe.excluded | decided
    kept = []
    for text in of.requires or ():
        wanted = Requirement(text)
        applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if applies and canonicalize_name(wanted.name) not in left_out:
            wanted.marker = None
            kept.append(str(wanted))
    return kept


@dataclass
class Installer:
    """Makes one environment.

    :param log: all that venv and pip print
    :param said: told how far it is, a few lines a second at most
    """

    recipe: Recipe
    version: str
    target: Environment
    log: Path
    said: Said
    _tail: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))

    @property
    def what(self) -> str:
        return f"{self.recipe.name} {self.version}"

    async def install(self) -> Manifest:
        """Make it; what stood in its folder before must be gone.

        :raises HiveError: why it could not be made, and what to do
        :raises OSError: the folder cannot be written
        """
        self.log.unlink(missing_ok=True)
        self.target.temporary.mkdir(parents=True)
        self.said(f"Making an environment for {self.what} with Python {PYTHON}")
        await self._run((sys.executable, "-m", "venv", str(self.target.folder)))
        pinned = f"{self.recipe.distribution}=={self.version}"
        if self.recipe.first:
            self.said(f"Looking for {pinned}")  # before gigabytes are fetched for its sake
            await self._pip("--dry-run", "--no-deps", pinned)
            self.said(f"Installing {', '.join(self.recipe.first)} first")
            await self._pip(*self.recipe.first)
        self.said(f"Installing {pinned}")
        if self.recipe.excluded:
            await self._pip("--no-deps", pinned)
            if required := requirements(self._distribution(), self.recipe):
                self.said("Installing what it requires")
                await self._pip(*required)
        else:
            await self._pip(pinned)
        manifest = await asyncio.to_thread(self._finish)
        packages, size = len(manifest.distributions), human_size(manifest.size_bytes)
        self.said(f"{self.what} is installed: {packages} packages, {size}")
        return manifest

    def _distribution(self) -> Distribution:
        site = self.target.site_packages()
        return next(
            iter(distributions(name=self.recipe.distribution, path=[str(site)] if site else []))
        )

    def _finish(self) -> Manifest:
        shutil.rmtree(self.target.temporary)
        found = self.target.distributions()
        found.pop("pip", None)
        name = canonicalize_name(self.recipe.distribution)
        manifest = Manifest(
            recipe=self.recipe.name,
            distribution=name,
            version=found[name],
            python=PYTHON,
            distributions=found,
            installed_at=time.time(),
            size_bytes=self.target.size_bytes(),
        )
        write_json(self.target.manifest_path, manifest.model_dump())
        return manifest

    async def _pip(self, *arguments: str) -> None:
        watch = _Watch(self.target, self.said)
        watching = asyncio.create_task(watch.watch())
        try:
            await self._run(
                (
                    *(str(self.target.python), "-I", "-u", "-m", "pip", "--no-input"),
                    *("--disable-pip-version-check", "--no-color", "install"),
                    *("--progress-bar=off", "--compile", *arguments),
                ),
                watch.heard,
            )
            watch.finish()
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    async def _run(self, argv: Sequence[str], heard: Said = lambda line: None) -> None:
        """:raises HiveError: the command failed"""
        self._tail.clear()

        def said(line: str) -> None:
            self._tail.append(line)
            heard(line)

        env = environment(os.environ, self.target.folder, self.target.temporary)
        status = await run(argv, env, self.log, said)
        if status:
            raise pip_output.explain(
                Failure(
                    self.what,
                    self.recipe.distribution,
                    list(self._tail),
                    status,
                    PYTHON,
                    str(self.log),
                )
            )


class _Watch:
    """Tells how far pip is: from its lines what it does, from the disk how much of that is done."""

    def __init__(self, target: Environment, said: Said) -> None:
        self._target = target
        self._said = said
        self._step: Download | Unpacking | None = None

    def heard(self, line: str) -> None:
        step = pip_output.parse(line)
        if step is None:
            return
        if self._step is not None:
            self._step.finish()
            self._step = None
        match step:
            case Downloading():
                if step.size_bytes >= LARGE_BYTES:
                    self._step = Download(step, self._target.temporary, self._said)
            case Building():
                self._said(f"building {step.name}")
            case Installing():
                self._step = Unpacking(step.packages, self._target, self._said)

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if self._step is not None:
                self._step.look()

    def finish(self) -> None:
        if self._step is not None:
            self._step.finish()


class Download:
    """A file that comes in. One that is there before the first look is not told of."""

    def __init__(self, step: Downloading, temporary: Path, said: Said) -> None:
        self._step = step
        self._temporary = temporary
        self._said = said
        self._meter: Meter | None = None
        self._seen = 0  # bytes

    def look(self) -> None:
        size = _coming_in(self._temporary, self._step.file)
        if size is None:
            return
        if self._meter is None:
            self._meter = Meter(
                "-".join(self._step.file.split("-")[:2]),
                self._step.size_bytes,
                lambda progress: self._said(describe(progress)),
            )
            self._meter.found(size)
        else:
            self._meter.fetched(size - self._seen)
        self._seen = size

    def finish(self) -> None:
        if self._meter is not None:
            self._meter.finish()


class Unpacking:
    """Packages that are unpacked and compiled."""

    def __init__(self, packages: int, target: Environment, said: Said) -> None:
        self._packages = packages
        self._target = target
        self._said = said
        self._before = len(target.distributions())
        self._seen = 0
        self._tell(0)

    def look(self) -> None:
        there = len(self._target.distributions()) - self._before
        if self._seen < there < self._packages:
            self._seen = there
            self._tell(there)

    def finish(self) -> None:
        self._tell(self._packages)

    def _tell(self, there: int) -> None:
        percent = 100 * there // self._packages
        counted = f"{there} of {self._packages}"
        self._said(f"unpacking packages {percent} % ({counted})")


def _coming_in(temporary: Path, file: str) -> int | None:
    """How much of a file is there; pip puts it into a ``pip-unpack-*`` folder of its own."""
    for path in temporary.glob(f"pip-*/{glob.escape(file)}"):
        with contextlib.suppress(OSError):
            return path.stat().st_size
    return None
