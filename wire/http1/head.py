"""The heads of requests and answers, read and written.

:func:`request_head` and :func:`response_head` read them as RFC 9112 §2 to §6 and §9.3 say, one
regular expression for the first line and one for all fields; :func:`request_bytes` and
:func:`response_bytes` write them. Nothing here keeps state or does I/O.

What is refused although one of the RFCs would let it pass: a second ``Content-Length`` even if it
says the same, transfer codings other than ``chunked``, a second ``Host``, ``Content-Type`` or
``Authorization``, ``CONNECT``, and a host that differs from that of an absolute-form target.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from http import HTTPStatus
from typing import Literal, NamedTuple

import msgspec
from msgspec.structs import replace

MAX_HEAD = 64 * 1024  # bytes, from the first line up to and with the empty one
MAX_FIELDS = 128
MAX_LENGTH = 2**53 - 1  # bytes of a body or chunk; more than that some hop's integers cannot hold

Header = tuple[bytes, bytes]
Framing = Literal["none", "length", "chunked", "until_close"]


class Malformed(Exception):
    """The bytes are no message of HTTP/1.1 that Hive takes; their connection has to be closed.

    ``status`` is what to answer: 400, 413, 417, 431, 501 or 505 for a request, 502 for an answer
    of an upstream. ``message`` quotes nothing of what was sent, which may be secret.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class RequestHead(msgspec.Struct, frozen=True, gc=False):
    """What a request says before its body."""

    method: str
    target: bytes
    """As sent: ``/path?query``, ``http://host/path?query`` or ``*``."""
    path: str
    """The target's path as sent, ASCII: percent-encoding and dots are left alone."""
    query: bytes
    """What follows the target's first ``?``, without it."""
    host: bytes
    """The host asked for, with its port if one was sent; empty if an HTTP/1.0 request has none."""
    headers: list[Header]
    """Names in lower case, values without blanks around them, in the order sent."""
    values: dict[bytes, bytes]
    """The values by name; those of several fields are joined by ``", "`` (RFC 9110 §5.3)."""
    minor: int
    """1 for HTTP/1.1, 0 for HTTP/1.0."""
    keep_alive: bool
    length: int | None
    """Bytes of the body, 0 without one; None where it is chunked."""
    chunked: bool
    expect_continue: bool
    upgrade: bytes | None
    """What ``Upgrade`` offers, where ``Connection`` names it."""

    def get(self, name: bytes) -> bytes | None:
        """The value of a header by its lower-case name; None if it was not sent."""
        return self.values.get(name)

    def __repr__(self) -> str:
        return f"<RequestHead {self.method} {self.path}>"


class ResponseHead(msgspec.Struct, frozen=True, gc=False):
    """What an answer says before its body."""

    status: int
    reason: bytes
    headers: list[Header]
    """Names in lower case, values without blanks around them, in the order sent."""
    values: dict[bytes, bytes]
    """The values by name; those of several fields are joined by ``", "`` (RFC 9110 §5.3)."""
    minor: int
    """1 for HTTP/1.1, 0 for HTTP/1.0."""
    keep_alive: bool
    """Whether the connection may be used again; never where the body ends with it."""
    framing: Framing
    length: int | None
    """Bytes of the body where ``framing`` is ``length``, else None."""

    def get(self, name: bytes) -> bytes | None:
        """The value of a header by its lower-case name; None if it was not sent."""
        return self.values.get(name)

    def of_length(self, length: int) -> ResponseHead:
        """The same with another ``Content-Length``, which it has."""
        told = b"%d" % length
        headers = [(n, told if n == b"content-length" else v) for n, v in self.headers]
        return replace(
            self, headers=headers, values={**self.values, b"content-length": told}, length=length
        )

    def __repr__(self) -> str:
        return f"<ResponseHead {self.status} {self.framing}>"


