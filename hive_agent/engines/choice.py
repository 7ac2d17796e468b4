"""Which of the engines that a hive has runs a worker. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from packaging.version import InvalidVersion, Version

from hive_agent.engines.recipes import Kind, Recipe
from operations.errors import HiveError, InvalidRequest, Unavailable
from operations.operations import Engine

DEVICES = {"cpu": "the CPU", "cuda": "NVIDIA GPUs"}


@dataclass(frozen=True)
class Found:
    """One engine that is there, whole or not.

    :param python: path of its interpreter
    """

    recipe: Recipe
    version: str
    source: Literal["importable", "installed"]
    python: str
    installing: bool = False

    @property
    def kind(self) -> Kind:
        """A build for CPUs says so in its local version (PEP 440), whatever it is called."""
        return "cpu" if self.version.endswith("+cpu") else self.recipe.kind


def candidates(
    found: Sequence[Found], engine: Engine, version: str | None, kind: Kind | None
) -> list[Found]:
    """Those that fit, the best first: what is importable, then the newest.

    :param version: only this one
    :param kind: only those that compute on such devices
    """
    fitting = [
        one
        for one in found
        if one.recipe.engine == engine
        and (version is None or same_version(one.version, version))
        and kind in (None, one.kind)
    ]
    return sorted(
        fitting, key=lambda one: (one.source == "importable", _order(one.version)), reverse=True
    )


def missing(
    found: Sequence[Found],
    recipes: Sequence[Recipe],
    engine: Engine,
    version: str | None,
    kind: Kind | None,
) -> HiveError:
    """The error for an engine of which nothing that fits is there."""
    providing = [recipe for recipe in recipes if recipe.engine == engine]
    recipe = next((one for one in providing if kind in (None, one.kind)), None)
    wanted = " ".join(part for part in (engine, version) if part)
    if kind:
        wanted += f" for {DEVICES[kind]}"
    others = [f"{one.recipe.name} {one.version}" for one in found if one.recipe.engine == engine]
    there = f" (it has {', '.join(others)})" if others else ""
    if recipe is None:
        cure = f"There is no recipe for it. Use an engine of: {', '.join(_names(recipes))}."
    else:
        exactly = f" --version {version}" if version else ""
        cure = f"Install it with 'hive engines install {recipe.name}{exactly}'."
    return Unavailable(
        f"This hive has no {wanted}{there}. {cure}", code="engine_not_installed", retryable=False
    )


def checked_version(version: str) -> str:
    """A version in its normal form (PEP 440).

    :raises InvalidRequest: it is none
    """
    try:
        return str(Version(version))
    except InvalidVersion:
        raise InvalidRequest(
            f"'{version}' is no version. Give one such as 0.33.0.", param="version"
        ) from None


def same_version(one: str, other: str) -> bool:
    """``0.33`` is ``0.33.0``; without a local part (``+cpu``) any will do."""
    try:
        a, b = Version(one), Version(other)
    except InvalidVersion:
        return one == other
    return a == b or (b.local is None and a.public == b.public)


def _order(version: str) -> Version:
    try:
        return Version(version)
    except InvalidVersion:
        return Version("0")


def _names(recipes: Sequence[Recipe]) -> list[str]:
    return sorted({recipe.engine for recipe in recipes})
