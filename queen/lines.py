"""The ways from a queen to her hives: the trunk, and plain HTTP where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from queen.trunks import Trunks
from wire.door.body import Body
from wire.door.door import Request
from wire.door.lines import HttpLine, Way, forwarded
from wire.http1.client import Pool, Sink, tcp
from wire.peer import Peer
from wire.trunk.caller import Trunk
from wire.trunk.messages import Open


@dataclass(frozen=True)
class HiveLine:
    """The way to one hive."""

    lines: HiveLines
    peer: Peer
    name: str

    def send(self, request: Request, body: Body, sink: Sink) -> Way:
        """:raises Unavailable: nobody there has proven anything"""
        trunk = self.lines.trunks.to(self.peer.url) if self.lines.trunks else None
        if trunk is not None and isinstance(body, bytes) and trunk.takes(body):
            return _on(trunk, request, body, sink)
        return self.lines.http(self.peer, self.name).send(request, body, sink)


class HiveLines:
    """All of them, by URL."""

    def __init__(self, trunks: Trunks | None) -> None:
        """:param trunks: None sends everything by HTTP"""
        self.trunks = trunks
        self._http: dict[str, tuple[tuple[str, str], HttpLine]] = {}

    def to(self, peer: Peer, hive_id: str) -> HiveLine:
        return HiveLine(self, peer, f"hive {hive_id}")

    def http(self, peer: Peer, name: str) -> HttpLine:
        """:raises Unavailable: nobody there has proven anything"""
        peer.http  # noqa: B018  raises
        place = (peer.base_url, peer.fingerprint)
        known = self._http.get(peer.url)
        if known is not None and known[0] == place:
            return known[1]
        if known is not None:
            known[1].pool.close()
        parts = urlsplit(peer.base_url)
        connect = tcp(parts.hostname or "", parts.port or 0, fingerprint=peer.fingerprint)
        pool = Pool(connect, host=parts.netloc.encode(), name=name, hop="hive")
        line = HttpLine(pool, sign=peer.signature)
        self._http[peer.url] = (place, line)
        return line

    def forget(self, url: str) -> None:
        """That hive is known no more."""
        if known := self._http.pop(url, None):
            known[1].pool.close()

    def close(self) -> None:
        """Fine to call twice."""
        for url in list(self._http):
            self.forget(url)


def _on(trunk: Trunk, request: Request, body: bytes, sink: Sink) -> Way:
    path, _, query = request.target.partition("?")
    head = Open(
        path=path,
        query=query,
        request_id=request.request_id,
        headers=forwarded(request),
        method=request.method,
    )
    return trunk.open(head, body, sink)
