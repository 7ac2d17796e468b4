"""Where callbacks may go: only where the operator lets them.

A ticket's author chooses its URL, and the queen calls it from within the network: unchecked, that
is a way to whatever only she can reach (server-side request forgery, OWASP A10:2021). So a name
must be one that is allowed, and what it means when it is called must be an address of the open
internet, or one that is allowed as such.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, NamedTuple

from yarl import URL

from operations.errors import InvalidRequest

MOST_CHARS: Final = 2048

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PRINTABLE = re.compile(r"[\x21-\x7e]+")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_HELP = "The operator lists what is, in HIVE_CALLBACK_ALLOW."

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class _Rule(NamedTuple):
    """One word of the list: a name (``*.x``: all below it; ``*``: all), or a network."""

    name: str | None
    network: Network | None
    port: int | None


class Targets:
    """What the operator allows.

    ======================= ==================================================================
    word                    allows
    ======================= ==================================================================
    ``example.com``         this host, as long as its addresses are of the open internet
    ``*.example.com``       every host below it, likewise
    ``*``                   every host, likewise
    ``10.1.0.0/16``         these addresses: in URLs, and as what an allowed name may mean
    ``10.1.2.3``, ``[::1]`` this one
    ``localhost``           this machine under that name
    ``…:8080``              the same at one port
    ======================= ==================================================================

    The default URL is allowed by itself, wherever in the operator's network it leads.
    """

    def __init__(self, words: Iterable[str] = (), default: str | None = None) -> None:
        """:raises ValueError: a word or the URL says nothing that can be allowed"""
        self._rules = [_rule(word) for word in words]
        self.default = default
        self._default: URL | None = None
        if default is not None:
            try:
                self._default = _parsed(default)
            except InvalidRequest as error:
                raise ValueError(error.message) from None

    def check(self, url: str, field: str | None = None) -> URL:
        """What is to be called.

        :param field: where somebody has sent it, for the error
        :raises InvalidRequest: it may not be
        """
        try:
            return self._checked(_parsed(url))
        except InvalidRequest as error:
            error.param = field
            raise

    def _checked(self, parsed: URL) -> URL:
        if parsed == self._default:
            return parsed
        host, port = parsed.host or "", parsed.port or 0
        address = _address(host)
        if address is not None:
            if self._may_call(host, port, address) and (
                self._allowed(address, port) or self._named(host, port)
            ):
                return parsed
        elif self._named(host, port) and (not _is_local(host) or self._localhost(host, port)):
            return parsed
        raise _refused("Callbacks to this host are not allowed.")

    def permits(self, host: str, port: int, address: str) -> bool:
        """Whether what a checked URL's host means now may be called."""
        try:
            return self._may_call(host.lower(), port, ipaddress.ip_address(address))
        except ValueError:
            return False

    def _may_call(self, host: str, port: int, address: Address) -> bool:
        if self._allowed(address, port) or _is_public(address):
            return True
        if self._default is not None and (host, port) == (self._default.host, self._default.port):
            return _address(host) is not None or not _plain(address).is_link_local
        return self._localhost(host, port) and _plain(address).is_loopback

    def _allowed(self, address: Address, port: int) -> bool:
        plain = _plain(address)
        return any(
            rule.network is not None and plain in rule.network and rule.port in (None, port)
            for rule in self._rules
        )

    def _named(self, host: str, port: int) -> bool:
        return any(
            rule.name is not None
            and rule.port in (None, port)
            and (
                rule.name in ("*", host.rstrip("."))
                or (rule.name.startswith("*.") and host.rstrip(".").endswith(rule.name[1:]))
            )
            for rule in self._rules
        )

    def _localhost(self, host: str, port: int) -> bool:
        return _is_local(host) and any(
            rule.name == host.rstrip(".") and rule.port in (None, port) for rule in self._rules
        )


def origin(url: str) -> str:
    """What of a URL can be logged: a path or a query may hold a secret."""
    try:
        return str(URL(url).origin())
    except ValueError:
        return "a URL that is none"


def _parsed(url: str) -> URL:
    """:raises InvalidRequest: it is no URL that could be called"""
    if len(url) > MOST_CHARS or not _PRINTABLE.fullmatch(url) or "\\" in url:
        raise _refused("This is no URL.")
    try:
        parsed = URL(url)
        port = parsed.port
    except ValueError:
        raise _refused("This is no URL.") from None
    host = parsed.host
    if parsed.scheme not in ("http", "https") or not host or not port:
        raise _refused("A callback goes to an http:// or https:// URL.")
    if parsed.user is not None or parsed.password is not None or parsed.fragment:
        raise _refused("A callback's URL has neither user nor password nor fragment.")
    if _address(host) is None:
        name = host.rstrip(".")
        # What ends in a number, a resolver may take for an address (WHATWG URL, section 3.5).
        if not _NAME.fullmatch(name) or _NUMBER.fullmatch(name.rpartition(".")[2]):
            raise _refused("This URL's host is neither a name nor an address in its usual form.")
    return parsed


def _rule(word: str) -> _Rule:
    """:raises ValueError: it says nothing"""
    text, port = word.strip().lower(), None
    if (found := re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]]+):([0-9]{1,5})", text)) is not None:
        text, port = found[1], int(found[2])
        if not 0 < port < 65536:
            raise ValueError(f"'{word}' has no port that can be called")
    try:
        return _Rule(None, ipaddress.ip_network(text.strip("[]")), port)
    except ValueError:
        name = text.rstrip(".")
        if name != "*" and (
            not _NAME.fullmatch(name.removeprefix("*."))
            or _NUMBER.fullmatch(name.rpartition(".")[2])
        ):
            raise ValueError(
                f"'{word}' is neither a host, as example.com or *.example.com, nor an address or "
                "a network, as 10.1.0.0/16"
            ) from None
        return _Rule(name, None, port)


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _plain(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, if it does."""
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or address
    return address


def _is_public(address: Address) -> bool:
    plain = _plain(address)
    if isinstance(plain, IPv6Address) and (plain.teredo or plain.is_site_local):
        return False
    return plain.is_global and not plain.is_multicast and not plain.is_reserved


def _is_local(host: str) -> bool:
    name = host.rstrip(".")
    return name == "localhost" or name.endswith(".localhost")


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(f"{why} {_HELP}", code="callback_refused")
