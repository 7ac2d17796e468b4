"""One daemon's HTTP client for one other daemon: proven before anything is sent, signed after.

Everything that speaks to another daemon (the job client, the relay) uses :attr:`Peer.http`
like any aiohttp session; what is described in :mod:`wire.proof` happens underneath.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from urllib.parse import urlsplit

import aiohttp
from pydantic import ValidationError
from pydantic_core import from_json, to_json

from operations.errors import Forbidden, HiveError, Unavailable, from_envelope
from wire.addresses import on_loopback
from wire.headers import SESSION_HEADER
from wire.proof import HELLO, Answer, Dialler, Role, Signer, Unproven
from wire.secret import Secret

CONNECT_S = 5.0
HELLO_S = 3.0
KEEPALIVE_S = 60.0
ANSWER_BYTES = 64 * 1024


class Peer:
    """A daemon at a URL.

    :param secret: without one, nothing is proven or signed, and only loopback is dialled
    :param roles: what may answer there
    :param lenient: take a daemon on loopback that has no secret as it is
    """

    def __init__(
        self,
        url: str,
        secret: Secret | None,
        *,
        role: Role,
        id: str,
        roles: Sequence[Role],
        lenient: bool = False,
        connect_s: float = CONNECT_S,
    ) -> None:
        self.url = url.rstrip("/")
        self.base_url = self.url
        """The URL with its host as an address, the one that the proof holds for; requests go there.

        Set by :meth:`open`."""
        self.answer: Answer | None = None
        """What the other side said of itself; None before it was asked, and without a secret."""
        self._dialler = Dialler(secret, role=role, id=id) if secret else None
        self._roles = roles
        self._lenient = lenient
        self._connect_s = connect_s
        self._signer: Signer | None = None
        self._fingerprint = ""
        self._http: aiohttp.ClientSession | None = None
        self._greeting = asyncio.Lock()

    @property
    def http(self) -> aiohttp.ClientSession:
        """Signs what it sends. :raises Unavailable: the peer was never opened, or is closed"""
        if self._http is None:
            raise Unavailable(f"There is no connection to {self.url} yet. Try again in a second.")
        return self._http

    @property
    def opened(self) -> bool:
        return self._http is not None

    async def open(self) -> Answer | None:
        """Resolve the host, and let the other side prove itself, anew at each call.

        Requests that run keep their connections; a new certificate begins new ones.

        :raises Forbidden: there is no secret, and it is not on this machine
        :raises Unproven: it does not know the secret, or is not what it should be
        :raises HiveError: it refuses, in its own words
        :raises aiohttp.ClientError, OSError, TimeoutError: it cannot be reached
        """
        async with self._greeting:
            base_url = await literal(self.url, self.base_url)
            if self._dialler is None and not on_loopback(base_url):
                raise Forbidden(
                    f"{self.url} is another machine, and without a cluster secret nothing proves "
                    "who answers there. Give both machines one: 'hive secret new' here, 'hive "
                    "secret set' there.",
                    code="no_secret",
                )
            fingerprint = await certificate(base_url, self._connect_s)
            if self._http is None or (base_url, fingerprint) != (self.base_url, self._fingerprint):
                await self._reconnect(base_url, fingerprint)
            return await self._greet()

    async def close(self) -> None:
        """Fine to call twice."""
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def _reconnect(self, base_url: str, fingerprint: str) -> None:
        await self.close()
        # An answer may take minutes and every stream holds a connection: no limit, no deadline.
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=KEEPALIVE_S, ssl=pinned(fingerprint)
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s),
            auto_decompress=False,
            middlewares=(self._sign,) if self._dialler else (),
        )
        self.base_url, self._fingerprint = base_url, fingerprint
        self._signer = self.answer = None

    async def _greet(self) -> Answer | None:
        if self._dialler is None:
            return None
        hello = self._dialler.hello(self.base_url)
        timeout = aiohttp.ClientTimeout(total=HELLO_S, sock_connect=self._connect_s)
        # On a connection of its own: a pooled one may have died unseen with the last link.
        fresh = aiohttp.TCPConnector(force_close=True, ssl=pinned(self._fingerprint))
        async with (
            aiohttp.ClientSession(connector=fresh, timeout=timeout) as http,
            http.post(
                self.base_url + HELLO,
                data=to_json(hello),
                headers={"content-type": "application/json"},
                allow_redirects=False,
            ) as response,
        ):
            raw = await response.content.read(ANSWER_BYTES)
            status = response.status
        if status != 200:
            error = _refusal(status, raw, self.base_url)
            if self._lenient and error.code == "no_secret" and on_loopback(self.base_url):
                self._signer = self.answer = None
                return None
            raise error
        try:
            answer = Answer.model_validate_json(raw)
        except ValidationError:
            raise Unproven(f"What answers at {self.url} is no Hive daemon.") from None
        signer = self._dialler.accept(hello, answer, self._fingerprint)
        if answer.role not in self._roles:
            raise Unproven(f"At {self.url} there is a {answer.role}, not a {self._roles[0]}.")
        self._signer, self.answer = signer, answer
        return answer

    async def _sign(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        response = await self._send_signed(request, handler)
        if response.status == 401 and await _forgotten(response):
            async with self._greeting:
                await self._greet()
            response = await self._send_signed(request, handler)
        return response

    async def _send_signed(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        if self._signer is not None:
            body = request.body
            raw = body if isinstance(body, bytes) else await body.as_bytes()
            request.headers[SESSION_HEADER] = self._signer.header(
                request.method, request.url.raw_path_qs, raw, request.headers
            )
        return await handler(request)


def pinned(fingerprint: str) -> aiohttp.Fingerprint | bool:
    """Trust in this certificate alone; without one, as aiohttp does by itself."""
    return aiohttp.Fingerprint(bytes.fromhex(fingerprint)) if fingerprint else True


async def _forgotten(response: aiohttp.ClientResponse) -> bool:
    """Whether a 401 says that the session is not known any more; reads it, then."""
    raw = await response.read()
    return _refusal(response.status, raw, "").code == "unknown_session"


def _refusal(status: int, raw: bytes, where: str) -> HiveError:
    try:
        payload = from_json(raw)
    except ValueError:
        payload = None
    if status < 400:
        return Unproven(f"{where} answered a hello with {status}; it is no Hive daemon.")
    return from_envelope(status, payload, hop="hive", where=where)


async def literal(url: str, known: str = "") -> str:
    """The URL with its host as an address; IPv4 where there is a choice.

    :param known: what it was before; stays so for as long as the name has that address, too
    :raises OSError: the name does not resolve
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        found.sort(key=lambda info: info[0] != socket.AF_INET)
        places = [_at(parts.scheme, ipaddress.ip_address(info[4][0]), port) for info in found]
        return known if known in places else places[0]
    return _at(parts.scheme, address, port)


def _at(scheme: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> str:
    shown = f"[{address}]" if address.version == 6 else str(address)
    return f"{scheme}://{shown}:{port}"


async def certificate(url: str, timeout_s: float) -> str:
    """SHA-256 of the certificate shown at an https URL, in hex; empty for http.

    The certificate is not checked against any authority: the proof covers its fingerprint.

    :raises OSError, TimeoutError: nobody answers, or nobody who speaks TLS
    """
    parts = urlsplit(url)
    if parts.scheme != "https":
        return ""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    async with asyncio.timeout(timeout_s):
        _, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=context)
    try:
        shown: ssl.SSLObject = writer.get_extra_info("ssl_object")
        return hashlib.sha256(shown.getpeercert(binary_form=True) or b"").hexdigest()
    finally:
        writer.close()
