"""One daemon's HTTP client for one other daemon: proven before anything is sent, signed after.

Everything that speaks to another daemon (the job client, the relay) uses :attr:`Peer.http`
like any aiohttp session; what is described in :mod:`wire.proof` happens underneath.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp
from pydantic import ValidationError
from pydantic_core import from_json, to_json

from operations.errors import Forbidden, HiveError, Unavailable, from_envelope
from wire.addresses import checked_url, is_address, on_loopback, url_at
from wire.headers import SESSION_HEADER
from wire.http1.client import Unreachable
from wire.proof import HELLO, Answer, Dialler, Digested, Role, Signer, Unproven
from wire.secret import Secret

CONNECT_S = 5.0
HELLO_S = 3.0
KEEPALIVE_S = 60.0
ANSWER_BYTES = 64 * 1024
REFUSED = {
    "foreign_cluster": "What answers at {where} belongs to another cluster. Give both machines one "
    "secret: 'hive secret show' on one of them, 'hive secret set --force' on the other.",
    "no_secret": "What answers at {where} has no cluster secret. Give its machine the one of this "
    "machine ('hive secret show' here, 'hive secret set' there) and start it again.",
    "not_my_url": "What answers at {where} says that this is not an address of its own. Either "
    "somebody there passes requests on, or a port is forwarded: then start it with "
    "'--advertise-url {where}'.",
    "proof_protocol": "What answers at {where} proves itself in another way. Run the same version "
    "of Hive on both machines.",
}
"""What a refused hello means, in words of our own."""

WORDS = 300  # characters of somebody else's message


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
        self._dialler = Dialler(secret, role=role, id=id) if secret else None
        self._roles = roles
        self._lenient = lenient
        self._connect_s = connect_s
        self._line: _Line | None = None
        self._doubted = False
        self._greeting = asyncio.Lock()
        self._renewing: asyncio.Task[None] | None = None

    @property
    def opened(self) -> bool:
        """Whether the other side has proven itself, and there has been no reason to doubt it."""
        return self._line is not None and not self._doubted

    @property
    def base_url(self) -> str:
        """The URL with its host as an address; the proof holds for it, and requests go there."""
        return self.url if self._line is None else self._line.base_url

    @property
    def http(self) -> aiohttp.ClientSession:
        """Signs what it sends. :raises Unavailable: nobody has proven anything there yet"""
        if self._line is None or self._doubted:
            raise Unavailable(
                f"Nobody at {self.url} has proven to belong to this cluster. Try again soon.",
                code="unproven",
            )
        return self._line.http

    @property
    def fingerprint(self) -> str:
        """Of the certificate that every connection must show, in hex; empty without TLS."""
        return "" if self._line is None else self._line.fingerprint

    @property
    def way(self) -> tuple[str, str, str] | None:
        """Address, certificate and life of who has proven itself; None while it is doubted."""
        if self._line is None or self._doubted:
            return None
        signer = self._line.signer
        instance = signer.answer.instance if signer is not None else ""
        return self._line.base_url, self._line.fingerprint, instance

    def signature(
        self, method: str, target: str, body: bytes | Digested, headers: Mapping[str, str]
    ) -> str | None:
        """The :data:`~wire.headers.SESSION_HEADER` of a request that is sent by other means than
        :attr:`http`; None where nobody signs.

        :raises Unavailable: nobody has proven anything there
        """
        signer = self._signer()
        return None if signer is None else signer.header(method, target, body, headers)

    def doubt(self) -> None:
        """It was lost sight of: what is there now must prove itself before more is sent."""
        self._doubted = True

    async def open(self) -> Answer | None:
        """Resolve the host, and let the other side prove itself, anew at each call.

        Requests that run go on, but for a new address or certificate, which cuts them.

        :returns: what the other side says of itself; None without a secret
        :raises Forbidden: there is no secret, and it is not on this machine
        :raises Unproven: it does not know the secret, or is not what it should be
        :raises HiveError: it refuses, in its own words
        :raises aiohttp.ClientError, OSError, TimeoutError: it cannot be reached
        """
        async with self._greeting:
            try:
                return await self._open()
            except BaseException:
                await self._drop()  # whoever is there now is not who was there before
                raise

    async def renew(self) -> None:
        """:meth:`open`, once for all who ask meanwhile; who stops waiting does not stop it.

        :raises Unreachable: it does not prove itself again
        """
        if self._renewing is None:
            self._renewing = asyncio.get_running_loop().create_task(self._renew())
            self._renewing.add_done_callback(self._renewed)
        try:
            await asyncio.shield(self._renewing)
        except (HiveError, aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unreachable(
                f"Who answers at {self.url} does not prove itself again "
                f"({type(error).__name__}). Send the request again.",
                hop="queen",
            ) from None

    async def _renew(self) -> None:
        await self.open()

    def _renewed(self, task: asyncio.Task[None]) -> None:
        self._renewing = None
        if not task.cancelled():
            task.exception()  # whoever waits hears of it

    async def close(self) -> None:
        """Fine to call twice."""
        if self._renewing is not None:
            self._renewing.cancel()
        await self._drop()

    async def _open(self) -> Answer | None:
        base_url = await literal(self.url, self.base_url)
        if self._dialler is None and not on_loopback(base_url):
            raise Forbidden(
                f"{self.url} is another machine, and without a cluster secret nothing proves "
                "who answers there. Give both machines one: 'hive secret new' here, 'hive "
                "secret set' there.",
                code="no_secret",
            )
        fingerprint = await certificate(base_url, self._connect_s)
        signer = None
        if self._dialler is not None:
            signer = await self._greet(self._dialler, base_url, fingerprint)
        line = self._line
        if line is not None and line.leads_to(base_url, fingerprint):
            line.signer = signer
        else:
            await self._drop()
            http = self._session(fingerprint)
            self._line = _Line(base_url, fingerprint, http, signer)
        self._doubted = False
        return signer.answer if signer else None

    async def _drop(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            await line.http.close()

    def _session(self, fingerprint: str) -> aiohttp.ClientSession:
        # An answer may take minutes and every stream holds a connection: no limit, no deadline.
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=KEEPALIVE_S, ssl=pinned(fingerprint)
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s),
            auto_decompress=False,
            middlewares=(self._sign,) if self._dialler else (),
        )

    async def _greet(self, dialler: Dialler, base_url: str, fingerprint: str) -> Signer | None:
        """Say hello; None for a daemon that has no secret, where that is allowed."""
        hello = dialler.hello(base_url)
        timeout = aiohttp.ClientTimeout(total=HELLO_S, sock_connect=self._connect_s)
        # On a connection of its own: a pooled one may have died unseen with the last link.
        fresh = aiohttp.TCPConnector(force_close=True, ssl=pinned(fingerprint))
        async with (
            aiohttp.ClientSession(connector=fresh, timeout=timeout) as http,
            http.post(
                base_url + HELLO,
                data=to_json(hello),
                headers={"content-type": "application/json"},
                allow_redirects=False,
            ) as response,
        ):
            status, raw = response.status, await _read(response)
        if status != 200:
            error = _refusal(status, raw, base_url)
            if self._lenient and error.code == "no_secret" and on_loopback(base_url):
                return None
            raise error
        try:
            answer = Answer.model_validate_json(raw)
        except ValidationError:
            raise Unproven(f"What answers at {self.url} is no Hive daemon.") from None
        signer = dialler.accept(hello, answer, fingerprint)
        if answer.role not in self._roles:
            raise Unproven(f"At {self.url} there is a {answer.role}, not a {self._roles[0]}.")
        return signer

    async def _sign(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """aiohttp's middleware: signs, and says hello again to a daemon that was started anew."""
        used = self._signer()
        response = await self._send_signed(used, request, handler)
        if response.status != 401:
            return response
        error = _refusal(401, await _read(response), self.url)
        if error.code == "unknown_session":
            async with self._greeting:
                if self._line is not None and self._line.signer is used:
                    await self._open()
            return await self._send_signed(self._signer(), request, handler)
        if error.hop == "worker":
            raise error  # an engine's own keys are the caller's business
        raise Unavailable(
            f"The daemon at {self.url} does not accept this one's proof ({error.code}). "
            "Look at its log.",
            code="proof_refused",
        )

    def _signer(self) -> Signer | None:
        """:raises Unavailable: nobody has proven anything; nothing may be sent"""
        self.http  # noqa: B018  raises
        assert self._line is not None
        return self._line.signer

    async def _send_signed(
        self,
        signer: Signer | None,
        request: aiohttp.ClientRequest,
        handler: aiohttp.ClientHandlerType,
    ) -> aiohttp.ClientResponse:
        if signer is not None:
            body = request.body
            raw = body if isinstance(body, bytes) else await body.as_bytes()
            request.headers[SESSION_HEADER] = signer.header(
                request.method, request.url.raw_path_qs, raw, request.headers
            )
        return await handler(request)


