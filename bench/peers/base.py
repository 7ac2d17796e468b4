"""What a peer is, and the two ways in which one is installed without touching the system."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / ".bench" / "peers"
INSTALL_S = 900.0
ASK_S = 60.0
NOT_INSTALLED = "it is not installed; 'make bench' and 'make bench-queue' try to install theirs"


class Absent(Exception):
    """A peer cannot be measured here; the message says why, and ends with what would help."""


@dataclass(frozen=True)
class Command:
    """How a peer is started.

    :param env: variables besides this process's own
    :param key: the API key that its callers send, where it asks for one
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None


class Program(ABC):
    """Something that other people make."""

    name: str

    @property
    def home(self) -> Path:
        return ROOT / self.name

    @abstractmethod
    def install(self) -> None:
        """Nothing happens where it is there already.

        :raises Absent: it does not install here
        """

    @abstractmethod
    def version(self) -> str:
        """:raises Absent: it is not installed, or does not run"""


class Peer(Program):
    """A relay."""

    @abstractmethod
    def command(self, upstream: str, port: int, folder: Path) -> Command:
        """What starts it on a port of loopback, before this upstream.

        :param folder: empty, its own, for its configuration, logs and temporary files
        """


@dataclass(frozen=True)
class FromIndex(Program):
    """A package of the Python index in a virtual environment of its own.

    :param requirement: as pip reads it; blanks between several
    """

    name: str
    package: str
    requirement: str

    @property
    def python(self) -> Path:
        return self.home / "bin" / "python"

    def install(self) -> None:
        if self.home.exists():
            return
        try:
            run([sys.executable, "-m", "venv", str(self.home)], INSTALL_S)
            pip = [str(self.python), "-m", "pip", "install", "--quiet"]
            run([*pip, "--disable-pip-version-check", *self.requirement.split()], INSTALL_S)
        except BaseException:  # also an impatient Ctrl-C: half an environment is none
            shutil.rmtree(self.home, ignore_errors=True)
            raise

    def version(self) -> str:
        if not self.python.exists():
            raise Absent(NOT_INSTALLED)
        ask = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
        return run([str(self.python), "-c", ask, self.package], ASK_S).strip()


@dataclass(frozen=True)
class FromDebian(Program):
    """A program from Debian's packages, unpacked here and never installed: no service starts.

    :param packages: its own, and libraries that few machines have
    """

    name: str
    program: str
    packages: tuple[str, ...]

    @property
    def binary(self) -> Path:
        return self.home / self.program

    @property
    def libraries(self) -> dict[str, str]:
        found = {str(path.parent) for path in self.home.glob("usr/lib/*/*.so*")}
        return {"LD_LIBRARY_PATH": ":".join(sorted(found))}

    def install(self) -> None:
        if self.home.exists():
            return
        if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
            raise Absent("it is taken from Debian's packages, and this is no Debian")
        self.home.mkdir(parents=True)
        try:
            run(["apt-get", "download", "-qq", *self.packages], INSTALL_S, cwd=self.home)
            for package in self.home.glob("*.deb"):
                run(["dpkg", "-x", str(package), str(self.home)], INSTALL_S)
                package.unlink()
        except BaseException as error:
            shutil.rmtree(self.home, ignore_errors=True)
            if isinstance(error, Absent):
                raise Absent(f"{error}. 'apt-get update' may help") from None
            raise

    def version(self) -> str:
        if not self.binary.exists():
            raise Absent(NOT_INSTALLED)
        return run([str(self.binary), "-v"], ASK_S, env=self.libraries).strip()


def run(
    argv: Sequence[str],
    within_s: float,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """What a program said on both of its outputs.

    :raises Absent: it is not there, failed or took longer
    """
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            env={**own_env(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=within_s,
            check=True,
        )
    except FileNotFoundError:
        raise Absent(f"there is no {argv[0]} here") from None
    except subprocess.TimeoutExpired:
        raise Absent(f"'{argv[0]}' took longer than {within_s:.0f} s") from None
    except subprocess.CalledProcessError as error:
        last = (str(error.output).strip().splitlines() or ["nothing was said"])[-1]
        raise Absent(f"'{' '.join(argv[:4])} …' failed: {last}") from None
    return done.stdout


def install_all(programs: Iterable[Program]) -> None:
    """Install them; say which there are, and why the others are not."""
    for program in programs:
        try:
            program.install()
            print(f"{program.name} {program.version()}", flush=True)
        except Absent as why:
            print(f"{program.name} is skipped: {why}", flush=True)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def own_env() -> dict[str, str]:
    """This process's variables without Hive's and Python's, which are not meant for peers."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("HIVE_", "PYTHON"))}
