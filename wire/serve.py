"""Running a daemon: its socket, its event loop, and the one way to stop it.

A daemon stops on SIGTERM, on SIGINT, on ``POST /v1/shutdown``, or, where its starter asked for
that, when its standard input closes. It then drains: no new work, running work may finish until
the deadline. A second signal ends the draining.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import hashlib
import ipaddress
import logging
import os
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import uvicorn
from sse_starlette.sse import AppStatus
from starlette.types import ASGIApp

from wire.addresses import url_at
from wire.door import Door, Doorway
from wire.log import outcome

log = logging.getLogger(__name__)

THREADS = 64
BACKLOG = 2048
NEW_OBJECTS = 10_000  # that stay make one look for garbage among them
TELL_AGAIN_S = 60.0
CLOSE_S = 2  # what open connections get after the draining, before they are cut


class CannotStart(Exception):
    """A daemon cannot start; the message says why and what to do."""


@contextlib.contextmanager
def starting(what: str) -> Iterator[None]:
    """Around what touches the disk at a start. :raises CannotStart: for an ``OSError`` in it"""
    try:
        yield
    except OSError as error:
        raise CannotStart(
            f"{what} cannot start: {error.strerror or error}"
            + (f" ({error.filename})" if error.filename else "")
            + ". Choose another folder with --state-dir."
        ) from None


class Stop:
    """Asked once, by whoever comes first; asked again, the draining is cut short.

    ``at_once`` runs within :meth:`ask`: when the asker has its answer, no new work is taken.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._by_hand = False
        self.at_once: Callable[[], None] = lambda: None
        self._asked = asyncio.Event()
        self._now = asyncio.Event()

    def ask(self, reason: str, *, by_hand: bool = True) -> None:
        """:param by_hand: only a second request by hand (signal, route) ends the draining"""
        if by_hand and self._by_hand:
            self._now.set()
        self._by_hand |= by_hand
        if self._asked.is_set():
            return
        self.reason = reason
        self._asked.set()
        self.at_once()

    async def asked(self) -> None:
        await self._asked.wait()

    async def asked_again(self) -> None:
        await self._now.wait()


@dataclass(frozen=True)
class Certificate:
    """What a daemon shows under TLS: two PEM files, and the SHA-256 of the first in hex."""

    path: Path
    key_path: Path
    fingerprint: str


def read_certificate(path: Path, key_path: Path) -> Certificate:
    """:raises CannotStart: the files cannot be read, or do not belong together"""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path, key_path)
        text = path.read_text()
        first = text[: text.index("-----END CERTIFICATE-----") + 25]
        der = ssl.PEM_cert_to_DER_cert(first[first.index("-----BEGIN CERTIFICATE-----") :])
    except (OSError, ValueError) as error:
        why = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise CannotStart(
            f"The certificate {path} with the key {key_path} cannot be used: {why}. "
            "Make a pair with 'hive tls new'."
        ) from None
    return Certificate(path, key_path, hashlib.sha256(der).hexdigest())


@dataclass(frozen=True)
class Listening:
    """Where a daemon listens.

    :param host: the address it is bound to; may be all of them (``0.0.0.0``, ``::``)
    :param port: never 0
    :param others: sockets of the same port for further processes; the kernel gives each of all
        sockets its share of the connections
    """

    listener: socket.socket
    host: str
    port: int
    certificate: Certificate | None = None
    others: tuple[socket.socket, ...] = ()

    @property
    def everywhere(self) -> bool:
        """Bound to every address of the machine."""
        return ipaddress.ip_address(self.host).is_unspecified

    @property
    def url(self) -> str:
        """How this machine itself reaches it."""
        host = self.host
        if self.everywhere:
            host = "127.0.0.1" if host == "0.0.0.0" else "::1"
        return self.url_at(host)

    def url_at(self, address: str) -> str:
        """How it is reached at one of the machine's addresses."""
        return url_at("https" if self.certificate else "http", address, self.port)


class Daemon(Protocol):
    """What :func:`run` needs of a daemon."""

    role: str
    name: str

    @property
    def doorway(self) -> Doorway:
        """What callers find at its port, besides the application."""

    async def start(self) -> ASGIApp:
        """Begin all background work; the application that answers."""

    async def drain(self) -> None:
        """Take no new work; return when running work has finished or the deadline has passed."""

    async def close(self) -> None:
        """End everything that is left. Fine after a drain that was cut short."""


def bind(
    host: str, port: int, what: str, certificate: Certificate | None = None, *, sockets: int = 1
) -> Listening:
    """A listening TCP socket.

    :param port: 0 takes any free port
    :param sockets: how many processes will share the port
    :raises CannotStart: the port is taken, or the host is no address of this machine
    """
    made: list[socket.socket] = []
    try:
        # Sockets with SO_REUSEPORT could be bound beside those of another queen: the first asks.
        made.append(_bound(host, port))
        if sockets > 1:
            port = made[0].getsockname()[1]
            made += [_bound(host, port, shared=True) for _ in range(sockets)]
            made.pop(0).close()
        for one in made:
            one.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        for one in made:
            one.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        why = "the port is in use, perhaps by another one" if taken else str(error)
        raise CannotStart(
            f"{what} cannot listen on {host}:{port}: {why}. Choose another with --port."
        ) from None
    listener, *others = made
    address, port = listener.getsockname()[:2]
    return Listening(listener, address, port, certificate, tuple(others))


