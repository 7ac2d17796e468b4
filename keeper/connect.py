"""Finding the daemon to talk to.

Without ``--hive``: the one that ``--url`` or else ``HIVE_QUEEN_URL`` names, and no other; where
neither is given, whoever answers ``GET /health`` on loopback 7833 (a queen), then 7835 (a hive).

With ``--hive X`` the command talks straight to that hive: X is a URL, or the id of a hive that the
queen knows, or a host.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import platformdirs

from job_client.client import JobClient
from keeper import ports
from keeper.exits import WrongUsage
from keeper.told import each
from operations.errors import HiveError, Unavailable
from operations.hosts import HiveInfo
from wire import secret
from wire.addresses import on_loopback
from wire.peer import Peer
from wire.secret import Secret

LOOPBACK = (f"http://127.0.0.1:{ports.QUEEN}", f"http://127.0.0.1:{ports.HIVE}")
HEALTH_S = 5.0


@dataclass(frozen=True)
class Daemon:
    """One that has answered. ``hive_id`` goes into operations; None leaves it to the daemon."""

    url: str
    role: Literal["queen", "hive"]
    hive_id: str | None = None


def api_key() -> str | None:
    """The caller's key, from ``HIVE_API_KEY``."""
    return os.environ.get("HIVE_API_KEY") or None


def client(url: str) -> JobClient:
    """A client for one daemon: with the caller's key, else with the cluster's proof.

    :raises WrongUsage: the secret on this machine cannot be used
    """
    key = api_key()
    shared = None if key else own_secret()
    if shared is None:
        return JobClient(url, api_key=key)
    peer = Peer(url, shared, role="keeper", id="keeper", roles=("queen", "hive"), lenient=True)
    return JobClient(url, peer=peer)


def own_secret() -> Secret | None:
    """The cluster secret of this machine's user, if there is one.

    :raises WrongUsage: there is one, and it cannot be used
    """
    try:
        return secret.find(os.environ.get("HIVE_SECRET"), secret_file())
    except secret.BadSecret as error:
        raise WrongUsage(f"The cluster secret cannot be used: {error}.") from None


def secret_file() -> Path:
    """Where the secret is: ``HIVE_SECRET_FILE``, else in the state folder."""
    if named := os.environ.get("HIVE_SECRET_FILE"):
        return Path(named)
    return state_dir() / secret.FILE


def state_dir() -> Path:
    """``HIVE_STATE_DIR``, else this user's state folder."""
    named = os.environ.get("HIVE_STATE_DIR")
    return Path(named) if named else platformdirs.user_state_path("hive")


async def connect(url: str | None, hive: str | None) -> Daemon:
    """The daemon that ``--url`` and ``--hive`` mean.

    :raises HiveError: nobody answers there (``daemon_unreachable``), or it refuses
    :raises WrongUsage: what was given is no URL
    """
    named = url or os.environ.get("HIVE_QUEEN_URL") or None
    if hive is None:
        return await find(named)
    if "://" in hive:
        return await ask(checked_url(hive))
    found = None
    try:
        found = await find(named)
    except Unavailable:
        if url is not None:
            raise
    hives: list[HiveInfo] = []
    if found is not None:
        async with client(found.url) as asked:
            if found.role == "queen":
                answer = await asked.get("/v1/hives")
                hives = each(HiveInfo, answer, "hives")
            elif hive in ("localhost", (await asked.get("/v1/info"))["id"]):
                return found
    return await _straight(hive, found, hives)


async def find(named: str | None) -> Daemon:
    """The daemon named, or the first that answers on loopback."""
    if named is not None:
        return await ask(checked_url(named))
    for candidate in LOOPBACK:
        with suppress(Unavailable):
            return await ask(candidate)
    raise Unavailable(
        "No Hive daemon answers on this machine (tried ports 7833 and 7835). Start one with "
        "'hive up', see it all work with 'hive demo', or name another with --url.",
        code="daemon_unreachable",
    )


async def ask(url: str, timeout_s: float = HEALTH_S) -> Daemon:
    """Ask a daemon who it is.

    :raises Unavailable: nobody answers, or somebody who is no Hive daemon
    """
    async with client(url) as asked:
        try:
            health = await asked.get("/health", timeout_s=timeout_s)
            if _healthy(health) and "role" not in health:  # what strangers get
                health = {**health, **await asked.get("/v1/info")}
        except Unavailable:
            raise
        except HiveError as error:
            if error.request_id is not None or error.code == "unproven":  # words worth hearing
                raise
            health = None
    if not _healthy(health) or health.get("role") not in ("queen", "hive"):
        raise Unavailable(
            f"{url} answers, but it is no Hive daemon. Name the right one with --url.",
            code="daemon_unreachable",
        )
    return Daemon(url, health["role"])


async def _straight(hive: str, found: Daemon | None, hives: Sequence[HiveInfo]) -> Daemon:
    target = decide(hive, found, hives)
    if found is not None and target.url == found.url:
        return target
    try:
        return Daemon(target.url, (await ask(target.url)).role, target.hive_id)
    except Unavailable as error:
        if target.hive_id is not None or found is None or found.role != "queen":
            raise
        known = ", ".join(known.hive_id for known in hives) or "none yet"
        raise Unavailable(
            f"There is no hive '{hive}': the queen at {found.url} knows {known}, and no hive "
            f"answers at {target.url}. Use one of these, or a host or a URL.",
            code="daemon_unreachable",
        ) from error


def decide(hive: str, found: Daemon | None, hives: Sequence[HiveInfo]) -> Daemon:
    """Where a hive is that was named by its id or host.

    A hive that told its queen a loopback address is reached through that queen, unless the queen
    is on this machine too: the same address here would be another hive.
    """
    for known in hives:
        if known.hive_id == hive and found is not None:
            if on_loopback(known.hive_url) and not on_loopback(found.url):
                return Daemon(found.url, found.role, known.hive_id)
            return Daemon(known.hive_url, "hive", known.hive_id)
    if hive == "localhost":
        return Daemon(LOOPBACK[1], "hive")
    return Daemon(checked_url(f"http://{_with_port(hive)}"), "hive")


def checked_url(url: str) -> str:
    """:raises WrongUsage: not of the form ``http://host:port``"""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        good = False
    if not good or any(c.isspace() for c in url):
        raise WrongUsage(f"'{url}' is no address of a daemon. Give e.g. http://127.0.0.1:7833.")
    return url.rstrip("/")


def _with_port(host: str) -> str:
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"  # an IPv6 address
    has_port = host.rpartition("]")[2].startswith(":") if "[" in host else ":" in host
    return host if has_port else f"{host}:{ports.HIVE}"


def _healthy(answer: Any) -> bool:
    return isinstance(answer, dict) and answer.get("ok") is True