def request_head(
    data: bytes | bytearray | memoryview, start: int = 0, searched: int = 0
) -> tuple[RequestHead, int] | None:
    """Read the head that begins at ``data[start]``: the head, and where its body begins.

    None: more bytes are needed. Call again with the longer ``data``, and with its length of this
    call as ``searched``: then a head that comes byte by byte is searched once, not once a byte.
    One empty line before the head is skipped (RFC 9112 §2.2). Raises :class:`Malformed`.
    """
    if isinstance(data, memoryview):
        data = bytes(data)
    if data.startswith(_CRLF, start):
        start += 2
    end = _end(data, start, searched, _REQUEST)
    if end is None:
        if data[start:] not in (b"", b"\r") and _METHOD.match(data, start) is None:
            raise Malformed(400, _NO_REQUEST_LINE)
        return None
    line = _REQUEST_LINE.match(data, start, end)
    if line is None:
        raise Malformed(400, _NO_REQUEST_LINE)
    method, target, version, minor_digit = line.groups()
    minor = _minor(version, minor_digit, _REQUEST)
    headers = _headers(data, line.end(), end, _REQUEST)
    values = _values(headers, _REQUEST)
    host = _host(values, minor)
    path, query = target, b""
    if target[0] != _SLASH:
        path, query, host = _absolute(method, target, host, minor)
    elif b"?" in target:
        path, _, query = target.partition(b"?")
    length, chunked = _length(values, minor, _REQUEST)
    options = _options(values)
    head = RequestHead(
        method.decode("ascii"),
        target,
        path.decode("ascii"),
        query,
        host,
        headers,
        values,
        minor,
        b"close" not in options if minor else b"keep-alive" in options,
        None if chunked else length or 0,
        chunked,
        b"expect" in values and _expects_continue(values[b"expect"], minor),
        values.get(b"upgrade") if minor and b"upgrade" in options else None,
    )
    return head, end + 2


def response_head(
    data: bytes | bytearray | memoryview, start: int, method: str, searched: int = 0
) -> tuple[ResponseHead, int] | None:
    """Read the head of an answer to ``method``; like :func:`request_head`, but skips nothing.

    Interim answers (1xx) are returned, too, with framing ``none``. Raises :class:`Malformed`,
    always with status 502.
    """
    if isinstance(data, memoryview):
        data = bytes(data)
    end = _end(data, start, searched, _ANSWER)
    if end is None:
        if not b"HTTP/1.".startswith(bytes(data[start : start + 7])):
            raise Malformed(502, _NO_STATUS_LINE)
        return None
    line = _STATUS_LINE.match(data, start, end)
    if line is None:
        raise Malformed(502, _NO_STATUS_LINE)
    version, minor_digit, digits, reason = line.groups()
    minor = _minor(version, minor_digit, _ANSWER)
    headers = _headers(data, line.end(), end, _ANSWER)
    values = _values(headers, _ANSWER)
    length, chunked = _length(values, minor, _ANSWER)
    options = _options(values)
    keep_alive = b"close" not in options if minor else b"keep-alive" in options
    status = int(digits)
    framing: Framing
    if status < 200 or status == 204:
        framing = "none"
        keep_alive = keep_alive and not chunked and not length  # its sender may mean a body
    elif status == 304 or method == "HEAD":
        framing = "none"
    elif chunked:
        framing = "chunked"
    elif length is not None:
        framing = "length"
    else:
        framing, keep_alive = "until_close", False
    head = ResponseHead(
        status,
        reason or b"",
        headers,
        values,
        minor,
        keep_alive,
        framing,
        length if framing == "length" else None,
    )
    return head, end + 2


def fields(data: bytes) -> list[Header]:
    """Read whole field lines and nothing else, as a trailer section has; :class:`ValueError` if
    they are anything else. Names are in lower case.
    """
    found = _FIELD.findall(data)
    if len(found) != data.count(b"\n") or not data.endswith(_CRLF):
        raise ValueError("these are no field lines")
    return [(_lower(name), value.rstrip(_BLANKS)) for name, value in found]


@lru_cache(maxsize=64)
def status_line(status: int) -> bytes:
    """``HTTP/1.1 200 OK`` and the like, without CRLF; ``status`` is 100 to 999."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}".encode("ascii")


def response_bytes(status: int, headers: Iterable[Header], body: bytes = b"") -> bytes:
    """An answer's head, and ``body`` behind it. ``headers`` must frame the body: none is added.

    Raises :class:`ValueError` where a header holds CR, LF or NUL.
    """
    return _written(status_line(status), headers, body)


def request_lines(method: str, target: bytes, headers: Iterable[Header]) -> bytes:
    """The lines with which a request's head begins; more and an empty one follow.

    Raises what :func:`request_bytes` does.
    """
    return request_bytes(method, target, headers)[: -len(_CRLF)]


def request_bytes(
    method: str, target: bytes, headers: Iterable[Header], body: bytes = b""
) -> bytes:
    """A request's head, and ``body`` behind it. ``headers`` must frame the body: none is added.

    Raises :class:`ValueError` where a header holds CR, LF or NUL, or method or target a blank.
    """
    line = b"%b %b HTTP/1.1" % (method.encode("ascii", "replace"), target)
    if _REQUEST_LINE.fullmatch(line + _CRLF) is None:
        raise ValueError("Method and target make no request line; percent-encode the target.")
    return _written(line, headers, body)


def _written(line: bytes, headers: Iterable[Header], body: bytes) -> bytes:
    lines = [line, *map(b": ".join, headers), b"", b""]
    head = _CRLF.join(lines)
    ends = len(lines) - 1
    if head.count(b"\n") != ends or head.count(b"\r") != ends or b"\0" in head:
        raise ValueError("A header holds CR, LF or NUL, which would end it; take them out.")
    return head + body if body else head


class _Side(NamedTuple):
    """The statuses of one side's faults, and which fields it may send only once."""

    bad: int
    long: int
    length: int
    coding: int
    version: int
    once: frozenset[bytes]


