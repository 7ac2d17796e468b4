"""Hosts of a test's own LAN: daemons on them, commands on them, and HTTP from them."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from job_client.client import JobClient
from tests.cluster import Cluster, Daemon, clean_env, hive_command
from tests.lan import Lan
from wire.secret import Secret

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Room:
    """A LAN, a cluster whose daemons run on its hosts, and the cluster's secret."""

    lan: Lan
    cluster: Cluster
    secret: Secret = field(default_factory=Secret.new)
    hosts: dict[str, str] = field(default_factory=dict)
    sessions: list[aiohttp.ClientSession] = field(default_factory=list)

    async def close(self) -> None:
        """Close every caller's connections; the LAN and the cluster are left by who made them."""
        await asyncio.gather(*(session.close() for session in self.sessions))

    def add(self, *names: str) -> None:
        """Hosts with the next addresses, 10.77.0.1 and on."""
        for name in names:
            self.hosts[name] = f"10.77.0.{len(self.hosts) + 1}"
            self.lan.host(name, self.hosts[name])

    async def start(
        self,
        command: str,
        host: str,
        *flags: str,
        secret: Secret | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Daemon:
        """``hive queen`` or ``hive agent`` on a host, open to the LAN, on its usual port."""
        key = secret or self.secret
        started = await self.cluster.start(
            command,
            "--host=0.0.0.0",
            *flags,
            folder=host,
            env={"HIVE_SECRET": key.text, **(env or {})},
            prefix=self.lan.command(host, []),
        )
        port = 7833 if command == "queen" else 7835
        started.url = f"http://{self.hosts[host]}:{port}"
        return started

    async def queen(self, host: str, *flags: str, **how: Any) -> Daemon:
        return await self.start("queen", host, *flags, **how)

    async def hive(self, host: str, *flags: str, **how: Any) -> Daemon:
        """An agent whose hive id is its host's name."""
        return await self.start("agent", host, f"--hive-id={host}", *flags, **how)

    def session(self, host: str) -> aiohttp.ClientSession:
        """HTTP from a host."""
        made = aiohttp.ClientSession(connector=self.connector(host))
        self.sessions.append(made)
        return made

    def connector(self, host: str) -> aiohttp.TCPConnector:
        def made(info: tuple[Any, ...]) -> socket.socket:
            family, kind, proto = info[0], info[1], info[2]
            with inside(self.namespace(host)):
                return socket.socket(family, kind, proto)

        return aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=made)

    def namespace(self, host: str) -> str:
        return f"/run/netns/{self.lan.command(host, [])[3]}"

    def client(self, host: str, daemon: Daemon, key: str | None) -> JobClient:
        """A caller on a host."""
        return JobClient(daemon.url, api_key=key, session=self.session(host))

    async def run(
        self, host: str, *arguments: str, env: Mapping[str, str] | None = None, stdin: str = ""
    ) -> tuple[int, str, str]:
        """Run ``hive <arguments>`` on a host: exit code, stdout, stderr."""
        return await self.execute(host, *hive_command(), *arguments, env=env, stdin=stdin)

    async def python(self, host: str, code: str, **env: str) -> tuple[int, str, str]:
        return await self.execute(host, sys.executable, "-c", code, env=env)

    async def execute(
        self, host: str, *argv: str, env: Mapping[str, str] | None = None, stdin: str = ""
    ) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *self.lan.command(host, list(argv)),
            env={**clean_env(), "HIVE_STATE_DIR": str(self.state(host)), **(env or {})},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate(stdin.encode())
        return process.returncode or 0, out.decode(), err.decode()

    def state(self, host: str) -> Path:
        return self.cluster.folder / host


class inside:  # noqa: N801  a context manager, named as it reads
    """The calling thread stands in a network namespace; a socket made meanwhile stays there."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def __enter__(self) -> None:
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(self._namespace, os.O_RDONLY)
        try:
            _setns(there)
        finally:
            os.close(there)

    def __exit__(self, *_: object) -> None:
        try:
            _setns(self._home)
        finally:
            os.close(self._home)


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, 0) != 0:
        raise OSError(ctypes.get_errno(), "setns")
