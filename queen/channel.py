"""What the queen's processes tell each other, over a socket that each relay process inherits.

A frame is ``u32 length`` (big-endian) and a msgpack array. Process 0 and a relay process are of one
version and trust each other: what cannot be understood ends the channel, and the process with it.
A connection that changes process goes along as a file descriptor (``SCM_RIGHTS``, unix(7)).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

import msgspec

from operations.hosts import Task

log = logging.getLogger(__name__)

READ_BYTES: Final = 256 * 1024
MAX_FRAME: Final = 64 * 1024 * 1024
MAX_WAITING: Final = 64 * 1024 * 1024
"""Bytes for a process that reads none; it is given up then."""
MAX_DESCRIPTORS: Final = 16  # that come with one read; the kernel gives those of one frame


class Begin(msgspec.Struct, frozen=True, array_like=True, tag="begin"):
    """The first frame to a relay process: what it is.

    :param number: 1 and up
    :param secret: the cluster's
    :param certificate: paths of certificate and key, and the certificate's fingerprint
    :param max_body: bytes
    :param revoked: ids of all keys that hold no more
    """

    number: int
    queen_id: str
    secret: str | None
    listens_openly: bool
    certificate: tuple[str, str, str] | None
    max_body: int
    trunks: bool
    state_dir: str
    log_level: str
    revoked: list[str]


class HiveHeard(msgspec.Struct, frozen=True, array_like=True, tag="hive_heard"):
    """A hive has proven itself to process 0, or has done so anew: it lives at another address, or
    a new life."""

    url: str
    hive_id: str


class HiveDoubted(msgspec.Struct, frozen=True, array_like=True, tag="hive_doubted"):
    """Process 0 has lost sight of it: what is there now must prove itself before it is sent
    anything. What runs there goes on."""

    url: str


class HiveGone(msgspec.Struct, frozen=True, array_like=True, tag="hive_gone"):
    """No answer will come from there any more."""

    url: str


class Revoked(msgspec.Struct, frozen=True, array_like=True, tag="revoked"):
    """These keys hold no more, either."""

    key_ids: list[str]


class Leased(msgspec.Struct, frozen=True, array_like=True, tag="leased"):
    """Where a request goes; it counts as a load there until :class:`Released`."""

    id: int
    url: str
    hive_id: str
    model: str


class Counted(msgspec.Struct, frozen=True, array_like=True, tag="counted"):
    """The key is within its limit."""

    id: int


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """:param error: as :func:`wire.trunk.messages.error_payload` writes it"""

    id: int
    error: bytes


class Close(msgspec.Struct, frozen=True, array_like=True, tag="close"):
    """The queen has drained: take nothing more, and end."""


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    """Asks for a :class:`Pong`: a process that hangs sends none."""


class Pong(msgspec.Struct, frozen=True, array_like=True, tag="pong"):
    """The answer to a :class:`Ping`."""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The relay process answers at its socket."""


class Lease(msgspec.Struct, frozen=True, array_like=True, tag="lease"):
    """A request needs a hive.

    :param id: of this process's question; no other of it has the same
    :param failed: ids of hives that could not be reached for it
    """

    id: int
    model: str
    task: Task
    failed: list[str]


class Count(msgspec.Struct, frozen=True, array_like=True, tag="count"):
    """A request of a key that has a limit, requests a minute."""

    id: int
    key_id: str
    rpm: int


class Released(msgspec.Struct, frozen=True, array_like=True, tag="released"):
    """A lease has ended, or is not wanted any more."""

    id: int


class Ended(msgspec.Struct, frozen=True, array_like=True, tag="ended"):
    """A request has ended; see :class:`wire.metrics.Seen`."""

    path: str
    status: int
    ttft_s: float | None
    model: str | None
    tokens: int


class Told(msgspec.Struct, frozen=True, array_like=True, tag="told"):
    """A caller was refused for what he is; see :class:`wire.trust.Refusals`."""

    who: str
    code: str
    fields: dict[str, str | None]


class HandOver(msgspec.Struct, frozen=True, array_like=True, tag="hand_over"):
    """A connection with a request that process 0 serves; its descriptor comes along.

    :param inode: of its socket, by which the descriptor is known
    :param data: what has been read of it, from the request's head on
    :param addresses: the server's and the caller's where the socket cannot tell them: it leads to
        this process, which speaks TLS with the caller
    """

    inode: int
    data: bytes
    addresses: tuple[tuple[str, int], tuple[str, int]] | None


ToRelay = (
    Begin | HiveHeard | HiveDoubted | HiveGone | Revoked | Leased | Counted | Refused | Ping | Close
)
FromRelay = Ready | Lease | Count | Released | Ended | Told | HandOver | Pong

Came = TypeVar("Came")


