"""What the doctor sees of the LAN: interfaces, who is heard by mDNS, who is known, who answers.

Looking comes first (:func:`look`); then pure functions sort what was seen into hives. What it all
means is decided in :mod:`keeper.doctor.verdict`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from job_client.client import JobClient
from keeper import connect
from keeper.doctor.dial import Met, dial, why
from keeper.told import each
from operations.errors import HiveError
from operations.hosts import HiveInfo, Told
from wire import lan, mdns
from wire.addresses import on_loopback
from wire.lan import Interface
from wire.mdns import Sighting
from wire.peer import Peer
from wire.proof import same_url
from wire.secret import Secret

AT_A_TIME = 32  # dialled


@dataclass(frozen=True)
class Link:
    """One address of this machine, and what it is good for.

    :param left_out: why discovery does not use it
    :param deaf: why multicast does not come back on it; not tried where it is left out
    """

    interface: Interface
    left_out: str | None = None
    deaf: str | None = None

    @property
    def used(self) -> bool:
        return self.left_out is None


@dataclass(frozen=True)
class Known:
    """A hive as the queen has it.

    :param why: what is wrong with it, in her words; empty if she hears it
    """

    url: str
    hive_id: str
    found_by: str
    online: bool
    why: str = ""
    version: str = ""


@dataclass(frozen=True)
class Queen:
    """A queen who was asked, and the hives that she told of.

    :param trouble: in words, if she was expected and did not tell
    """

    url: str
    known: Sequence[Known] = ()
    trouble: str = ""


@dataclass(frozen=True)
class Seen:
    """Everything that was looked at.

    :param names: hives that the user asked for, each with its URL
    :param complaints: what was heard by mDNS and is no hive's announcement
    :param queen: None if nobody was named and none runs here
    :param cluster_id: of this machine's secret; None without one
    """

    links: Sequence[Link]
    missing: Sequence[str] = ()
    sightings: Sequence[Sighting] = ()
    complaints: Sequence[str] = ()
    queen: Queen | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    met: Mapping[str, Met] = field(default_factory=dict)
    cluster_id: str | None = None
    seconds: float = 3.0


@dataclass(frozen=True)
class Hive:
    """One hive of this cluster under all of its URLs.

    :param met: one for each URL that was dialled; what answers stands first
    """

    name: str
    met: Sequence[Met]
    sightings: Sequence[Sighting] = ()
    known: Sequence[Known] = ()

    @property
    def best(self) -> Met:
        return self.met[0]

    @property
    def heard(self) -> bool:
        return bool(self.sightings)

    @property
    def answers(self) -> bool:
        through = self.best.trouble == "through_queen" and self.online
        return through or (self.best.well and self.best.role == "hive")

    @property
    def online(self) -> bool:
        """The queen hears it."""
        return any(known.online for known in self.known)

    @property
    def found_by(self) -> str | None:
        """How the queen found it."""
        best = sorted(self.known, key=lambda known: not known.online)
        return best[0].found_by if best else None


# -- looking -------------------------------------------------------------------------------------


async def look(
    secret: Secret | None,
    *,
    url: str | None,
    names: Sequence[str] = (),
    wanted: Sequence[str] = (),
    seconds: float = 3.0,
) -> Seen:
    """Look at this machine's interfaces and listen; then ask the queen, and dial everybody.

    :param url: of a queen or hive that was named
    :param names: hives: ids, hosts or URLs
    :param wanted: interfaces, in place of the chosen ones
    :raises WrongUsage: a name or the URL is none
    """
    urls = {name: _taken_as_host(name) for name in names}
    named = connect.checked_url(url) if url else None
    present = lan.interfaces()
    chosen = lan.chosen(present, wanted)
    (sightings, complaints), links = await asyncio.gather(
        listen(wanted, seconds if chosen else 0), _links(present, wanted)
    )
    seen = Seen(
        links=links,
        missing=lan.missing(present, wanted),
        sightings=sightings,
        complaints=complaints,
        queen=await ask_queen(named, secret),
        names=urls,
        cluster_id=secret.cluster_id if secret else None,
        seconds=seconds,
    )
    seen = replace(seen, names=resolved(seen, named))
    return replace(seen, met=await visit(to_dial(seen), secret))


def _taken_as_host(name: str) -> str:
    """:raises WrongUsage: it cannot be one, and is no URL"""
    return connect.checked_url(name) if "://" in name else connect.decide(name, None, ()).url


async def listen(wanted: Sequence[str], seconds: float) -> tuple[list[Sighting], list[str]]:
    """The hives that announce themselves within so many seconds, and what else was odd."""
    heard: dict[str, Sighting] = {}

    def found(sighting: Sighting) -> None:
        heard[sighting.service] = sighting

    def lost(service: str) -> None:
        heard.pop(service, None)

    browser = mdns.Browser(found, lost, wanted)
    with _complaints() as complaints:
        await browser.start()
        try:
            await asyncio.sleep(seconds)
        finally:
            await browser.stop()
    by_name = sorted(heard.values(), key=lambda sighting: (sighting.hive_id, sighting.service))
    return by_name, complaints


@contextlib.contextmanager
def _complaints() -> Iterator[list[str]]:
    """What mDNS would log, gathered; zeroconf's own log of the same is dropped."""
    gathered: list[str] = []

    class Gather(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            gathered.append(record.getMessage())

    handlers = [(mdns.log, Gather(logging.WARNING)), (logging.getLogger("zeroconf"), None)]
    placed = [(log, handler or logging.NullHandler()) for log, handler in handlers]
    for log, handler in placed:
        log.addHandler(handler)
    try:
        yield gathered
    finally:
        for log, handler in placed:
            log.removeHandler(handler)


async def _links(present: Sequence[Interface], wanted: Sequence[str]) -> list[Link]:
    left_out = dict(lan.left_out(present, wanted))
    used = [interface for interface in present if interface not in left_out]
    deaf = dict(zip(used, await asyncio.gather(*map(mdns.loops, used)), strict=True))
    return [Link(one, left_out.get(one), deaf.get(one)) for one in present]


async def ask_queen(url: str | None, secret: Secret | None) -> Queen | None:
    """What the queen at a URL knows, or the one on loopback; None if none was expected there."""
    key = connect.api_key() if secret is None else None
    met = await dial(url or connect.LOOPBACK[0], secret, key)
    if met.role == "hive" or (url is None and met.trouble == "refused"):
        return None
    if not met.well:
        return Queen(met.url, trouble=why(met))
    peer = None
    if secret is not None:
        peer = Peer(met.url, secret, role="keeper", id="keeper", roles=("queen",))
    try:
        async with JobClient(met.url, api_key=key, peer=peer) as client:
            return Queen(met.url, read_hives(await client.get("/v1/hives", timeout_s=5)))
    except HiveError as error:
        return Queen(met.url, trouble=error.message)


class _Unheard(Told):
    """Found by the queen, and no hive of hers."""

    url: str
    why: str
    found_by: str
    hive_id: str = ""


def read_hives(answer: Any) -> list[Known]:
    """``GET /v1/hives``. :raises HiveError: it is not understood"""
    return [
        *(
            Known(
                hive.hive_url,
                "" if hive.hive_id == hive.hive_url else hive.hive_id,
                hive.found_by,
                hive.state == "online",
                hive.problem or "",
                hive.version or "",
            )
            for hive in each(HiveInfo, answer, "hives")
        ),
        *(
            Known(other.url, other.hive_id, other.found_by, False, other.why)
            for other in each(_Unheard, {"unheard": [], **answer}, "unheard")
        ),
    ]


async def visit(urls: Iterable[str], secret: Secret | None) -> dict[str, Met]:
    """Dial them all, some at a time."""
    places = asyncio.Semaphore(AT_A_TIME)

    async def one(url: str) -> Met:
        async with places:
            return await dial(url, secret)

    return {met.url: met for met in await asyncio.gather(*map(one, urls))}


# -- sorting -------------------------------------------------------------------------------------


def resolved(seen: Seen, named: str | None) -> dict[str, str]:
    """The URL of each hive that was asked for: heard, known to the queen, or taken as a host.

    :param named: what ``--url`` named, which is asked for too unless it is the queen
    """
    by_id = {known.hive_id: known.url for known in (seen.queen.known if seen.queen else ())}
    by_id |= {sighting.hive_id: sighting.urls[0] for sighting in seen.sightings}
    asked = {name: by_id.get(name, url) for name, url in seen.names.items()}
    if named is not None and seen.queen is None:
        asked[named] = named
    return asked


def own(seen: Seen) -> list[Sighting]:
    """Those of this machine's cluster."""
    return [sighting for sighting in seen.sightings if sighting.cluster_id == seen.cluster_id]


def foreign(seen: Seen) -> list[Sighting]:
    """Those of other clusters."""
    return [sighting for sighting in seen.sightings if sighting.cluster_id != seen.cluster_id]


def to_dial(seen: Seen) -> list[str]:
    """Every URL once; without those that mean the loopback of the queen's machine, not ours."""
    queen = seen.queen
    urls = [url for sighting in own(seen) for url in sighting.urls]
    urls += [k.url for k in (queen.known if queen else ()) if not _beside(queen, k.url)]
    urls += seen.names.values()
    found: list[str] = []
    for url in urls:
        if not any(url == other or same_url(url, other) for other in found):
            found.append(url)
    return found


def _beside(queen: Queen | None, url: str) -> bool:
    """On the loopback of a queen who is on another machine."""
    return queen is not None and on_loopback(url) and not on_loopback(queen.url)


def hives(seen: Seen) -> list[Hive]:
    """What was heard, known, asked for and met, as hives: one for each running agent.

    Two URLs are one hive if the same start of an agent answers at both; one that does not answer
    counts to the hive whose id it is said to bear.
    """
    heard, known = own(seen), list(seen.queen.known if seen.queen else ())
    said = {url: s.hive_id for s in heard for url in s.urls}
    said |= {k.url: k.hive_id for k in known if k.hive_id}
    met = dict(seen.met)
    met |= {k.url: Met(k.url, trouble="through_queen") for k in known if _beside(seen.queen, k.url)}
    groups: dict[str, list[Met]] = {}
    running = {m.id: m.instance or m.id for m in reversed(met.values()) if m.well}
    for one in met.values():
        bears = said.get(one.url, "")
        key = (one.instance or one.id) if one.well else running.get(bears, bears or one.url)
        groups.setdefault(key, []).append(one)
    made: list[Hive] = []
    for key, group in groups.items():
        group.sort(key=lambda one: not one.well)
        urls = [one.url for one in group]
        bears = group[0].id or said.get(urls[0], "")
        taken = any(other.name == bears for other in made)
        made.append(
            Hive(
                bears if bears and not taken else urls[0],
                group,
                [s for s in heard if s.instance == key or _any_same(s.urls, urls)],
                [k for k in known if _any_same([k.url], urls)],
            )
        )
    return sorted(made, key=lambda hive: hive.name)


def _any_same(some: Iterable[str], others: Sequence[str]) -> bool:
    return any(one == other or same_url(one, other) for one in some for other in others)
