"""What the doctor makes of the LAN that it has seen. Pure: what was seen in, findings out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from keeper import words
from keeper.doctor.dial import why
from keeper.doctor.finding import Finding, problem
from keeper.doctor.net import Hive, Link, Queen, Seen, foreign, hives
from wire import mdns
from wire.addresses import hostname, is_loopback, on_loopback
from wire.mdns import Sighting


def judge(seen: Seen, *, with_queen: bool = True) -> list[tuple[str, list[Finding]]]:
    """Findings under headings.

    :param with_queen: false if it has been told already whether she answers
    """
    queen = _queen(seen) if with_queen else []
    others = [*_foreign(seen), *_complained(seen)]
    return [
        ("Network", _network(seen)),
        ("Hives", [*queen, *_hives(seen, hives(seen)), *others]),
    ]


def _network(seen: Seen) -> list[Finding]:
    findings = [
        judge_link(link) for link in seen.links if link.used or link.interface.kind != "loopback"
    ]
    here = ", ".join(dict.fromkeys(link.interface.name for link in seen.links))
    findings += [
        problem(f"This machine has no interface '{name}' with an IPv4 address. It has {here}.")
        for name in seen.missing
    ]
    if not any(link.used for link in seen.links):
        findings.append(
            problem(
                "Discovery uses no interface of this machine, so hives are not found by mDNS. "
                "Connect it to a network, or choose an interface with --interface."
            )
        )
    return findings


def judge_link(link: Link) -> Finding:
    """One address of this machine."""
    interface = link.interface
    what = f"{interface.name}, {interface.address}/{interface.prefix}, {interface.kind}"
    if link.left_out is not None:
        return Finding(f"{what}: not used: {link.left_out}.")
    if link.deaf is None:
        return Finding(f"{what}: used; multicast works on it.")
    return problem(
        f"{what}: used, but multicast does not work on it: {link.deaf}. Mend that (discovery "
        f"needs {mdns.GROUP[0]}, UDP port {mdns.GROUP[1]}), and until then name hives with "
        "'hive queen --hive URL'."
    )


def _queen(seen: Seen) -> list[Finding]:
    if seen.queen is None:
        return [Finding("No queen was asked what she knows: none runs here; --url names one.")]
    if seen.queen.trouble:
        return [problem(f"The queen at {seen.queen.url} does not tell. {seen.queen.trouble}")]
    heard = words.count(sum(known.online for known in seen.queen.known), "hive")
    return [Finding(f"The queen at {seen.queen.url} hears {heard}.")]


def _hives(seen: Seen, found: Sequence[Hive]) -> list[Finding]:
    if not found and seen.cluster_id is None:
        return [
            problem(
                "This machine has no cluster secret, so no hive is taken for its own. Make one "
                "with 'hive secret new', or bring another machine's with 'hive secret set'."
            )
        ]
    if not found:
        return [
            problem(
                f"No hive of this cluster was heard in {seen.seconds:g} s, and none is known. "
                "Start one on each machine with 'hive agent --host 0.0.0.0', or name one: "
                "'hive doctor net HOST'."
            )
        ]
    findings = [finding for hive in found for finding in judge_hive(hive, seen.links, seen.queen)]
    return findings + _doubles(found)


def _doubles(found: Sequence[Hive]) -> list[Finding]:
    """Agents that claim one id."""
    places: dict[str, list[str]] = {}
    for hive in found:
        if hive.best.well and hive.best.role == "hive":
            places.setdefault(hive.best.id, []).append(hive.best.url)
    return [
        problem(
            f"{' and '.join(urls)} are two hives that both call themselves {hive_id}. Start one "
            "of them with another --hive-id."
        )
        for hive_id, urls in places.items()
        if len(urls) > 1
    ]


def judge_hive(hive: Hive, links: Sequence[Link], queen: Queen | None) -> list[Finding]:
    """Whether it is heard, answers and is the queen's, and if not why."""
    best = hive.best
    named = best.url if hive.name == best.url else f"{hive.name} at {best.url}"
    if best.trouble == "through_queen" and hive.online:
        return [Finding(f"{named}: {why(best)}")]
    if best.well and best.role != "hive":
        return [problem(f"{best.url} is a {best.role}, not a hive. Ask her with --url.")]
    if not hive.answers:
        how = "answers, but cannot be used" if best.spoke else "does not answer"
        announced = " It announces itself, though." if hive.heard else ""
        return [problem(f"{named} {how}. {why(best)}{announced}")]
    findings = [_announced(hive, named, links, queen)]
    refused = next((known.why for known in hive.known if known.why), "")
    if queen is not None and not queen.trouble and not hive.online and (hive.heard or refused):
        findings.append(_unknown(hive, queen, refused))
    return findings


def _announced(hive: Hive, named: str, links: Sequence[Link], queen: Queen | None) -> Finding:
    if hive.heard:
        return Finding(f"{named} answers, and was heard on {heard_on(hive.sightings, links)}.")
    reason, text = why_unheard(hive.best.address, links)
    if reason == "loopback":
        return Finding(f"{named} answers. {text}")
    # Where mDNS cannot work, a hive that the queen has all the same is as it should be.
    settled = hive.online and reason in ("other_network", "ipv6")
    said = f"{named} answers, but was not heard by mDNS: {text} {_instead(hive, queen)}"
    return Finding(said, well=settled)


