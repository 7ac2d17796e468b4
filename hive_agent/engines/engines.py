"""The engines of a hive: built in, already importable, or in environments of their own."""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from hive_agent.engines.choice import Found, candidates, checked_version, missing, same_version
from hive_agent.engines.environments import Environment
from hive_agent.engines.install import Said
from hive_agent.engines.installations import Installations, set_aside, sweep
from hive_agent.engines.processes import end_leftovers
from hive_agent.engines.recipes import RECIPES, Kind, Recipe
from operations.errors import Conflict, Forbidden, NotFound, Unavailable
from operations.hosts import EngineInfo
from operations.operations import Engine

BUILT_IN = "llamacpp"
BUILT_IN_DISTRIBUTION = "xllamacpp"
UNKNOWN = "unknown"
"""The version of an importable engine that no distribution claims."""


@dataclass(frozen=True)
class Chosen:
    """The interpreter that runs an engine.

    :param python: its path, to be started as it stands: it is a link, and where the link lies
        tells Python its environment
    :param recipe: name of the recipe that made it, or that would have
    :param kind: the devices that it computes on
    :param env: variables that its processes need besides the agent's
    """

    python: str
    version: str
    recipe: str
    kind: Kind
    env: dict[str, str]


class Engines:
    """What is there and what is being installed. All methods belong to the agent's event loop."""

    def __init__(
        self,
        folder: Path,
        in_use: Callable[[], Iterable[tuple[str, str]]] = lambda: (),
        recipes: Sequence[Recipe] = RECIPES,
    ) -> None:
        """
        :param folder: where the environments go; belongs to this object alone
        :param in_use: the workers' ids, each with the path of its interpreter
        """
        self.folder = folder
        self._in_use = in_use
        self._recipes = recipes
        self._installations = Installations(self._check_unused)
        self._sweeping: asyncio.Task[None] | None = None
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def start(self) -> None:
        """End and remove what an earlier agent left unfinished."""
        await asyncio.to_thread(self._set_unfinished_aside)
        self._sweeping = asyncio.create_task(asyncio.to_thread(sweep, self.folder))

    async def close(self) -> None:
        """End the installations that run. Fine to call twice, and before the start."""
        await self._installations.close()
        if self._sweeping is not None:
            await asyncio.wait([self._sweeping])

    # -- looking -----------------------------------------------------------------------------

    async def all(self) -> list[EngineInfo]:
        """All engines; one that cannot be used says why, and what to do."""
        return [
            _built_in(),
            *(await asyncio.gather(*(self._info(found) for found in self._found()))),
        ]

    async def python_for(
        self, engine: Engine, version: str | None = None, kind: Kind | None = None
    ) -> Chosen:
        """The environment that runs an engine: what is importable, else the newest that is whole.

        :param kind: the devices that it must compute on
        :raises Unavailable: ``engine_not_installed`` or ``engine_broken``, and the command that
            helps; while it is being installed, it may be asked again
        """
        found = self._found()
        fitting = candidates(found, engine, version, kind)
        for one in fitting:
            if not one.installing and await self._problem(one) is None:
                return _chosen(one)
        if broken := next((one for one in fitting if not one.installing), None):
            raise Unavailable(
                str(await self._problem(broken)), code="engine_broken", retryable=False
            )
        if fitting:
            raise Unavailable(
                f"{_named(fitting[0])} is being installed. Try again when it is ready: "
                "'hive engines ls' shows it.",
                code="engine_not_installed",
                retry_after=30,
            )
        raise missing(found, self._recipes, engine, version, kind)

    # -- changing ----------------------------------------------------------------------------

    def check(self, name: str, version: str | None) -> Recipe:
        """Check a request to install or remove; the recipe that it names.

        :raises NotFound: there is no such recipe; lists those there are
        :raises Forbidden: it is built in
        :raises InvalidRequest: no version
        """
        if version is not None:
            checked_version(version)
        for recipe in self._recipes:
            if recipe.name == name:
                return recipe
        if name == BUILT_IN:
            raise Forbidden(
                f"{BUILT_IN} is part of Hive: it is neither installed nor removed. "
                f"'pip install -U {BUILT_IN_DISTRIBUTION}' changes its version.",
                param="engine",
            )
        there = ", ".join(recipe.name for recipe in self._recipes)
        raise NotFound(
            f"There is no engine '{name}' to install. There are: {there}.",
            code="engine_not_found",
            param="engine",
        )

    async def install(self, name: str, version: str | None, said: Said) -> EngineInfo:
        """Install an engine, or wait with others until it is; one that is there and whole stays.

        Without a version, one that is importable is enough.

        :param version: the recipe's own where None
        :param said: told how far it is, a few lines a second at most
        :raises HiveError: why it could not be installed, and what to do
        """
        recipe = self.check(name, version)
        for found in self._importable():
            if found.recipe is recipe and (version is None or same_version(found.version, version)):
                said(f"{_named(found)} can be imported by {found.python} and is used as it is")
                return await self._info(found)
        wanted = checked_version(version or recipe.version)
        target = self._target(recipe, wanted)
        await self._installations.install(recipe, wanted, target, said)
        return await self._info(_installed(recipe, self._read_name(target)[1], target))

    async def delete(self, name: str, version: str | None) -> str:
        """Remove an engine's environment; its name and version.

        :raises HiveError: as :meth:`check_delete`
        """
        found = self.check_delete(name, version)
        folder = _folder(found)
        set_aside(folder)
        folder.with_name(f"{folder.name}.log").unlink(missing_ok=True)
        await asyncio.to_thread(sweep, self.folder)
        return _named(found)

    def check_delete(self, name: str, version: str | None) -> Found:
        """The environment that is meant, free to be removed.

        :raises NotFound: it is not installed
        :raises Conflict: a worker runs in it, it is being installed, or several are meant
        """
        found = self._meant(self.check(name, version), version)
        if found.installing:
            raise Conflict(
                f"{_named(found)} is being installed. Cancel that job first: 'hive jobs ls'.",
                code="engine_installing",
                param="engine",
            )
        self._check_unused(_folder(found))
        return found

    def _meant(self, recipe: Recipe, version: str | None) -> Found:
        found = [
            one
            for one in self._own()
            if one.recipe is recipe and (version is None or same_version(one.version, version))
        ]
        if len(found) > 1:
            versions = ", ".join(one.version for one in found)
            raise Conflict(
                f"There are several versions of {recipe.name} here: {versions}. Say which with "
                "--version.",
                code="ambiguous_engine",
                param="version",
            )
        if not found:
            wanted = f"{recipe.name} {version}" if version else recipe.name
            raise NotFound(
                f"{wanted} is not installed in an environment of its own here. "
                "'hive engines ls' shows what is.",
                code="engine_not_found",
                param="engine",
            )
        return found[0]

    # -- what there is -----------------------------------------------------------------------

    def _found(self) -> list[Found]:
        return [*self._importable(), *self._own()]

    def _importable(self) -> Iterator[Found]:
        """What the agent's own interpreter could import. Nothing is imported to find out."""
        importlib.invalidate_caches()
        for module in dict.fromkeys(recipe.module for recipe in self._recipes):
            spec = importlib.util.find_spec(module)
            if spec is None or spec.origin is None:  # a mere folder of that name has no origin
                continue
            recipes = [recipe for recipe in self._recipes if recipe.module == module]
            known = [(r, v) for r in recipes if (v := _version(r.distribution)) is not None]
            recipe, version = known[0] if known else (recipes[0], UNKNOWN)
            yield Found(recipe, version, "importable", sys.executable)

    def _own(self) -> list[Found]:
        """The environments, finished or being made."""
        found = []
        there = {Environment(path) for path in self.folder.iterdir() if path.is_dir()}
        making = self._installations.targets()
        for target in sorted(there.union(making), key=lambda one: one.folder):
            recipe, version = self._read_name(target)
            if recipe is not None and (target in making or target.finished):
                found.append(_installed(recipe, version, target, installing=target in making))
        return found

    def _target(self, recipe: Recipe, version: str) -> Environment:
        """Where a version is, is being installed, or will be."""
        for target in (*self._installations.targets(), *map(Environment, self.folder.iterdir())):
            found, there = self._read_name(target)
            if found is recipe and same_version(there, version):
                return target
        return Environment(self.folder / f"{recipe.name}-{version}")

    def _read_name(self, target: Environment) -> tuple[Recipe | None, str]:
        """The recipe and version of a folder; no recipe if it is none of ours."""
        name = target.folder.name
        for recipe in self._recipes:
            version = name.removeprefix(f"{recipe.name}-")
            if version != name:
                try:
                    return recipe, str(Version(version))
                except InvalidVersion:
                    continue
        return None, ""

    async def _info(self, found: Found) -> EngineInfo:
        problem = None if found.installing else await self._problem(found)
        manifest = Environment(_folder(found)).manifest() if found.source == "installed" else None
        return EngineInfo(
            engine=found.recipe.name,
            version=found.version,
            state="installing" if found.installing else "broken" if problem else "ready",
            source=found.source,
            path=found.python,
            size_bytes=manifest.size_bytes if manifest else None,
            problem=problem,
        )

    async def _problem(self, found: Found) -> str | None:
        if found.source != "installed":
            return None
        problem = await asyncio.to_thread(Environment(_folder(found)).problem)
        if problem is None:
            return None
        one = f"{found.recipe.name} --version {found.version}"
        return (
            f"{_named(found)} is broken: {problem}. Make it anew with 'hive engines install "
            f"{one}', or remove it with 'hive engines rm {one}'."
        )

    def _check_unused(self, folder: Path) -> None:
        """:raises Conflict: a worker runs in that environment"""
        if workers := [
            who for who, python in self._in_use() if Path(python).is_relative_to(folder)
        ]:
            raise Conflict(
                f"{folder.name} is in use by {', '.join(workers)}. Stop it first: "
                f"'hive workers rm {workers[0]}'.",
                code="engine_in_use",
                param="engine",
            )

    def _set_unfinished_aside(self) -> None:
        for path in self.folder.iterdir():
            target = Environment(path)
            if self._read_name(target)[0] and path.is_dir() and not target.finished:
                end_leftovers(path)
                set_aside(path)


def _installed(
    recipe: Recipe, version: str, target: Environment, *, installing: bool = False
) -> Found:
    return Found(recipe, version, "installed", str(target.python), installing)


def _folder(found: Found) -> Path:
    return Path(found.python).parent.parent


def _named(found: Found) -> str:
    return f"{found.recipe.name} {found.version}"


def _chosen(found: Found) -> Chosen:
    env = {}
    if found.source == "installed":  # engines run tools of their environment: ninja, for one
        tools = str(Path(found.python).parent)
        env["PATH"] = os.pathsep.join((tools, os.environ.get("PATH", os.defpath)))
    return Chosen(found.python, found.version, found.recipe.name, found.kind, env)


def _built_in() -> EngineInfo:
    version = _version(BUILT_IN_DISTRIBUTION)
    missing = (
        f"{BUILT_IN_DISTRIBUTION} is not installed. Run 'pip install {BUILT_IN_DISTRIBUTION}'."
    )
    return EngineInfo(
        engine=BUILT_IN,
        version=version or UNKNOWN,
        state="ready" if version else "broken",
        source="built in",
        path=sys.executable,
        problem=None if version else missing,
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
