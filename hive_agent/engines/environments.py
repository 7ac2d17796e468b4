"""One environment on disk: its manifest, and whether it is still as it was installed.

A folder ``<recipe>-<version>`` is a virtual environment. It is built where it stays, for scripts
in it name its path. The manifest is written last: a folder without one was never finished.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name
from pydantic import BaseModel, ConfigDict, ValidationError

MANIFEST = "hive-engine.json"
TEMPORARY = "tmp"
"""Where pip keeps what it downloads and builds, inside the environment until it is whole."""

PYTHON_S = 20.0  # what an interpreter gets to say its version
_DIST_INFO = re.compile(r"(?P<name>[^-]+)-(?P<version>[^-]+)\.dist-info")


class Manifest(BaseModel):
    """What an environment consists of.

    :param distribution: the engine's own, by its normalised name
    :param python: full version of its interpreter
    :param distributions: normalised names and versions of all that pip installed
    :param installed_at: seconds since the epoch
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    recipe: str
    distribution: str
    version: str
    python: str
    distributions: dict[str, str]
    installed_at: float
    size_bytes: int


@dataclass(frozen=True)
class Environment:
    """Where one version of one engine lives, or will."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def manifest_path(self) -> Path:
        return self.folder / MANIFEST

    @property
    def temporary(self) -> Path:
        return self.folder / TEMPORARY

    @property
    def finished(self) -> bool:
        """Whether it was installed to the end; it may have been damaged since."""
        return self.manifest_path.exists()

    def manifest(self) -> Manifest | None:
        """None where it cannot be read."""
        try:
            return Manifest.model_validate_json(self.manifest_path.read_bytes())
        except (OSError, ValidationError):
            return None

    def site_packages(self) -> Path | None:
        """None where there is none."""
        try:
            return next(iter(sorted(self.folder.glob("lib/python3.*/site-packages"))), None)
        except OSError:  # it vanished meanwhile
            return None

    def distributions(self) -> dict[str, str]:
        """Normalised names and versions of what is installed, as the names of folders tell."""
        return dict(_installed(_names_in(self.site_packages())))

    def size_bytes(self) -> int:
        """What its files take together."""
        return _size(self.folder)

    def problem(self) -> str | None:
        """Why it cannot be used; None where it is whole. Blocks for some tenths of a second.

        The versions of all its distributions are compared with the manifest, and the files of the
        engine's own with the sizes in its RECORD.
        """
        manifest = self.manifest()
        if manifest is None:
            return f"its manifest {MANIFEST} cannot be read"
        if problem := self._interpreter_problem(manifest):
            return problem
        return difference(manifest.distributions, self.distributions()) or self._damage(manifest)

    def _interpreter_problem(self, manifest: Manifest) -> str | None:
        try:
            told = subprocess.run(
                (self.python, "-I", "-S", "-c", "import sys; print(sys.version.split()[0])"),
                capture_output=True,
                timeout=PYTHON_S,
                check=True,
                text=True,
            ).stdout.strip()
        except FileNotFoundError:
            target = os.path.realpath(self.python)
            return f"its Python interpreter is gone ({target} does not exist)"
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            return f"its Python interpreter does not run ({type(error).__name__})"
        if _minor(told) != _minor(manifest.python):
            return f"it was made for Python {manifest.python}, and its interpreter is now {told}"
        return None

    def _damage(self, manifest: Manifest) -> str | None:
        name, site = manifest.distribution, self.site_packages()
        infos = [
            entry
            for entry in _names_in(site)
            if any(found == name for found, _ in _installed([entry]))
        ]
        if site is None or not infos:
            return f"its package {name}, the engine itself, is missing"
        try:
            with (site / infos[0] / "RECORD").open(newline="", encoding="utf-8") as file:
                record = [(row[0], int(row[2])) for row in csv.reader(file) if row[2:] and row[2]]
        except (OSError, ValueError, csv.Error):
            return f"the list of files of {name} cannot be read"
        missing = [path for path, size in record if _size_of(site / path) != size]
        if not missing:
            return None
        more = f" and {len(missing) - 1} other files" if missing[1:] else ""
        return f"{missing[0]}{more} of {name} missing or not as installed"


def difference(wanted: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """What is missing, or of another version, in words; None where all is as wanted.

    What is there beyond what is wanted does no harm.
    """
    for name, version in sorted(wanted.items()):
        if name not in found:
            return f"its package {name} {version} is missing"
        if found[name] != version:
            return f"its package {name} is {found[name]} and was installed as {version}"
    return None


def _names_in(folder: Path | None) -> list[str]:
    """What lies in a folder; nothing in one that is not there."""
    try:
        return os.listdir(folder) if folder else []
    except OSError:
        return []


def _installed(names: Iterable[str]) -> Iterable[tuple[str, str]]:
    for name in names:
        if match := _DIST_INFO.fullmatch(name):
            yield canonicalize_name(match["name"]), match["version"]


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return None


def _size(folder: Path) -> int:
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total += _size(Path(entry.path))
            else:
                total += entry.stat(follow_symlinks=False).st_size
    return total
