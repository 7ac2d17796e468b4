"""A PostgreSQL of the tests' own: its folder, its port of loopback, ended with them."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

START_S = 30.0
USER = "hive"


def binaries() -> Path | None:
    """Where the server's programs are; None where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if found:
        return found[-1].parent
    on_path = shutil.which("postgres")
    return None if on_path is None else Path(on_path).resolve().parent


class Postgres:
    """A server that can be stopped, killed and started again."""

    def __init__(
        self, folder: Path, port: int, *, fsync: bool = True, env: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.port = port
        self._env = {**os.environ, **(env or {})}
        self._fsync = "on" if fsync else "off"
        self._programs = binaries()
        assert self._programs is not None
        self._process: subprocess.Popen[bytes] | None = None
        # PostgreSQL refuses to run as root.
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            self._as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def init(self) -> None:
        self._run(
            "initdb",
            "-D",
            "data",
            "-A",
            "trust",
            "-U",
            USER,
            "-E",
            "UTF8",
            "--no-locale",
            "--no-sync",
        )

    def start(self) -> None:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": str(self.folder),
            "max_connections": 60,
            "shared_buffers": "32MB",
            "fsync": self._fsync,
            "log_min_messages": "warning",
        }
        flags = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._programs / "postgres"), "-D", "data", *flags],  # type: ignore[operator]
                cwd=self.folder,
                stdout=log,
                stderr=log,
                env=self._env,
                **self._as,
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError((self.folder / "log").read_text()[-2000:])
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: at once, in order; SIGQUIT: without order; SIGKILL: as a crash."""
        assert self._process is not None
        children = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(how)
        self._process.wait()
        self._process = None
        psutil.wait_procs(children, START_S)  # a killed server's notice by themselves

    def create(self, database: str) -> str:
        """A fresh database; its URL."""
        self._run(
            "psql",
            *("-h", "127.0.0.1", "-p", str(self.port), "-U", USER, "-d", "postgres"),
            *("-qc", f'CREATE DATABASE "{database}"'),
        )
        return self.url(database)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            probe = [str(self._programs / "pg_isready"), "-q", "-h", "127.0.0.1"]  # type: ignore[operator]
            return subprocess.run([*probe, "-p", str(self.port)], check=False).returncode == 0
        return False

    def _run(self, program: str, *args: str) -> None:
        assert self._programs is not None
        done = subprocess.run(
            [str(self._programs / program), *args],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            **self._as,
        )
        assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def running(*, fsync: bool = True, env: Mapping[str, str] | None = None) -> Iterator[Postgres]:
    """A server for the block's life, with nothing in it.

    :param fsync: whether it would outlive the machine's crash, which makes it slow
    :param env: variables of the server, beside this process's own
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    folder = Path(tempfile.mkdtemp(prefix="hive-postgres-"))
    folder.chmod(0o755)
    server = Postgres(folder, port, fsync=fsync, env=env)
    try:
        server.init()
        server.start()
        yield server
    finally:
        with contextlib.suppress(AssertionError):
            server.stop(signal.SIGQUIT)
        shutil.rmtree(folder, ignore_errors=True)
