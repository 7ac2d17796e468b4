"""A LAN of its own for tests: every host a network namespace, joined by switches in another one.

Each host hangs on a switch of its own, which hangs on the core, so that a cable can be pulled at
the host, or multicast be kept from passing either way. The machine's own interfaces stay as they
are.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Self

_numbers = itertools.count()


@functools.cache
def unavailable() -> str | None:
    """Why there can be no LAN here, for a skip; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "bridge"):
        if shutil.which(program) is None:
            return f"there is no {program} (iproute2)"
    try:
        with Lan() as lan:
            lan.host("probe", "10.77.0.1")
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"
    return None


class Lan:
    """A network; whatever runs in it ends, and it is removed, when it is left.

    Every method raises :class:`subprocess.CalledProcessError` if the kernel refuses.
    """

    def __init__(self, prefix: int = 24) -> None:
        self._unique = f"hive-{os.getpid()}-{next(_numbers)}"
        self._prefix = prefix
        self._switch = f"{self._unique}-switch"
        self._namespaces: list[str] = []
        self._ports: dict[str, int] = {}

    def __enter__(self) -> Self:
        try:
            self._add_namespace(self._switch)
            self._add_bridge("core")
        except subprocess.CalledProcessError:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def host(self, name: str, address: str) -> None:
        """Add a host, whose ``eth0`` has this IPv4 address and a route for multicast."""
        self._ports[name] = port = len(self._ports)
        self._add_namespace(self._namespace(name))
        self._add_bridge(f"access{port}")
        self._on_switch("link", "add", f"up{port}", "type", "veth", "peer", "name", f"down{port}")
        self._on_switch(
            *("link", "add", f"port{port}", "type", "veth", "peer", "name", "eth0"),
            *("netns", self._namespace(name)),
        )
        for device, bridge in (
            ("port", f"access{port}"),
            ("up", f"access{port}"),
            ("down", "core"),
        ):
            self._on_switch("link", "set", f"{device}{port}", "master", bridge, "up")
        self._on_host(name, "link", "set", "lo", "up")
        self._on_host(name, "link", "set", "eth0", "up")
        self._address(name, address)

    def command(self, host: str, argv: Sequence[str]) -> list[str]:
        """The command that runs ``argv`` on a host."""
        return ["ip", "netns", "exec", self._namespace(host), *argv]

    def down(self, host: str) -> None:
        """Pull the host's cable: it loses its carrier."""
        self._on_switch("link", "set", f"port{self._ports[host]}", "down")

    def up(self, host: str) -> None:
        self._on_switch("link", "set", f"port{self._ports[host]}", "up")

    def block_multicast(self, host: str) -> None:
        """Let no multicast pass to or from the host; broadcast (ARP) and unicast pass."""
        self._flood_multicast(host, "off")

    def unblock_multicast(self, host: str) -> None:
        self._flood_multicast(host, "on")

    def readdress(self, host: str, address: str) -> None:
        """Give the host another address in place of the one that it has."""
        self._on_host(host, "address", "flush", "dev", "eth0", "scope", "global")
        self._address(host, address)

    def address(self, host: str, address: str) -> None:
        """Give the host one address more, which stays when the first one is removed."""
        promote = "echo 1 > /proc/sys/net/ipv4/conf/eth0/promote_secondaries"
        _run(*self.command(host, ["sh", "-c", promote]))
        self._on_host(host, "address", "add", f"{address}/{self._prefix}", "dev", "eth0")

    def remove_address(self, host: str, address: str) -> None:
        self._on_host(host, "address", "delete", f"{address}/{self._prefix}", "dev", "eth0")

    def _flood_multicast(self, host: str, state: str) -> None:
        # The flag governs what leaves by a port: of the uplink, from the host; of the core, to it.
        for end in ("up", "down"):
            device = f"{end}{self._ports[host]}"
            bridge = ["bridge", "link", "set", "dev", device, "mcast_flood", state]
            _run("ip", "netns", "exec", self._switch, *bridge)

    def _namespace(self, host: str) -> str:
        return f"{self._unique}-{host}"

    def _add_namespace(self, namespace: str) -> None:
        _run("ip", "netns", "add", namespace)
        self._namespaces.append(namespace)

    def _add_bridge(self, name: str) -> None:
        self._on_switch("link", "add", name, "type", "bridge", "mcast_snooping", "0")
        self._on_switch("link", "set", name, "up")

    def _address(self, host: str, address: str) -> None:
        self._on_host(host, "address", "add", f"{address}/{self._prefix}", "dev", "eth0")
        self._on_host(host, "route", "replace", "224.0.0.0/4", "dev", "eth0")

    def _on_switch(self, *words: str) -> None:
        _run("ip", "-n", self._switch, *words)

    def _on_host(self, host: str, *words: str) -> None:
        _run("ip", "-n", self._namespace(host), *words)

    def _remove(self) -> None:
        for namespace in self._namespaces:
            for pid in _run("ip", "netns", "pids", namespace).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _run("ip", "netns", "delete", namespace)


def _run(*words: str) -> str:
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return done.stdout