def _bound(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """:raises OSError, OverflowError: it cannot be had"""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind((host, port))
    except BaseException:
        made.close()
        raise
    return made


def run(make: Callable[[Stop], Daemon], listening: Listening, *, exit_with_parent: bool) -> int:
    """Run a daemon until it is asked to stop.

    :param exit_with_parent: stop when standard input closes, as it does when the starter dies
    :returns: the process's exit status
    """
    import uvloop

    raise_file_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(make, listening, exit_with_parent))


def raise_file_limit() -> None:
    """Every stream holds descriptors: take as many as this user may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS says more than it gives
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _run(make: Callable[[Stop], Daemon], listening: Listening, exit_with_parent: bool) -> int:
    loop = asyncio.get_running_loop()
    # Threads wait for disks and hubs; a few slow ones must not keep everybody else waiting.
    loop.set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="io"))
    stop = Stop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.ask, signal.Signals(signum).name)
    if exit_with_parent:
        watch_stdin(lambda: stop.ask("its starter ended", by_hand=False))
    daemon = make(stop)
    try:
        app = await daemon.start()
    except CannotStart:
        await daemon.close()
        listening.listener.close()
        raise
    server = Server(app, daemon.doorway, listening.certificate)
    serving = asyncio.create_task(server.serve(sockets=[listening.listener]))
    await server.ready.wait()
    daemon.doorway.opened(server)
    more = " (and on every other address of this machine)" if listening.everywhere else ""
    print(f"{daemon.role} {daemon.name} listens on {listening.url}{more}", flush=True)
    gc.freeze()  # what is there now stays, and need not be looked through again and again
    gc.set_threshold(NEW_OBJECTS)  # thousands of requests under way are no garbage
    outcome("daemon", status="started", role=daemon.role, id=daemon.name, url=listening.url)

    await stop.asked()
    outcome("daemon", status="stopping", role=daemon.role, id=daemon.name, reason=stop.reason)
    try:
        await _first(daemon.drain(), stop.asked_again())
    finally:
        await daemon.close()
    AppStatus.should_exit = True  # ends event streams that are still open all the same
    server.should_exit = True
    await serving
    outcome("daemon", status="stopped", role=daemon.role, id=daemon.name)
    return 0


class Server(uvicorn.Server):
    """uvicorn without its own signal handling: the daemon decides when and how to stop."""

    def __init__(self, app: ASGIApp, way: Doorway, certificate: Certificate | None) -> None:
        # Streams end when the daemon has drained, not when a signal arrives.
        AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Door, way),  # type: ignore[arg-type]  # made as a class of protocols is
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=CLOSE_S,
                ssl_certfile=certificate.path if certificate else None,
                ssl_keyfile=certificate.key_path if certificate else None,
            )
        )
        self.ready = asyncio.Event()
        self._descriptors_told = float("-inf")
        # Its warnings are about requests that strangers have broken: one line for each.
        logging.getLogger("uvicorn").setLevel(logging.ERROR)

    def door(self) -> Door:
        """See :class:`wire.door.Front`."""
        made: Door = self.config.http_protocol_class(  # type: ignore[assignment,call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    async def listen(self, listener: socket.socket) -> asyncio.AbstractServer:
        """See :class:`wire.door.Front`."""
        loop = asyncio.get_running_loop()
        return await loop.create_server(
            self.door, sock=listener, ssl=self.config.ssl, backlog=BACKLOG
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.ready.set()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        self._look_for_descriptors()
        return await super().on_tick(counter)

    def _look_for_descriptors(self) -> None:
        """Say it when there are none left, for libuv does not: it accepts connections to close
        them (``uv__emfile_trick`` in its ``src/unix/stream.c``), until there are some again."""
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            now = asyncio.get_running_loop().time()
            none_left = error.errno in (errno.EMFILE, errno.ENFILE)
            if not none_left or now - self._descriptors_told < TELL_AGAIN_S:
                return
            self._descriptors_told = now
            log.error(
                "no file descriptors are left (%s; this process may have %d): new connections are "
                "closed until some are free. Allow it more: 'ulimit -n', or LimitNOFILE= of its "
                "service; the whole machine has 'sysctl fs.file-max'.",
                error.strerror,
                resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def watch_stdin(ended: Callable[[], None]) -> None:
    """Call ``ended`` when standard input reaches its end."""
    loop = asyncio.get_running_loop()
    fd = sys.stdin.fileno()

    def readable() -> None:
        if not os.read(fd, 4096):
            loop.remove_reader(fd)
            ended()

    os.set_blocking(fd, False)
    loop.add_reader(fd, readable)


async def _first(*waits: Awaitable[None]) -> None:
    """Wait until one is done; cancel the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()
