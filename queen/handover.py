"""A caller's connection that changes from a relay process to process 0, in the middle between two
requests.

Without TLS it is the socket itself that goes. With TLS, whose keys stay where they are, the relay
process keeps the caller and passes plain bytes on, both ways, over a pair of sockets.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Collection
from typing import Any, Final, cast

from operations.errors import HiveError
from queen.channel import Channel, HandOver, ToRelay
from wire.direct import preferred
from wire.door.asgi import Lent
from wire.door.door import STALLED_S, Door
from wire.headers import SESSION_HEADER
from wire.http1.head import RequestHead

log = logging.getLogger(__name__)

LOOK_S: Final = 0.01
SIGNED: Final = SESSION_HEADER.encode()

Address = tuple[str, int]


class ProcessZero:
    """Implements :class:`wire.door.door.Elsewhere` in a relay process.

    :param serve: paths whose requests are relayed here
    """

    def __init__(self, channel: Channel[ToRelay], serve: Collection[str]) -> None:
        self._channel = channel
        self._serve = frozenset(serve)
        self._tasks: set[asyncio.Task[None]] = set()
        self._spliced: set[asyncio.Transport] = set()

    def wants(self, head: RequestHead) -> bool:
        """All but inference; what a daemon has signed, for its session is there; and who may be
        sent to a hive."""
        ours = head.method == "POST" and head.path in self._serve
        return not ours or SIGNED in head.values or _prefers_direct(head)

    def take(self, transport: asyncio.Transport, data: bytes) -> None:
        transport.pause_reading()
        plain = transport.get_extra_info("ssl_object") is None
        move = self._send if plain else self._splice
        task = asyncio.get_running_loop().create_task(self._moved(move(transport, data), transport))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def splices(self) -> bool:
        """Whether there are connections that are passed on."""
        return bool(self._spliced)

    def close(self) -> None:
        """End the connections that are passed on."""
        for transport in list(self._spliced):
            transport.abort()

    async def _moved(self, moving: Awaitable[None], transport: asyncio.Transport) -> None:
        try:
            await moving
        except OSError as error:
            log.error("a connection was lost on its way to process 0: %s", error.strerror)
            transport.abort()

    async def _send(self, transport: asyncio.Transport, data: bytes) -> None:
        """The socket itself, once the caller has all earlier answers."""
        await _all_taken(transport)
        if transport.is_closing():
            return
        descriptor = os.dup(transport.get_extra_info("socket").fileno())
        inode = os.fstat(descriptor).st_ino
        self._channel.send(HandOver(inode, data, None), descriptor)
        transport.abort()  # this process's descriptor; the connection lives on in the other

    async def _splice(self, transport: asyncio.Transport, data: bytes) -> None:
        """Pass on what comes, once the caller has all earlier answers: a full transport would not
        tell its next protocol."""
        await _all_taken(transport)
        if transport.is_closing():
            return
        loop = asyncio.get_running_loop()
        addresses: tuple[Address, Address] = (
            transport.get_extra_info("sockname")[:2],
            transport.get_extra_info("peername")[:2],
        )
        near, far = socket.socketpair()
        inode = os.fstat(far.fileno()).st_ino
        self._channel.send(HandOver(inode, data, addresses), far.detach())
        end = _End(transport, self._spliced)
        made, _ = await loop.create_unix_connection(lambda: end, sock=near)
        if transport.is_closing():
            made.close()
            return
        transport.set_protocol(_CallersEnd(transport, made, self._spliced))
        self._spliced.add(transport)
        transport.resume_reading()


async def _all_taken(transport: asyncio.Transport) -> None:
    """Wait until nothing is left to be written. A caller who does not take it is cut off."""
    loop = asyncio.get_running_loop()
    until, pause = loop.time() + STALLED_S, 0.0
    while transport.get_write_buffer_size() and not transport.is_closing():
        if loop.time() > until:
            transport.abort()
        await asyncio.sleep(pause)
        pause = LOOK_S


def _prefers_direct(head: RequestHead) -> bool:
    said = head.values.get(b"prefer")
    return said is not None and preferred({"prefer": said.decode("latin-1")})


class _End(asyncio.Protocol):
    """One end of a connection that is passed on; what comes there goes to the other."""

    def __init__(self, other: asyncio.Transport, spliced: set[asyncio.Transport]) -> None:
        self._other = other
        self._spliced = spliced

    def data_received(self, data: bytes) -> None:
        self._other.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._spliced.discard(self._other)
        self._other.close()

    def pause_writing(self) -> None:
        self._other.pause_reading()

    def resume_writing(self) -> None:
        self._other.resume_reading()


class _CallersEnd(_End):
    """The caller's; one who takes nothing any more is gone, as at a door."""

    def __init__(
        self,
        transport: asyncio.Transport,
        other: asyncio.Transport,
        spliced: set[asyncio.Transport],
    ) -> None:
        super().__init__(other, spliced)
        self._transport = transport
        self._timer: asyncio.TimerHandle | None = None

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._watch(False)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch(False)

    def _watch(self, on: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if on:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(STALLED_S, self._transport.abort)


class Arrival(asyncio.Protocol):
    """Process 0's side: gives a connection to its door, and with it what was read already."""

    def __init__(self, door: Door, came: HandOver) -> None:
        self._door = door
        self._came = came

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        made = cast(asyncio.Transport, transport)
        made.set_protocol(self._door)
        if self._came.addresses is not None:
            made = _Spliced(made, *self._came.addresses)
        self._door.connection_made(made)
        self._door.data_received(self._came.data)


class _Spliced(Lent):
    """A connection under TLS, as its caller's end has it, which is in another process."""

    def __init__(self, transport: asyncio.Transport, server: Address, caller: Address) -> None:
        super().__init__(transport)
        tls = {"ssl_object": self, "sslcontext": self}
        self._known: dict[str, Any] = {"sockname": server, "peername": caller, **tls}

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._known.get(name, default)

    def can_write_eof(self) -> bool:
        return False

    def write_eof(self) -> None:
        raise NotImplementedError

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()


async def arrive(door: Door, came: HandOver, descriptor: int) -> None:
    """Have a door serve a connection that a relay process has handed over.

    :param descriptor: of the connection; closed here if that fails
    :raises HiveError: it is no connection any more
    """
    try:
        made = socket.socket(fileno=descriptor)
    except OSError:
        os.close(descriptor)
        raise HiveError("what was handed over is no socket") from None
    made.setblocking(False)
    try:
        await asyncio.get_running_loop().connect_accepted_socket(lambda: Arrival(door, came), made)
    except OSError:
        made.close()
        raise HiveError("the caller of a connection that was handed over has gone") from None