def _instead(hive: Hive, queen: Queen | None) -> str:
    if hive.online:
        by = {"flag": " by --hive", "ready": ": it told her itself"}.get(hive.found_by or "", "")
        return f"The queen has it nevertheless{by}."
    hers = queen.url if queen and not on_loopback(queen.url) else "http://QUEEN:7833"
    return (
        f"Meanwhile name it: 'hive queen --hive {hive.best.url}', or there "
        f"'hive agent --queen-url {hers}'."
    )


def _unknown(hive: Hive, queen: Queen, refused: str) -> Finding:
    if refused:
        return problem(f"The queen at {queen.url} gives {hive.name} no work: {_stopped(refused)}")
    return problem(
        f"The queen at {queen.url} does not know {hive.name}. Start her with "
        f"'--hive {hive.best.url}', or see her log."
    )


def _stopped(sentence: str) -> str:
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."


Reason = Literal[
    "loopback", "ipv6", "deaf", "this_machine", "not_carried", "left_out", "other_network"
]


def why_unheard(address: str, links: Sequence[Link]) -> tuple[Reason, str]:
    """Why a hive that answers at an address is not heard by mDNS: a name and a sentence.

    :param address: IPv4 or IPv6
    """
    if is_loopback(address):
        return "loopback", "On loopback nothing is announced."
    if ":" in address:
        return "ipv6", "it has an IPv6 address, and discovery speaks IPv4 only."
    near = [link for link in links if link.interface.reaches(address)]
    used = [link for link in near if link.used]
    able = [link for link in used if link.deaf is None]
    if able and any(link.interface.address == address for link in links):
        return "this_machine", (
            "it runs on this machine and does not announce itself. Was it started with another "
            "--interface? Its log says more."
        )
    if able:
        return "not_carried", (
            f"multicast is not carried between it and {able[0].interface.name} here. Usual "
            "causes are a switch with IGMP snooping, a Wi-Fi access point that keeps its clients "
            "apart, and a firewall there (UDP port 5353)."
        )
    if used:
        return "deaf", f"multicast does not work on {used[0].interface.name} here; see above."
    if near:
        name = near[0].interface.name
        return "left_out", (
            f"it is behind {name}, which discovery does not use ({near[0].left_out}). Start "
            f"daemons here with '--interface {name}'."
        )
    return "other_network", (
        f"it is in none of this machine's networks{_networks(links)}, and mDNS does not cross "
        "routers."
    )


def _networks(links: Sequence[Link]) -> str:
    shown = [f"{i.address}/{i.prefix}" for i in (link.interface for link in links if link.used)]
    return f" ({', '.join(shown)})" if shown else ""


def heard_on(sightings: Iterable[Sighting], links: Sequence[Link]) -> str:
    """The interfaces that lead to what was heard."""
    hosts = [hostname(url) or "" for sighting in sightings for url in sighting.urls]
    used = [link.interface for link in links if link.used]
    names = [i.name for i in used if any(i.reaches(host) for host in hosts)]
    return " and ".join(dict.fromkeys(names)) or "a network with other addresses"


def _foreign(seen: Seen) -> list[Finding]:
    return [
        judge_foreign(sighting, seen.links, known=seen.cluster_id is not None)
        for sighting in foreign(seen)
    ]


def judge_foreign(sighting: Sighting, links: Sequence[Link], *, known: bool) -> Finding:
    """A hive of another cluster. :param known: this machine has a secret"""
    hosts = {hostname(url) for url in sighting.urls}
    what = f"{sighting.hive_id} at {sighting.urls[0]} is of another cluster, {sighting.cluster_id}"
    if not known:
        return Finding(
            f"{what}, heard on {heard_on([sighting], links)}. To join it: 'hive secret show' "
            "there, 'hive secret set' here."
        )
    if any(link.interface.address in hosts for link in links):
        return problem(
            f"{what}, than this machine's secret, though it runs here. Start it again; if "
            "HIVE_SECRET is set for it, set it to the same."
        )
    return Finding(
        f"{what}, heard on {heard_on([sighting], links)}. Should it be one of these: 'hive "
        "secret show' here, 'hive secret set' there."
    )


def _complained(seen: Seen) -> list[Finding]:
    return [Finding(f"Discovery: {_stopped(complaint)}") for complaint in seen.complaints]


# -- as JSON ----------------------------------------------------------------------------------


def document(seen: Seen) -> dict[str, Any]:
    """``interfaces``, ``hives`` and ``foreign``, as JSON has them."""
    return {
        "interfaces": [_interface(link) for link in seen.links],
        "hives": {hive.name: _hive(hive, seen) for hive in hives(seen)},
        "foreign": [
            {
                "hive_id": sighting.hive_id,
                "cluster_id": sighting.cluster_id,
                "version": sighting.version,
                "urls": list(sighting.urls),
                "interface": heard_on([sighting], seen.links),
            }
            for sighting in foreign(seen)
        ],
    }


def _interface(link: Link) -> dict[str, Any]:
    interface = link.interface
    return {
        "name": interface.name,
        "address": interface.address,
        "kind": interface.kind,
        "used": link.used,
        **({} if link.left_out is None else {"why": link.left_out}),
        "multicast": (link.deaf or "loops") if link.used else "not tried: it is not used",
    }


def _hive(hive: Hive, seen: Seen) -> dict[str, Any]:
    findings = judge_hive(hive, seen.links, seen.queen)
    amiss = [finding.text for finding in findings if not finding.well]
    return {
        "url": hive.best.url,
        "heard": hive.heard,
        "answers": hive.answers,
        **({"version": hive.best.version} if hive.best.version else {}),
        **({"why": " ".join(amiss)} if amiss else {}),
        **({"found_by": hive.found_by} if hive.found_by else {}),
    }
