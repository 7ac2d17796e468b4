"""Writes that leave together.

To wake up who is written to costs more than the writing, and who is written to many times in a row
is woken once. So short messages wait until all that one look at the network has brought is worked
through, and leave one behind the other.
"""

from __future__ import annotations

import asyncio


class Outbox:
    """Messages for any number of connections. Belongs to one event loop.

    Whoever writes to a connection, or closes it, by another way than :meth:`write` calls
    :meth:`flush` first.

    :ivar flushes: how often what waited was sent
    """

    __slots__ = ("_waiting", "flushes")

    def __init__(self) -> None:
        self.flushes = 0
        self._waiting: list[tuple[asyncio.WriteTransport, bytes]] = []

    def write(self, transport: asyncio.WriteTransport, data: bytes) -> None:
        """Send in the next turn of the event loop."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self.flush)
        self._waiting.append((transport, data))

    def flush(self) -> None:
        """Send what waits, now."""
        if not self._waiting:
            return
        self.flushes += 1
        waiting, self._waiting = self._waiting, []
        for transport, data in waiting:
            if not transport.is_closing():
                transport.write(data)
