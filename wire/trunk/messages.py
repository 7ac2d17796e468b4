"""What the frames of the trunk say in JSON.

Unknown fields are left aside, so that a newer daemon may say more. A value that this daemon cannot
use harms the stream that it came for, not the trunk; only HELLO and GOAWAY are the trunk's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Annotated, Any, Final, TypeVar

import msgspec
from pydantic_core import to_json

from operations.errors import HiveError, InvalidRequest, TooLarge, WorkerBroke, from_envelope
from wire.trunk.frames import (
    ERROR,
    HEAD,
    MAX_BODY,
    MAX_DATA,
    MIN_WINDOW,
    SHAPES,
    VERSION,
    WINDOW,
    TrunkError,
)

Header = tuple[bytes, bytes]
"""Of an answer: the name in lower case, and the value, as they stand in HTTP."""

ALIKE = 256  # heads of answers that are remembered; most say the same, but for a length

WORDS = 200  # characters of what the other end gives as a reason
MESSAGE_WORDS = 8000

# RFC 9110, 5.1 and 5.5, and RFC 9112, 3.2: what may go into an engine's request as it is. Names and
# routes come again and again, and are remembered; msgspec would match each anew.
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]{1,256}")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_METHOD = re.compile(r"[A-Z]{1,16}")
_PATH = re.compile(r"/[!-~]{0,8191}")
_QUERY = re.compile(r"[!-~]{0,8192}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PLAIN = bytes(set(range(0x20, 0x7F)) - {ord("\\")})  # JSON of these alone holds only such values


class Hello(msgspec.Struct, frozen=True):
    """The first frame of each side.

    :param version: the newest that it speaks; both then speak the older of the two
    :param credit: bytes of an answer that may come before any of it is granted again
    :param frame: bytes of payload that it takes in one DATA
    :param body: bytes of a request's body that it takes in OPEN
    """

    version: Annotated[int, msgspec.Meta(ge=1)]
    credit: Annotated[int, msgspec.Meta(ge=MIN_WINDOW, le=2**31 - 1)] = WINDOW
    frame: Annotated[int, msgspec.Meta(ge=1024, le=2**31 - 1)] = MAX_DATA
    body: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = MAX_BODY


OURS: Final = Hello(VERSION)


class Open(msgspec.Struct, frozen=True, omit_defaults=True):
    """The head of a request.

    :param path: as it stands in the request line
    :param query: without ``?``
    :param headers: lower-case names; one of each
    """

    path: str
    request_id: str
    headers: Mapping[str, str] = {}
    query: str = ""
    method: str = "POST"

    @property
    def target(self) -> str:
        """Path and query, as they stand in the request line."""
        return f"{self.path}?{self.query}" if self.query else self.path


class _Head(msgspec.Struct, frozen=True):
    status: Annotated[int, msgspec.Meta(ge=200, le=599)]
    headers: list[tuple[str, str]]
    chunked: bool


class _Failure(msgspec.Struct, frozen=True):
    status: Annotated[int, msgspec.Meta(ge=400, le=599)]
    error: dict[str, Any]
    retry_after: Annotated[float, msgspec.Meta(ge=0, le=86400)] | None = None


class _GoAway(msgspec.Struct, frozen=True):
    reason: str


_encode = msgspec.json.Encoder().encode
_HELLO = msgspec.json.Decoder(Hello)
_OPEN = msgspec.json.Decoder(Open)
_HEAD = msgspec.json.Decoder(_Head)
_FAILURE = msgspec.json.Decoder(_Failure)
_GOAWAY = msgspec.json.Decoder(_GoAway)

T = TypeVar("T")


def hello_payload(hello: Hello) -> bytes:
    return _encode(hello)


def hello_of(payload: bytes) -> Hello:
    """:raises TrunkError: it cannot be understood, or allows too little"""
    try:
        return _decoded(_HELLO, payload)
    except ValueError:
        raise TrunkError("HELLO that says nothing this daemon can use") from None


def open_payload(head: Open, body: bytes) -> bytes:
    """:raises InvalidRequest: the head is too large for a frame
    :raises TooLarge: the body is; it must go another way
    """
    said = _encode(head)
    if len(said) > 0xFFFF:
        raise InvalidRequest("The request's head is larger than 64 KiB. Send fewer headers.")
    if len(body) > MAX_BODY:
        raise _body_too_large()
    return b"".join((len(said).to_bytes(2, "big"), said, body))


def open_parts(payload: bytes) -> tuple[bytes, bytes]:
    """The JSON of an OPEN, for :func:`open_of`, and the body.

    :raises TrunkError: the head is said to be longer than the frame
    """
    end = 2 + int.from_bytes(payload[:2], "big")
    if end > len(payload):
        raise TrunkError(f"OPEN of {len(payload)} bytes whose head ends at {end}")
    return payload[2:end], payload[end:]


def open_of(said: bytes, body: bytes) -> Open:
    """:raises InvalidRequest, TooLarge: there is no such request"""
    try:
        head = _decoded(_OPEN, said)
        if not (
            _is_route(head.method, head.path)
            and _QUERY.fullmatch(head.query)
            and _REQUEST_ID.fullmatch(head.request_id)
            and _are_fields(said, head.headers.items())
        ):
            raise ValueError
    except ValueError:
        raise InvalidRequest(
            "The request's path or one of its headers cannot be passed on. Send it without "
            "characters that HTTP does not allow there."
        ) from None
    if len(body) > MAX_BODY:
        raise _body_too_large()
    return head


@lru_cache(maxsize=ALIKE)
def head_payload(status: int, headers: tuple[Header, ...], chunked: bool) -> bytes:
    """:raises WorkerBroke: the headers are too large for a frame"""
    said = _Head(status, [(n.decode("latin-1"), v.decode("latin-1")) for n, v in headers], chunked)
    payload = _encode(said)
    if len(payload) > SHAPES[HEAD].most:
        raise WorkerBroke("The engine's headers are larger than 64 KiB. Look at its log.")
    return payload


@lru_cache(maxsize=ALIKE)
def head_of(payload: bytes) -> tuple[int, tuple[Header, ...], bool]:
    """Status, headers, and whether the body is chunked.

    :raises ValueError: it is no head of an answer
    """
    said = _decoded(_HEAD, payload)
    if not _are_fields(payload, said.headers):
        raise ValueError("it has a header that HTTP does not know")
    headers = tuple((n.encode("latin-1"), v.encode("latin-1")) for n, v in said.headers)
    return said.status, headers, said.chunked


def error_payload(error: HiveError, request_id: str) -> bytes:
    """The envelope, and what HTTP says beside it: the status, and when to try again."""
    body = error.body("hive", request_id)
    for words in (None, MESSAGE_WORDS, 0):
        if words is not None:  # an engine's message may quote its whole input
            body = body.model_copy(update={"message": body.message[:words]})
        said = {"status": error.status, "error": body, "retry_after": error.retry_after}
        payload = to_json(said, exclude_none=True)
        if len(payload) <= SHAPES[ERROR].most:
            return payload
    raise AssertionError("an error without a message fits a frame")


def error_of(payload: bytes, where: str) -> HiveError:
    """The error again; one that cannot be understood is a :class:`WorkerBroke`."""
    try:
        said = _decoded(_FAILURE, payload)
    except ValueError:
        return WorkerBroke(f"The {where} failed without saying why; see its log.", hop="hive")
    error = from_envelope(said.status, {"error": said.error}, hop="hive", where=where)
    error.retry_after = said.retry_after
    return error


def goaway_payload(reason: str) -> bytes:
    return _encode(_GoAway(reason[:WORDS].encode("ascii", "replace").decode()))


def reason_of(payload: bytes) -> str:
    """Why the other end goes away, in its words, fit for a log."""
    try:
        said = _decoded(_GOAWAY, payload).reason
    except ValueError:
        return "it did not say why"
    return "".join(c if c.isprintable() else " " for c in said[:WORDS])


def _are_fields(json: bytes, headers: Iterable[tuple[str, str]]) -> bool:
    """Whether HTTP knows such headers. :param json: in which they came"""
    plain = not json.translate(None, _PLAIN)
    return all(_is_name(name) and (plain or _VALUE.fullmatch(value)) for name, value in headers)


@lru_cache(maxsize=256)
def _is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


@lru_cache(maxsize=64)
def _is_route(method: str, path: str) -> bool:
    return _METHOD.fullmatch(method) is not None and _PATH.fullmatch(path) is not None


def _body_too_large() -> TooLarge:
    return TooLarge(f"A body over {MAX_BODY} bytes does not go over the trunk. Send it by HTTP.")


def _decoded(decoder: msgspec.json.Decoder[T], payload: bytes) -> T:
    """:raises ValueError: the one thing that is raised for whatever is wrong"""
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(type(error).__name__) from None