class Channel(Generic[Came]):
    """One end. Frames come and go in their order.

    :ivar take: called with each frame that comes
    :ivar over: set when the other end is gone, or has sent what cannot be understood or taken
    """

    def __init__(
        self,
        end: socket.socket,
        decoder: msgspec.msgpack.Decoder[Came],
        take: Callable[[Came], None],
    ) -> None:
        self.take = take
        self.over = asyncio.Event()
        self._socket = end
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()
        self._loop = asyncio.get_running_loop()
        self._came = bytearray()
        self._descriptors: dict[int, int] = {}
        self._waiting: deque[tuple[bytes, int | None]] = deque()
        self._waiting_bytes = 0
        self._flush_soon = self._blocked = False
        end.setblocking(False)
        self._loop.add_reader(end, self._readable)

    def send(self, frame: ToRelay | FromRelay, descriptor: int | None = None) -> None:
        """Send a frame soon, with others of this turn of the loop; nothing when it is over.

        :param descriptor: goes along, and is closed here
        """
        if self.over.is_set():
            if descriptor is not None:
                os.close(descriptor)
            return
        payload = self._encoder.encode(frame)
        self._waiting.append((len(payload).to_bytes(4, "big") + payload, descriptor))
        self._waiting_bytes += 4 + len(payload)
        if self._waiting_bytes > MAX_WAITING:
            log.error("a process of this queen reads nothing; it is given up")
            self.close()
        elif not self._flush_soon and not self._blocked:
            self._flush_soon = True
            self._loop.call_soon(self._flush)

    def descriptor(self, inode: int) -> int | None:
        """The descriptor that came for the socket with this inode, now the caller's to close."""
        return self._descriptors.pop(inode, None)

    def close(self) -> None:
        """Fine to call twice."""
        if self.over.is_set():
            return
        self.over.set()
        self._loop.remove_reader(self._socket)
        if self._blocked:
            self._loop.remove_writer(self._socket)
            self._blocked = False
        self._socket.close()
        sent = (descriptor for _, descriptor in self._waiting if descriptor is not None)
        for descriptor in (*sent, *self._descriptors.values()):
            os.close(descriptor)
        self._waiting.clear()
        self._descriptors.clear()

    # -- reading -----------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(
                self._socket, READ_BYTES, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        for descriptor in descriptors:
            self._descriptors[os.fstat(descriptor).st_ino] = descriptor
        if not data:
            self.close()
            return
        self._came += data
        self._cut()

    def _cut(self) -> None:
        """Take the frames that have come whole. One that is none, or that cannot be taken, ends the
        channel."""
        came, at = self._came, 0
        try:
            while len(came) - at >= 4 and not self.over.is_set():
                begin = at + 4
                end = begin + int.from_bytes(came[at:begin], "big")
                if end > len(came) and end - begin <= MAX_FRAME:
                    break
                at = end
                frame = self._decoded(came, begin, end)
                if frame is None:
                    self.close()
                else:
                    self.take(frame)
        except Exception:
            log.exception("a frame between this queen's processes could not be taken")
            self.close()
        finally:
            del came[:at]

    def _decoded(self, came: bytearray, begin: int, end: int) -> Came | None:
        """A frame; None if it is none."""
        try:
            if end - begin > MAX_FRAME:
                raise ValueError
            return self._decoder.decode(came[begin:end])
        except (msgspec.MsgspecError, ValueError) as error:
            log.error("a frame between this queen's processes is wrong: %s", type(error).__name__)
            return None

    # -- writing -----------------------------------------------------------------------------

    def _flush(self) -> None:
        self._flush_soon = False
        try:
            while self._waiting:
                self._send_some()
        except (BlockingIOError, InterruptedError):
            if not self._blocked:
                self._blocked = True
                self._loop.add_writer(self._socket, self._flush)
            return
        except OSError:
            self.close()
            return
        if self._blocked:
            self._blocked = False
            self._loop.remove_writer(self._socket)

    def _send_some(self) -> None:
        """One call: a frame with a descriptor, or all up to the next of these."""
        waiting = self._waiting
        first, descriptor = waiting.popleft()
        frames = [first]
        while descriptor is None and waiting and waiting[0][1] is None:
            frames.append(waiting.popleft()[0])
        data = b"".join(frames)
        sent = 0
        try:
            if descriptor is None:
                sent = self._socket.send(data)
            else:
                sent = socket.send_fds(self._socket, [data], [descriptor])
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS or descriptor is None:
                raise
            # More are under way than one user may have: this connection ends.
            os.close(descriptor)
            self._waiting_bytes -= len(data)
            data = b""
        finally:
            if sent and descriptor is not None:
                os.close(descriptor)
                descriptor = None
            if sent < len(data):
                waiting.appendleft((data[sent:], descriptor))
            self._waiting_bytes -= sent


def relay_channel(end: socket.socket, take: Callable[[ToRelay], None]) -> Channel[ToRelay]:
    """A relay process's end."""
    return Channel(end, msgspec.msgpack.Decoder(ToRelay), take)


def queens_channel(end: socket.socket, take: Callable[[FromRelay], None]) -> Channel[FromRelay]:
    """Process 0's end."""
    return Channel(end, msgspec.msgpack.Decoder(FromRelay), take)