@dataclass
class _Line:
    """A way to the other side that it has proven.

    :param fingerprint: of the certificate that every connection must show; empty without TLS
    :param signer: None where neither side has a secret, or the other has none and that is allowed
    """

    base_url: str
    fingerprint: str
    http: aiohttp.ClientSession
    signer: Signer | None

    def leads_to(self, base_url: str, fingerprint: str) -> bool:
        return (self.base_url, self.fingerprint) == (base_url, fingerprint)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body, as far as anybody needs it who says hello or refuses."""
    raw = b""
    async for chunk in response.content.iter_any():
        raw += chunk
        if len(raw) > ANSWER_BYTES:
            break
    return raw


def pinned(fingerprint: str) -> aiohttp.Fingerprint | bool:
    """Trust in this certificate alone; without one, as aiohttp does by itself."""
    return aiohttp.Fingerprint(bytes.fromhex(fingerprint)) if fingerprint else True


def _refusal(status: int, raw: bytes, where: str) -> HiveError:
    try:
        payload = from_json(raw)
    except ValueError:
        payload = None
    if status < 400:
        return Unproven(f"{where} answered a hello with {status}; it is no Hive daemon.")
    error = from_envelope(status, payload, hop="hive", where=where)
    said = "".join(c if c.isprintable() else " " for c in error.message[:WORDS])
    # A stranger may have written it, and people will read it.
    error.message = REFUSED.get(error.code, "{where} refused; it says: {said}").format(
        where=where, said=said
    )
    return error


async def literal(url: str, known: str = "") -> str:
    """The URL with its host as an address; IPv4 where there is a choice.

    :param known: what it was before; stays so for as long as the name has that address, too
    :raises OSError: the name does not resolve
    :raises ValueError: it is no URL
    """
    parts = urlsplit(checked_url(url))
    host, port = parts.hostname or "", parts.port
    if is_address(host):
        return url_at(parts.scheme, host, port)
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    found.sort(key=lambda info: info[0] != socket.AF_INET)
    places = [url_at(parts.scheme, str(info[4][0]), port) for info in found]
    return known if known in places else places[0]


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