_REQUEST = _Side(
    bad=400,
    long=431,
    length=413,
    coding=501,
    version=505,
    once=frozenset((b"host", b"content-length", b"content-type", b"authorization")),
)
_ANSWER = _Side(502, 502, 502, 502, 502, once=frozenset((b"content-length",)))

_CRLF = b"\r\n"
_EMPTY_LINE = b"\r\n\r\n"
_BLANKS = b" \t"
_SLASH = ord("/")
_NO_OPTIONS: frozenset[bytes] = frozenset()

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_TEXT = rb"[\t\x20-\x7e\x80-\xff]"
_AUTHORITY = rb"(?:\[[0-9A-Za-z:.%\-_~]++\]|[0-9A-Za-z\-._~]*+)(?::[0-9]*+)?"

# Possessive, so that no input makes them go back: each is linear in what it reads.
_REQUEST_LINE = re.compile(rb"(%b++) ([!\"$-~]++) HTTP/([0-9])\.([0-9])\r\n" % _TOKEN)
_STATUS_LINE = re.compile(rb"HTTP/([0-9])\.([0-9]) ([1-9][0-9]{2})(?: (%b*+))?\r\n" % _TEXT)
_FIELD = re.compile(rb"^(%b++):[ \t]*+(%b*+)\r\n" % (_TOKEN, _TEXT), re.MULTILINE)
_METHOD = re.compile(_TOKEN)
_HOST = re.compile(_AUTHORITY)
_ABSOLUTE = re.compile(rb"(?i:https?)://(%b)(/[^?]*+)?+(?:\?(.*+))?+" % _AUTHORITY)
_BARE_LF = re.compile(rb"\n(?<!\r\n)")

_NO_REQUEST_LINE = (
    "The first line is no request line of HTTP/1.1; send 'METHOD target HTTP/1.1' with one space "
    "between them and CRLF at its end, and percent-encode the target."
)
_NO_STATUS_LINE = (
    "The answer's first line is no status line of HTTP/1.1; check that the upstream's port speaks "
    "plain HTTP/1.1."
)


def _end(data: bytes | bytearray, start: int, searched: int, side: _Side) -> int | None:
    """Where the last line before the empty one ends, CRLF included; None if that is to come."""
    limit = start + MAX_HEAD
    found = data.find(_EMPTY_LINE, max(start, searched - 3), limit)
    if found >= 0:
        return found + 2
    if len(data) >= limit:
        raise Malformed(side.long, f"The head is over {MAX_HEAD} bytes; send shorter headers.")
    if _BARE_LF.search(data, max(start, searched)):
        raise Malformed(side.bad, "A line of the head ends in a bare LF; end each with CRLF.")
    return None


def _minor(version: bytes, minor: bytes, side: _Side) -> int:
    if version != b"1" or minor not in (b"0", b"1"):
        raise Malformed(side.version, "Only HTTP/1.1 and HTTP/1.0 are spoken here; use HTTP/1.1.")
    return 1 if minor == b"1" else 0


def _headers(data: bytes | bytearray, start: int, end: int, side: _Side) -> list[Header]:
    lines = data.count(b"\n", start, end)
    if lines > MAX_FIELDS:
        raise Malformed(side.long, f"The head has {lines} fields; send at most {MAX_FIELDS}.")
    found = _FIELD.findall(data, start, end)
    if len(found) != lines:  # a match is one line, from its beginning to its only LF
        raise Malformed(side.bad, _fault(bytes(data[start:end])))
    return [(_lower(name), value.rstrip(_BLANKS)) for name, value in found]


