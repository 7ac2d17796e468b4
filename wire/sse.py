"""Server-sent events, both ways (WHATWG HTML, section 9.2)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass

from operations.errors import WorkerBroke

MAX_EVENT_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Event:
    """One event. ``id`` is the event's own id, not the last one seen."""

    data: str
    event: str = "message"
    id: str | None = None

    def encode(self) -> bytes:
        """The event as it goes over the wire, blank line included."""
        return encoded(self.data, self.event, self.id)


def encoded(data: str, event: str = "message", id: str | None = None) -> bytes:
    """An event as it goes over the wire, blank line included."""
    head = "" if id is None else f"id: {id}\n"
    lines = data.replace("\n", "\ndata: ") if "\n" in data else data
    return f"{head}event: {event}\ndata: {lines}\n\n".encode()


class Decoder:
    """Cuts a byte stream into events, however the bytes arrive.

    Lines may end in LF, CRLF or CR; comments and events without data yield nothing.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._event = ""
        self._id: str | None = None
        self._held = 0  # bytes of the event that is being read
        self._first = True
        self._swallow_lf = False

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Take the next bytes; yield the events that they complete.

        :raises WorkerBroke: an event is larger than 16 MiB
        """
        if self._swallow_lf and chunk:
            self._swallow_lf = False
            chunk = chunk.removeprefix(b"\n")
        if self._first and chunk:
            self._first = False
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")
        if chunk.endswith(b"\r"):
            self._swallow_lf = True
        block = self._rest + chunk
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._rest = block.split(b"\n")
        for line in lines:
            event = self._take(line)
            if event is not None:
                yield event
        if self._held + len(self._rest) > MAX_EVENT_BYTES:
            raise WorkerBroke("An event of the stream is larger than 16 MiB; the stream was cut.")

    def _take(self, line: bytes) -> Event | None:
        if not line:
            return self._dispatch()
        if line.startswith(b":"):
            return None
        name, _, raw = line.partition(b":")
        value = raw.removeprefix(b" ").decode("utf-8", "replace")
        match name:
            case b"data":
                self._data.append(value)
                self._held += len(line)
            case b"event":
                self._event = value
            case b"id" if "\0" not in value:
                self._id = value
        return None

    def _dispatch(self) -> Event | None:
        event = None
        if self._data:
            event = Event("\n".join(self._data), self._event or "message", self._id)
        self._data, self._event, self._id, self._held = [], "", None, 0
        return event


async def decode(chunks: AsyncIterator[bytes]) -> AsyncGenerator[Event, None]:
    """The events of a stream of byte chunks."""
    decoder = Decoder()
    async for chunk in chunks:
        for event in decoder.feed(chunk):
            yield event
