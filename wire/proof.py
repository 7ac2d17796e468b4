"""How two daemons prove to each other that they know the cluster's secret, and sign what follows.

The dialler sends a nonce and the URL that it dials (its host as an address, never a name that
somebody else may resolve). The acceptor refuses a URL that is not its own, and answers with a
nonce of its own and an HMAC over everything both have said. Both derive a session key from the
same transcript; the dialler proves itself by signing each request with it. So

- nothing that is sent can be used again: the nonces are in every HMAC, each request has a number;
- nobody in the middle can pass a proof on: it holds for the dialled URL alone, and, with TLS,
  for the certificate that the dialler saw;
- a secret is never sent, and no clock is asked.

The transcript and the HMACs are described in ``docs/trust.md``.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from operations.errors import Conflict, Forbidden, Unauthorized
from operations.patterns import HIVE_ID
from wire.headers import JOB_ID_HEADER, QUEEN_HEADER
from wire.keys import SCOPES, Caller
from wire.secret import Secret

PROTOCOL = 1
HELLO = "/v1/daemons/hello"
UNCONFIRMED_S = 30.0
MAX_UNCONFIRMED = 4096
MAX_UNCONFIRMED_OF_ONE = 64
MAX_SESSIONS = 4096
WINDOW = 4096  # requests may overtake each other on several connections, by so many

COVERED = ("content-type", "last-event-id", JOB_ID_HEADER, QUEEN_HEADER)
"""Headers that are signed beside method, target and body."""

Role = Literal["queen", "hive", "keeper"]


class Hello(BaseModel):
    """``POST /v1/daemons/hello``: the dialler's first words; nothing in them is secret."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    protocol: int
    cluster_id: str = Field(pattern=r"^[0-9a-f]{12}$")
    role: Role
    id: str = Field(pattern=HIVE_ID)
    nonce: str = Field(pattern=r"^[0-9a-f]{64}$")
    url: str = Field(max_length=512, pattern=r"^https?://[^\s/?#@]+$")