@lru_cache(maxsize=256)
def _lower(name: bytes) -> bytes:
    return name.lower()  # and one object for all that are sent


def _fault(lines: bytes) -> str:
    """What is wrong with the first of these lines that is no field; its number counts from 1."""
    number, line = next(
        (number, line)
        for number, line in enumerate(lines.split(b"\n"), 1)
        if _FIELD.fullmatch(line + b"\n") is None
    )
    name, colon, _ = line.partition(b":")
    if not line.endswith(b"\r"):
        what = "ends in a bare LF; end it with CRLF"
    elif line[:1] in (b" ", b"\t"):
        what = "is folded onto the line before it; send each field on one line"
    elif not colon:
        what = "has no colon; send 'Name: value'"
    elif name.endswith((b" ", b"\t")):
        what = "has a blank before its colon; leave it out"
    elif re.fullmatch(rb"%b+" % _TOKEN, name) is None:
        what = "has an empty or invalid name; send 'Name: value'"
    else:
        what = "has a control character in its value; leave it out or encode it"
    return f"Header line {number} {what}."


def _values(headers: list[Header], side: _Side) -> dict[bytes, bytes]:
    values = dict(headers)
    if len(values) == len(headers):
        return values
    values = {}
    for name, value in headers:
        if name not in values:
            values[name] = value
        elif name in side.once:
            raise Malformed(side.bad, f"There are several {name.decode()} headers; send one.")
        else:
            values[name] = b"%b, %b" % (values[name], value)
    return values


def _host(values: dict[bytes, bytes], minor: int) -> bytes:
    host = values.get(b"host")
    if host is None:
        if minor:
            raise Malformed(400, "There is no Host header; HTTP/1.1 asks for one.")
        return b""
    if not _is_host(host):
        raise Malformed(400, "The Host header is no host; send 'name' or 'name:port'.")
    return host


@lru_cache(maxsize=256)
def _is_host(host: bytes) -> bool:
    return _HOST.fullmatch(host) is not None


def _absolute(method: bytes, target: bytes, host: bytes, minor: int) -> tuple[bytes, bytes, bytes]:
    """Path, query and host of a target that does not begin with a slash (RFC 9112 §3.2)."""
    if method == b"CONNECT":
        raise Malformed(501, "CONNECT is not done here: Hive is no proxy.")
    if target == b"*" and method == b"OPTIONS":
        return b"*", b"", host
    found = _ABSOLUTE.fullmatch(target)
    if found is None or found[1][:1] in (b"", b":"):
        raise Malformed(400, "The target is neither a path nor a URL; send '/path?query'.")
    if minor and found[1].lower() != host.lower():
        raise Malformed(400, "Host and the target's URL name different hosts; send the same.")
    path = found[2] or (b"*" if method == b"OPTIONS" and found[3] is None else b"/")
    return path, found[3] or b"", found[1]


def _length(values: dict[bytes, bytes], minor: int, side: _Side) -> tuple[int | None, bool]:
    """The body's length, None if none is told; whether the body is chunked (RFC 9112 §6)."""
    told = values.get(b"content-length")
    coding = values.get(b"transfer-encoding")
    if coding is not None:
        if told is not None:
            raise Malformed(
                side.bad, "Content-Length and Transfer-Encoding are both there; send one of them."
            )
        if not minor:
            raise Malformed(side.bad, "HTTP/1.0 has no Transfer-Encoding; use HTTP/1.1.")
        if coding.lower() != b"chunked":
            raise Malformed(side.coding, "The only Transfer-Encoding taken is 'chunked'; send it.")
        return None, True
    if told is None:
        return None, False
    if not told.isdigit():
        raise Malformed(side.bad, "Content-Length is no number; send the body's length in bytes.")
    if len(told) > 16 or int(told) > MAX_LENGTH:
        raise Malformed(side.length, f"Content-Length is over {MAX_LENGTH}; send a shorter body.")
    return int(told), False


def _options(values: dict[bytes, bytes]) -> frozenset[bytes]:
    connection = values.get(b"connection")
    return _NO_OPTIONS if connection is None else _options_of(connection)


@lru_cache(maxsize=256)
def _options_of(connection: bytes) -> frozenset[bytes]:
    return frozenset(option.strip(_BLANKS) for option in connection.lower().split(b","))


def _expects_continue(expect: bytes, minor: int) -> bool:
    if not minor:
        return False
    if expect.lower() != b"100-continue":
        raise Malformed(417, "Nothing but 100-continue can be expected; leave Expect out.")
    return True
