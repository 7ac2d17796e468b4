"""How a queen gets a trunk: a signed request to a proven hive, which becomes the trunk."""

from __future__ import annotations

import asyncio
from typing import Final, cast
from urllib.parse import urlsplit

from operations.errors import HiveError
from wire.headers import SESSION_HEADER
from wire.http1.client import tcp
from wire.http1.head import Malformed, request_bytes, response_head
from wire.peer import Peer
from wire.trunk.caller import Trunk
from wire.trunk.frames import PROTOCOL
from wire.trunk.server import PATH

DIAL_S = 5.0
HEAD_BYTES: Final = 16 * 1024


class NoTrunk(HiveError):
    """The hive answers, and not with a trunk.

    :param lasting: it will not, either, when it is asked again soon
    :param forgotten: it does not know our proof, as one that was started anew does not
    """

    status = 502
    type = "worker_error"
    code = "no_trunk"

    def __init__(self, message: str, *, lasting: bool = False, forgotten: bool = False) -> None:
        super().__init__(message, hop="hive")
        self.lasting = lasting
        self.forgotten = forgotten


async def dial(peer: Peer, name: str) -> Trunk:
    """Connect to a hive that has proven itself, and wait until it has greeted.

    :param name: how messages call it (``hive gpu-0``)
    :raises Unavailable: nobody has proven anything there
    :raises NoTrunk: it refuses, knows no trunk, or does not speak this version
    :raises OSError, TimeoutError: it cannot be reached, or shows another certificate
    """
    parts = urlsplit(peer.base_url)
    connect = tcp(parts.hostname or "", parts.port or 0, fingerprint=peer.fingerprint)
    trunk = Trunk(name, peer.signature)
    upgrade = _Upgrade(trunk)
    try:
        async with asyncio.timeout(DIAL_S):
            await connect(lambda: upgrade)
            signed = peer.signature("GET", PATH, b"", {})
            upgrade.ask(parts.netloc, signed)
            await upgrade.answered
            await trunk.greeted.wait()
    except BaseException:
        trunk.close("nobody waits for it")
        upgrade.abort()
        raise
    if trunk.closed:
        raise NoTrunk(f"The {name} broke off the greeting: {trunk.reason}. See its log.")
    return trunk


class _Upgrade(asyncio.Protocol):
    """The HTTP that comes before the frames."""

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = trunk
        self._data = b""
        self._transport: asyncio.Transport | None = None
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ask(self, host: str, signed: str | None) -> None:
        headers = [
            (b"host", host.encode()),
            (b"connection", b"Upgrade"),
            (b"upgrade", PROTOCOL.encode()),
        ]
        if signed is not None:
            headers.append((SESSION_HEADER.encode(), signed.encode()))
        assert self._transport is not None
        self._transport.write(request_bytes("GET", PATH.encode(), headers))

    def abort(self) -> None:
        self.answered.cancel()
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        try:
            found = response_head(self._data, 0, "GET")
        except Malformed:
            self._fails("what it answers is no HTTP")
            return
        if found is None:
            if len(self._data) > HEAD_BYTES:
                self._fails("the head of its answer does not end")
            return
        head, at = found
        if head.status != 101 or (head.get(b"upgrade") or b"").decode("latin-1") != PROTOCOL:
            # What needs a new proof, or waits for a start, may be had in a moment.
            self._fails(
                f"it answers {head.status}",
                lasting=head.status not in (401, 429) and head.status < 500,
                forgotten=head.status == 401,
            )
            return
        assert self._transport is not None
        self._trunk.take_over(self._transport, self._data[at:])
        if not self.answered.done():
            self.answered.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fails("it hangs up")

    def _fails(self, why: str, *, lasting: bool = False, forgotten: bool = False) -> None:
        if not self.answered.done():
            what = f"The {self._trunk.name} gives no trunk: {why}. Requests go by HTTP."
            self.answered.set_exception(NoTrunk(what, lasting=lasting, forgotten=forgotten))