class Answer(BaseModel):
    """The acceptor's. ``proof`` and ``nonce`` are hex; ``instance`` is new at each start."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    role: Role
    id: str = Field(pattern=HIVE_ID)
    instance: str = Field(pattern=r"^[0-9a-f]{1,32}$")
    session: str = Field(pattern=r"^[0-9a-f]{32}$")
    nonce: str = Field(pattern=r"^[0-9a-f]{64}$")
    proof: str = Field(pattern=r"^[0-9a-f]{64}$")


class Unproven(Forbidden):
    """The other side does not know the secret, or somebody stands between."""

    code = "unproven"


def transcript(hello: Hello, answer: Answer, fingerprint: str) -> bytes:
    """Everything both sides have said, each field on a line of its own (none holds a newline).

    :param fingerprint: SHA-256 of the acceptor's certificate in hex; empty without TLS
    """
    said = (
        f"hive proof {PROTOCOL}",
        *(hello.cluster_id, hello.role, hello.id, hello.nonce, hello.url),
        *(answer.role, answer.id, answer.instance, answer.session, answer.nonce),
        fingerprint,
    )
    return "\n".join(said).encode()


def acceptors_proof(key: bytes, said: bytes) -> str:
    return hmac.digest(key, b"acceptor\n" + said, "sha256").hex()


def session_key(key: bytes, said: bytes) -> hmac.HMAC:
    """What signs the requests of a session: copied for each, which costs less than a new one."""
    return hmac.new(hmac.digest(key, b"session\n" + said, "sha256"), digestmod="sha256")


def signature(
    key: hmac.HMAC, number: int, method: str, target: str, digest: str, headers: Mapping[str, str]
) -> str:
    """The HMAC of one request.

    :param key: as :func:`session_key` gives it
    :param target: path and query, as they stand in the request line
    :param digest: SHA-256 of the body in hex
    """
    covered = "\n".join([headers.get(name, "") for name in COVERED])
    signed = f"{number}\n{method}\n{target}\n{digest}\n{covered}"
    mac = key.copy()
    mac.update(signed.encode("utf-8", "surrogateescape"))
    return mac.hexdigest()


@dataclass
class Session:
    """One dialler, as the acceptor knows it."""

    key: hmac.HMAC
    caller: Caller
    began: float
    address: str = ""
    highest: int = 0
    seen: set[int] = field(default_factory=set)

    def take(self, number: int) -> bool:
        """Whether a request of this number is new; each is taken once."""
        if number in self.seen or number <= self.highest - WINDOW:
            return False
        self.seen.add(number)
        if number > self.highest:
            self.highest = number
        if len(self.seen) > 2 * WINDOW:
            self.seen = {n for n in self.seen if n > self.highest - WINDOW}
        return True


class Acceptor:
    """The side that is dialled."""

    def __init__(
        self, secret: Secret, *, role: Role, id: str, instance: str, fingerprint: str = ""
    ) -> None:
        self._key = secret.derive("proof")
        self._cluster_id = secret.cluster_id
        self._role: Role = role
        self._id = id
        self._instance = instance
        self._fingerprint = fingerprint
        self._unconfirmed: OrderedDict[str, Session] = OrderedDict()
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def greet(self, hello: Hello, own: Iterable[str], address: str = "") -> Answer:
        """Answer a hello.

        :param address: of the dialler; one that says many hellos drives out only its own
        :param own: the URLs under which this daemon is reached, hosts as addresses
        :raises Forbidden: another cluster's dialler, or a URL that is not this daemon's own
        :raises Conflict: another version of the proof
        """
        if hello.protocol != PROTOCOL:
            raise Conflict(
                f"This daemon proves itself by protocol {PROTOCOL}, not {hello.protocol}. "
                "Run the same version of Hive on both machines.",
                code="proof_protocol",
            )
        if hello.cluster_id != self._cluster_id:
            raise Forbidden(
                "This daemon belongs to another cluster. Give both machines one secret: 'hive "
                "secret show' on one of them, 'hive secret set --force' on the other.",
                code="foreign_cluster",
            )
        if not any(same_url(hello.url, url) for url in own):
            raise Forbidden(
                "The URL that was dialled is not an address of this daemon's own; perhaps somebody "
                "passes requests on. docs/trust.md says what to do where a port is forwarded.",
                code="not_my_url",
            )
        answer = Answer(
            role=self._role,
            id=self._id,
            instance=self._instance,
            session=secrets.token_hex(16),
            nonce=secrets.token_hex(32),
            proof="0" * 64,
        )
        said = transcript(hello, answer, self._fingerprint)
        caller = Caller("daemon", f"{hello.role}:{hello.id}", frozenset(SCOPES))
        session = Session(session_key(self._key, said), caller, time.monotonic(), address)
        self._unconfirmed[answer.session] = session
        self._make_room(address)
        return answer.model_copy(update={"proof": acceptors_proof(self._key, said)})

    def check(
        self, header: str, method: str, target: str, headers: Mapping[str, str]
    ) -> tuple[Caller, str]:
        """Who signed a request, and the digest that its body must have.

        :param header: the value of :data:`wire.headers.SESSION_HEADER`
        :raises Unauthorized: ``unknown_session`` when it is not known (any more), which a new
            hello mends; ``bad_signature`` or ``replayed`` when somebody has tampered
        """
        parts = header.split(":")
        if len(parts) != 4 or not (parts[1].isascii() and parts[1].isdigit()):
            raise refused_signature("bad_signature")
        session_id, number, digest, mac = parts[0], int(parts[1][:18]), parts[2], parts[3]
        session, confirmed = self._find(session_id)
        expected = signature(session.key, number, method, target, digest, headers)
        if not hmac.compare_digest(mac.encode(), expected.encode()):
            raise refused_signature("bad_signature")
        if not session.take(number):
            raise refused_signature("replayed")
        if not confirmed:
            del self._unconfirmed[session_id]
            self._sessions[session_id] = session
            while len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(session_id)
        return session.caller, digest

    def _make_room(self, address: str) -> None:
        of_it = [sid for sid, session in self._unconfirmed.items() if session.address == address]
        for session_id in of_it[:-MAX_UNCONFIRMED_OF_ONE]:
            del self._unconfirmed[session_id]
        while len(self._unconfirmed) > MAX_UNCONFIRMED:
            self._unconfirmed.popitem(last=False)

    def _find(self, session_id: str) -> tuple[Session, bool]:
        if session := self._sessions.get(session_id):
            return session, True
        session = self._unconfirmed.get(session_id)
        if session is None or time.monotonic() - session.began > UNCONFIRMED_S:
            raise refused_signature("unknown_session")
        return session, False


class Dialler:
    """The side that dials: one daemon's conversation with one other, as pure steps."""

    def __init__(self, secret: Secret, *, role: Role, id: str) -> None:
        self._key = secret.derive("proof")
        self._cluster_id = secret.cluster_id
        self._role: Role = role
        self._id = id

    def hello(self, url: str) -> Hello:
        return Hello(
            protocol=PROTOCOL,
            cluster_id=self._cluster_id,
            role=self._role,
            id=self._id,
            nonce=secrets.token_hex(32),
            url=url,
        )

    def accept(self, hello: Hello, answer: Answer, fingerprint: str) -> Signer:
        """What signs requests from now on.

        :raises Unproven: the answer's proof is wrong
        """
        said = transcript(hello, answer, fingerprint)
        expected = acceptors_proof(self._key, said)
        if not hmac.compare_digest(answer.proof.encode(), expected.encode()):
            raise Unproven(
                f"What answers at {hello.url} does not know this cluster's secret. Nothing was "
                "sent to it. If it is meant to belong here, give it the secret: 'hive secret set'."
            )
        return Signer(answer, session_key(self._key, said))


class Digested(Protocol):
    """A body that knows its SHA-256."""

    @property
    def digest(self) -> str:
        """In hex."""


class Signer:
    """Signs the requests of one session."""

    def __init__(self, answer: Answer, key: hmac.HMAC) -> None:
        self.answer = answer
        self._key = key
        self._number = 0

    def header(
        self, method: str, target: str, body: bytes | Digested, headers: Mapping[str, str]
    ) -> str:
        """The value of :data:`wire.headers.SESSION_HEADER` for one request."""
        self._number += 1
        digest = hashlib.sha256(body).hexdigest() if isinstance(body, bytes) else body.digest
        mac = signature(self._key, self._number, method, target, digest, headers)
        return f"{self.answer.session}:{self._number}:{digest}:{mac}"


def refused_signature(code: str) -> Unauthorized:
    return Unauthorized(
        "The proof of this request does not hold. Prove yourself anew by /v1/daemons/hello.",
        code=code,
    )


def same_url(one: str, other: str) -> bool:
    """Whether two URLs with addresses as hosts mean the same place."""
    return _place(one) is not None and _place(one) == _place(other)


def _place(url: str) -> tuple[str, object, int] | None:
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        address = ipaddress.ip_address(parts.hostname or "")
        mapped = getattr(address, "ipv4_mapped", None)  # how a socket on :: sees an IPv4 dialler
        return parts.scheme, mapped or address, port
    except ValueError:
        return None
