"""HTTP/1.1 is read the same in any cut, as a reference reads it, and refused when in doubt."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from random import Random

import h11
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from wire.http1.body import LAST_CHUNK, MAX_EXTENSIONS, MAX_TRAILERS, Chunked, chunk
from wire.http1.head import (
    MAX_FIELDS,
    MAX_HEAD,
    MAX_LENGTH,
    Header,
    Malformed,
    RequestHead,
    ResponseHead,
    request_bytes,
    request_head,
    response_bytes,
    response_head,
)
from wire.http1.template import Template

GET = b"GET / HTTP/1.1\r\nHost: hive\r\n"
POST = b"POST / HTTP/1.1\r\nHost: hive\r\n"
OK = b"HTTP/1.1 200 OK\r\n"


def request(raw: bytes) -> RequestHead:
    read = request_head(raw)
    assert read is not None
    return read[0]


def answer(raw: bytes, method: str = "GET") -> ResponseHead:
    read = response_head(raw, 0, method)
    assert read is not None
    return read[0]


def fault(read: Callable[[], object]) -> Malformed | None:
    try:
        read()
    except Malformed as refusal:
        return refusal
    return None


def cut(raw: bytes, random: Random) -> list[bytes]:
    """``raw`` in pieces: byte by byte, in a few, or in many, as ``random`` has it."""
    if random.random() < 0.1 and len(raw) < 10_000:
        return [raw[i : i + 1] for i in range(len(raw))]
    places = random.choices(range(len(raw) + 1), k=random.choice((0, 1, 2, 3, 5, 20)))
    edges = sorted({0, len(raw), *places})
    return [raw[a:b] for a, b in itertools.pairwise(edges)]


# --- heads: what is refused ---------------------------------------------------------------------

REFUSED_REQUESTS = {
    # smuggling
    "length and coding": (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "coding and length": (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", 400),
    "two lengths": (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
    "two equal lengths": (POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n", 400),
    "list of lengths": (POST + b"Content-Length: 5, 5\r\n\r\n", 400),
    "plus length": (POST + b"Content-Length: +5\r\n\r\n", 400),
    "minus length": (POST + b"Content-Length: -5\r\n\r\n", 400),
    "hexadecimal length": (POST + b"Content-Length: 0x5\r\n\r\n", 400),
    "length with underscore": (POST + b"Content-Length: 1_0\r\n\r\n", 400),
    "blank in length": (POST + b"Content-Length: 1 0\r\n\r\n", 400),
    "empty length": (POST + b"Content-Length:\r\n\r\n", 400),
    "length in other digits": (POST + "Content-Length: ٥\r\n\r\n".encode(), 400),
    "length of 2^53": (POST + b"Content-Length: %d\r\n\r\n" % (MAX_LENGTH + 1), 413),
    "length of 60,000 digits": (POST + b"Content-Length: %b\r\n\r\n" % (b"9" * 60_000), 413),
    "unknown coding": (POST + b"Transfer-Encoding: chunke\r\n\r\n", 501),
    "two codings": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "chunked twice": (POST + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n", 501),
    "identity": (POST + b"Transfer-Encoding: identity\r\n\r\n", 501),
    "xchunked": (POST + b"Transfer-Encoding: xchunked\r\n\r\n", 501),
    "empty coding": (POST + b"Transfer-Encoding:\r\n\r\n", 501),
    "quoted coding": (POST + b'Transfer-Encoding: "chunked"\r\n\r\n', 501),
    "vertical tab in coding": (POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n", 400),
    "coding in HTTP/1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "blank before colon": (POST + b"Transfer-Encoding : chunked\r\n\r\n", 400),
    "tab before colon": (POST + b"Transfer-Encoding\t: chunked\r\n\r\n", 400),
    "folded": (POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n", 400),
    "folded with tab": (POST + b"A: b\r\n\tc\r\n\r\n", 400),
    "blank before first field": (b"GET / HTTP/1.1\r\n Host: hive\r\n\r\n", 400),
    "bare LF between fields": (POST + b"A: b\nContent-Length: 5\r\n\r\n", 400),
    "bare LF after request line": (b"GET / HTTP/1.1\nHost: hive\r\n\r\n", 400),
    "bare LF at the end": (GET + b"A: b\r\n\n", 400),
    "all bare LF": (b"GET / HTTP/1.1\nHost: hive\n\n", 400),
    "bare LF first": (b"\n" + GET + b"\r\n", 400),
    "bare CR in value": (POST + b"A: b\rContent-Length: 5\r\n\r\n", 400),
    "bare CR before CRLF": (POST + b"A: b\r\r\n\r\n", 400),
    "NUL in value": (POST + b"A: b\0c\r\n\r\n", 400),
    "NUL in name": (POST + b"A\0: b\r\n\r\n", 400),
    "NUL in target": (b"GET /\0 HTTP/1.1\r\nHost: hive\r\n\r\n", 400),
    "escape in value": (POST + b"A: \x1b[2J\r\n\r\n", 400),
    "DEL in value": (POST + b"A: \x7f\r\n\r\n", 400),
    # fields
    "empty name": (POST + b": b\r\n\r\n", 400),
    "no colon": (POST + b"A\r\n\r\n", 400),
    "name with slash": (POST + b"A/b: c\r\n\r\n", 400),
    "name with umlaut": (POST + "Ä: b\r\n\r\n".encode(), 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (GET + b"Host: hive\r\n\r\n", 400),
    "two hosts in HTTP/1.0": (b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "list of hosts": (b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    "host with user": (b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", 400),
    "host with path": (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    "host with port of letters": (b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n", 400),
    "two keys": (GET + b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n", 400),
    "other expectation": (GET + b"Expect: cake\r\n\r\n", 417),
    # the request line
    "two blanks": (b"GET  / HTTP/1.1\r\nHost: hive\r\n\r\n", 400),
    "tab": (b"GET\t/ HTTP/1.1\r\nHost: hive\r\n\r\n", 400),
    "blank in target": (b"GET /a b HTTP/1.1\r\nHost: hive\r\n\r\n", 400),
    "blank after version": (b"GET / HTTP/1.1 \r\nHost: hive\r\n\r\n", 400),
    "blank first": (b" GET / HTTP/1.1\r\nHost: hive\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "fragment": (b"GET /#a HTTP/1.1\r\nHost: hive\r\n\r\n", 400),
    "umlaut in target": ("GET /ä HTTP/1.1\r\nHost: hive\r\n\r\n".encode(), 400),
    "lower-case http": (b"GET / http/1.1\r\nHost: hive\r\n\r\n", 400),
    "two empty lines first": (b"\r\n\r\n" + GET + b"\r\n", 400),
    "method with blank": (b"G@T / HTTP/1.1\r\nHost: hive\r\n\r\n", 400),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/1.2": (b"GET / HTTP/1.2\r\nHost: hive\r\n\r\n", 505),
    "HTTP/0.9 in words": (b"GET / HTTP/0.9\r\nHost: hive\r\n\r\n", 505),
    "HTTP/1.10": (b"GET / HTTP/1.10\r\nHost: hive\r\n\r\n", 400),
    "CONNECT": (b"CONNECT hive:80 HTTP/1.1\r\nHost: hive:80\r\n\r\n", 501),
    "GET of *": (b"GET * HTTP/1.1\r\nHost: hive\r\n\r\n", 400),
    "relative target": (b"GET v1 HTTP/1.1\r\nHost: hive\r\n\r\n", 400),
    "other scheme": (b"GET ftp://hive/ HTTP/1.1\r\nHost: hive\r\n\r\n", 400),
    "URL without host": (b"GET http:///a HTTP/1.1\r\nHost:\r\n\r\n", 400),
    "URL with port alone": (b"GET http://:80/a HTTP/1.1\r\nHost: :80\r\n\r\n", 400),
    "URL with user": (b"GET http://a@hive/ HTTP/1.1\r\nHost: hive\r\n\r\n", 400),
    "URL of another host": (b"GET http://other/ HTTP/1.1\r\nHost: hive\r\n\r\n", 400),
    # limits
    "too many fields": (GET + b"A: b\r\n" * MAX_FIELDS + b"\r\n", 431),
    "100 KB value": (GET + b"A: %b\r\n\r\n" % (b"a" * 100_000), 431),
    "100 KB target": (b"GET /%b HTTP/1.1\r\nHost: hive\r\n\r\n" % (b"a" * 100_000), 431),
    "100 KB that never ends": (b"A" * 100_000, 431),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "status"), REFUSED_REQUESTS.values(), ids=REFUSED_REQUESTS)
def test_a_request_is_refused_that_another_parser_could_read_in_another_way(
    raw: bytes, status: int
) -> None:
    with pytest.raises(Malformed) as refusal:
        request_head(raw)
    assert refusal.value.status == status
    assert refusal.value.message.endswith(".")
    assert ";" in refusal.value.message or ":" in refusal.value.message, "says what to do next"


@pytest.mark.parametrize(("raw", "status"), REFUSED_REQUESTS.values(), ids=REFUSED_REQUESTS)
def test_a_bad_request_is_refused_too_when_it_comes_in_pieces(raw: bytes, status: int) -> None:
    """No piece makes it pass, and none is waited for beyond the whole."""
    step = max(1, len(raw) // 200)
    searched = 0
    for end in range(step, len(raw) + step, step):
        found = fault(lambda: request_head(raw[:end], 0, searched))  # noqa: B023
        if found is not None:
            assert found.status in (status, 400)
            return
        assert request_head(raw[:end]) is None
        searched = min(end, len(raw))
    pytest.fail("it was never refused")


REFUSED_ANSWERS = {
    "length and coding": OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n",
    "no number": OK + b"Content-Length: five\r\n\r\n",
    "length of 2^53": OK + b"Content-Length: %d\r\n\r\n" % (MAX_LENGTH + 1),
    "gzip": OK + b"Transfer-Encoding: gzip\r\n\r\n",
    "coding in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "HTTP/2": b"HTTP/2.0 200 OK\r\n\r\n",
    "HTTP/1.2": b"HTTP/1.2 200 OK\r\n\r\n",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "TLS alert": b"\x15\x03\x01\x00\x02\x02\x46",
    "two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "status 099": b"HTTP/1.1 099 OK\r\n\r\n",
    "NUL in reason": b"HTTP/1.1 200 O\0K\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\nA: b\r\n\r\n",
    "bare CR": OK + b"A: b\rc\r\n\r\n",
    "folded": OK + b"A: b\r\n c\r\n\r\n",
    "blank before colon": OK + b"A : b\r\n\r\n",
    "empty line first": b"\r\n" + OK + b"\r\n",
    "100 KB": OK + b"A: %b\r\n\r\n" % (b"a" * 100_000),
    "too many fields": OK + b"A: b\r\n" * (MAX_FIELDS + 1) + b"\r\n",
}


@pytest.mark.parametrize("raw", REFUSED_ANSWERS.values(), ids=REFUSED_ANSWERS)
def test_an_upstreams_bad_answer_is_refused(raw: bytes) -> None:
    with pytest.raises(Malformed) as refusal:
        response_head(raw, 0, "GET")
    assert refusal.value.status == 502


# --- heads: what is read ------------------------------------------------------------------------


def test_a_request_is_read_into_its_parts() -> None:
    raw = (
        b"POST /v1/chat/%63ompletions?a=1?b HTTP/1.1\r\nHost: [::1]:8100\r\n"
        b"X-A:\t one \t two\t \r\nx-a:three\r\nX-Empty: \r\nContent-Length: 005\r\n"
        b"Expect: 100-Continue\r\n\r\nhello"
    )
    read = request_head(b"junk" + raw + b"more", 4)
    assert read is not None
    head, body = read
    assert (b"junk" + raw + b"more")[body:] == b"hellomore"
    assert (head.method, head.path, head.query) == ("POST", "/v1/chat/%63ompletions", b"a=1?b")
    assert (head.target, head.host) == (b"/v1/chat/%63ompletions?a=1?b", b"[::1]:8100")
    assert head.headers[1:4] == [(b"x-a", b"one \t two"), (b"x-a", b"three"), (b"x-empty", b"")]
    assert (head.get(b"x-a"), head.get(b"x-b")) == (b"one \t two, three", None)
    assert (head.length, head.chunked, head.expect_continue) == (5, False, True)
    assert (head.minor, head.keep_alive, head.upgrade) == (1, True, None)


def test_a_request_reads_the_same_from_every_kind_of_buffer() -> None:
    raw = POST + b"Transfer-Encoding: Chunked\r\n\r\n"
    read = request_head(raw)
    assert read is not None
    assert read[0].chunked
    assert read[0].length is None
    assert read == request_head(bytearray(raw)) == request_head(memoryview(raw))
    assert read == request_head(memoryview(b"!" + raw)[1:])
    assert request_head(bytearray(raw[:-1])) is None
    assert response_head(bytearray(OK), 0, "GET") is None
    assert response_head(memoryview(OK + b"\r\n"), 0, "GET") == response_head(
        OK + b"\r\n", 0, "GET"
    )


@pytest.mark.parametrize(
    ("line", "path", "query", "host"),
    [
        (b"GET http://hive HTTP/1.1", "/", b"", b"hive"),
        (b"GET HTTP://hive/a?b?c HTTP/1.1", "/a", b"b?c", b"hive"),
        (b"GET https://HIVE?b HTTP/1.1", "/", b"b", b"HIVE"),
        (b"OPTIONS * HTTP/1.1", "*", b"", b"hive"),
        (b"OPTIONS http://hive HTTP/1.1", "*", b"", b"hive"),
        (b"GET //other/a HTTP/1.1", "//other/a", b"", b"hive"),
    ],
)
def test_a_target_is_a_path_a_url_or_a_star(
    line: bytes, path: str, query: bytes, host: bytes
) -> None:
    head = request(line + b"\r\nHost: hive\r\n\r\n")
    assert (head.path, head.query, head.host) == (path, query, host)


@pytest.mark.parametrize(
    ("head", "keep_alive"),
    [
        (GET, True),
        (GET + b"Connection: keep-alive\r\n", True),
        (GET + b"Connection: CLOSE\r\n", False),
        (GET + b"Connection: x , close\r\n", False),
        (GET + b"Connection: x\r\nConnection: close\r\n", False),
        (GET + b"Connection: enclose\r\n", True),
        (b"GET / HTTP/1.0\r\n", False),
        (b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n", True),
    ],
)
def test_a_connection_is_kept_as_version_and_connection_say(head: bytes, keep_alive: bool) -> None:
    assert request(head + b"\r\n").keep_alive is keep_alive


def test_an_upgrade_holds_only_where_connection_names_it() -> None:
    upgrade = b"Upgrade: hive-trunk/1\r\n"
    assert request(GET + upgrade + b"\r\n").upgrade is None
    assert request(GET + upgrade + b"Connection: Upgrade\r\n\r\n").upgrade == b"hive-trunk/1"
    assert request(b"GET / HTTP/1.0\r\n" + upgrade + b"Connection: upgrade\r\n\r\n").upgrade is None


def test_http_1_0_may_leave_out_host_and_expects_nothing() -> None:
    head = request(b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n")
    assert (head.host, head.expect_continue, head.length) == (b"", False, 1)


def test_one_empty_line_before_a_request_is_skipped() -> None:
    raw = b"\r\n" + GET + b"\r\n"
    assert [request_head(raw[:end]) for end in range(len(raw))] == [None] * len(raw)
    assert request_head(raw) == (request(GET + b"\r\n"), len(raw))


def test_the_largest_head_is_read() -> None:
    fields = b"A: b\r\n" * (MAX_FIELDS - 2)
    room = MAX_HEAD - len(GET + fields + b"Big: \r\n\r\n")
    raw = GET + fields + b"Big: %b\r\n\r\n" % (b"a" * room)
    assert len(raw) == MAX_HEAD
    assert len(request(raw).headers) == MAX_FIELDS
    with pytest.raises(Malformed, match="65536"):
        request_head(GET + fields + b"Big: %b\r\n\r\n" % (b"a" * (room + 1)))


@pytest.mark.parametrize(
    ("raw", "method", "framing", "length", "keep_alive"),
    [
        (OK + b"Content-Length: 5\r\n", "GET", "length", 5, True),
        (OK + b"Content-Length: 0\r\n", "GET", "length", 0, True),
        (OK + b"Content-Length: 5\r\n", "HEAD", "none", None, True),
        (OK + b"Transfer-Encoding: chunked\r\n", "POST", "chunked", None, True),
        (OK + b"Transfer-Encoding: chunked\r\n", "HEAD", "none", None, True),
        (OK + b"Connection: close\r\nContent-Length: 5\r\n", "GET", "length", 5, False),
        (OK, "GET", "until_close", None, False),
        (OK, "HEAD", "none", None, True),
        (b"HTTP/1.0 200 OK\r\n", "GET", "until_close", None, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n", "GET", "length", 5, False),
        (b"HTTP/1.1 204 No Content\r\n", "GET", "none", None, True),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n", "GET", "none", None, True),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n", "GET", "none", None, False),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n", "GET", "none", None, True),
        (b"HTTP/1.1 100 Continue\r\n", "POST", "none", None, True),
        (b"HTTP/1.1 101 Switching Protocols\r\n", "GET", "none", None, True),
        (b"HTTP/1.1 599 \r\nContent-Length: 0\r\n", "GET", "length", 0, True),
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\n", "GET", "length", 0, True),
    ],
)
def test_an_answers_body_ends_where_status_method_and_headers_say(
    raw: bytes, method: str, framing: str, length: int | None, keep_alive: bool
) -> None:
    head = answer(raw + b"\r\n", method)
    assert (head.framing, head.length, head.keep_alive) == (framing, length, keep_alive)


def test_a_head_shows_no_header_and_no_query() -> None:
    head = request(b"GET /a?key=hk-1 HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer hk-2\r\n\r\n")
    assert "hk-" not in repr(head)
    assert repr(head) == "<RequestHead GET /a>"
    assert "hk-" not in repr(answer(OK + b"Set-Cookie: hk-3\r\n\r\n"))


def test_a_refusal_quotes_nothing_that_was_sent() -> None:
    with pytest.raises(Malformed) as refusal:
        request_head(GET + b"A: b\r\nAuthorization: Bearer hk-\x01secret\r\n\r\n")
    assert refusal.value.message == (
        "Header line 3 has a control character in its value; leave it out or encode it."
    )


# --- heads: what is written ---------------------------------------------------------------------


def test_heads_are_written() -> None:
    headers = [(b"host", b"hive"), (b"content-length", b"2")]
    assert request_bytes("POST", b"/a?b", headers, b"hi") == (
        b"POST /a?b HTTP/1.1\r\nhost: hive\r\ncontent-length: 2\r\n\r\nhi"
    )
    assert response_bytes(404, [(b"content-length", b"0")]) == (
        b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
    )
    assert response_bytes(599, []) == b"HTTP/1.1 599 \r\n\r\n"


@pytest.mark.parametrize("bad", [b"a\r\nb: c", b"a\nb", b"a\rb", b"a\0b", b"\r\n\r\nGET /"])
def test_no_header_is_written_that_would_end_early(bad: bytes) -> None:
    for header in ((b"a", bad), (bad, b"a")):
        with pytest.raises(ValueError, match="CR, LF or NUL"):
            response_bytes(200, [header])
        with pytest.raises(ValueError, match="CR, LF or NUL"):
            request_bytes("GET", b"/", [header])


@pytest.mark.parametrize(
    ("method", "target"),
    [("GET", b"/a b"), ("GET", b"/\r\nA: b"), ("GET", b""), ("G T", b"/"), ("", b"/"), ("Ä", b"/")],
)
def test_no_request_line_is_written_that_means_something_else(method: str, target: bytes) -> None:
    with pytest.raises(ValueError, match="request line"):
        request_bytes(method, target, [])


# --- heads: that come again ---------------------------------------------------------------------

AGAIN = (
    b"POST /v1/x?a=b HTTP/1.1\r\nHost: hive\r\nAuthorization: Bearer hk-1\r\n"
    b"content-LENGTH:  %b\r\nX-Content-Length: 5\r\n\r\n"
)


def as_read(head: RequestHead) -> tuple[object, ...]:
    """All that it says, but for its length."""
    headers = [header for header in head.headers if header[0] != b"content-length"]
    return (head.method, head.target, head.host, headers, head.minor, head.keep_alive, head.chunked)


@pytest.mark.parametrize("length", [b"0", b"7", b"007", b"123456789"])
def test_a_head_that_comes_again_is_known_but_for_its_length(length: bytes) -> None:
    first = AGAIN % b"12"
    template = Template.of(first)
    assert template is not None
    second = AGAIN % length
    assert template.match(second + b"body") == (int(length), len(second))


@pytest.mark.parametrize(
    "length",
    [b"", b"+7", b"-7", b" 7", b"7 ", b"0x7", b"7,7", b"7\r\nA: b", b"1234567890", b"\xb2"],
)
def test_a_head_with_another_length_than_digits_is_looked_at_anew(length: bytes) -> None:
    template = Template.of(AGAIN % b"12")
    assert template is not None
    assert template.match(AGAIN % length) is None


def test_a_head_without_a_length_is_not_remembered() -> None:
    assert Template.of(POST + b"Transfer-Encoding: chunked\r\n\r\n") is None
    assert Template.of(POST + b"X-Content-Length: 5\r\n\r\n") is None


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=500)
@given(random=st.randoms(use_true_random=False))
@example(random=Random(1))
def test_what_is_known_again_reads_the_same(random: Random) -> None:
    first = AGAIN % b"12"
    template = Template.of(first)
    assert template is not None
    raw = bytearray(AGAIN % str(random.choice((0, 5, 12, 99_999))).encode() + b"body")
    for _ in range(random.choice((0, 0, 1, 2))):
        at = random.randrange(len(raw))
        raw[at : at + random.choice((0, 1))] = random.choice((b"", b"1", b"\r\n", b"a", b" "))
    found = template.match(bytes(raw))
    if found is not None:
        read = request_head(bytes(raw))
        assert read is not None
        assert (read[0].length, read[1]) == found
        assert as_read(read[0]) == as_read(request(first))


# --- chunked bodies -----------------------------------------------------------------------------


def decoded(pieces: list[bytes]) -> tuple[bytes, bytes, Chunked]:
    """The payload, what follows the body, and the scanner; checks the offsets on the way."""
    body = Chunked()
    payload: list[bytes] = []
    held = passed = rest = b""
    for piece in pieces:
        if body.ended:
            rest += piece
            continue
        offset = body.feed(b"--" + piece, 2, payload) - 2
        if offset or body.ended:
            passed += held + piece[:offset]
            held = b""
        if body.ended:
            rest = piece[offset:]
        else:
            held += piece[offset:]
            assert body.whole is (not held)
    assert b"" not in payload
    if body.ended:
        assert held == b""
        assert passed + rest == b"".join(pieces)
    return b"".join(payload), rest, body


REFUSED_BODIES = {
    "no size": b"\r\nhello\r\n0\r\n\r\n",
    "0x": b"0x5\r\nhello\r\n0\r\n\r\n",
    "plus": b"+5\r\nhello\r\n0\r\n\r\n",
    "minus": b"-5\r\nhello\r\n0\r\n\r\n",
    "underscore": b"1_0\r\nhello\r\n0\r\n\r\n",
    "blank first": b" 5\r\nhello\r\n0\r\n\r\n",
    "blank behind": b"5 \r\nhello\r\n0\r\n\r\n",
    "17 digits": b"00000000000000005\r\nhello\r\n0\r\n\r\n",
    "over 2^53": b"20000000000000\r\nhello",
    "wraps 64 bits": b"ffffffffffffffff\r\nhello",
    "other digits": "٥\r\nhello\r\n0\r\n\r\n".encode(),
    "bare LF after size": b"5\nhello\r\n0\r\n\r\n",
    "bare CR after size": b"5\rhello\r\n0\r\n\r\n",
    "two CRs": b"5\r\r\nhello\r\n0\r\n\r\n",
    "bare LF after payload": b"5\r\nhello\n0\r\n\r\n",
    "no CRLF after payload": b"5\r\nhelloXX0\r\n\r\n",
    "longer than its size": b"4\r\nhello\r\n0\r\n\r\n",
    "shorter than its size": b"6\r\nhello\r\n0\r\n\r\n",
    "bare LF in extension": b"5;a\nhello\r\n0\r\n\r\n",
    "bare CR in extension": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "NUL in extension": b"5;\0\r\nhello\r\n0\r\n\r\n",
    "extension without semicolon": b"5 a\r\nhello\r\n0\r\n\r\n",
    "long extension": b"5;" + b"a" * 600 + b"\r\nhello\r\n0\r\n\r\n",
    "size line that never ends": b"5;" + b"a" * 600,
    "long extension, just": b"5;" + b"a" * 509 + b"\r\nhello\r\n0\r\n\r\n",
    "many extensions": b"1;%b\r\na\r\n" % (b"a" * 400) * (MAX_EXTENSIONS // 400 + 1),
    "bare LF at the end": b"0\r\n\n",
    "bare LF in trailer": b"0\r\nA: b\n\r\n",
    "folded trailer": b"0\r\nA: b\r\n c\r\n\r\n",
    "trailer without colon": b"0\r\nA\r\n\r\n",
    "length in trailer": b"0\r\nContent-Length: 5\r\n\r\n",
    "coding in trailer": b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "long trailer": b"0\r\nA: %b\r\n\r\n" % (b"a" * (MAX_TRAILERS - 7)),
    "far too long trailer": b"0\r\nA: %b\r\n\r\n" % (b"a" * 2 * MAX_TRAILERS),
    "trailers without end": b"0\r\n" + b"A: b\r\n" * 2000,
}


@pytest.mark.parametrize("raw", REFUSED_BODIES.values(), ids=REFUSED_BODIES)
def test_a_chunked_body_is_refused_that_another_parser_could_read_in_another_way(
    raw: bytes,
) -> None:
    random = Random(raw)
    for pieces in ([raw], *(cut(raw, random) for _ in range(30))):
        with pytest.raises(Malformed) as refusal:
            decoded(pieces)
        assert refusal.value.status == 400
        assert ";" in refusal.value.message


@pytest.mark.parametrize("begun", [b"z", b"5 ", b"5\rh", b"5;\0", b"\r"])
def test_a_bad_size_is_refused_before_its_line_ends(begun: bytes) -> None:
    with pytest.raises(Malformed, match="hexadecimal"):
        Chunked().feed(begun)


def test_an_upstreams_bad_body_is_no_fault_of_the_caller() -> None:
    with pytest.raises(Malformed) as refusal:
        Chunked(502).feed(b"five\r\n")
    assert refusal.value.status == 502


def test_a_chunked_body_is_passed_on_where_its_chunks_end() -> None:
    body = Chunked()
    one, two = chunk(b"data: a\n\n"), chunk(b"data: bc\n\n")
    assert body.feed(one + two[:4]) == len(one)
    assert not body.whole
    assert body.feed(two[4:6]) == 0
    assert body.feed(two[6:] + one) == len(two[6:] + one)
    assert body.whole
    assert body.feed(LAST_CHUNK[:3]) == 0
    assert body.feed(LAST_CHUNK[3:] + b"HTTP/1.1 200") == 2
    assert body.ended
    assert body.feed(b"more") == 0, "what follows the body is left alone"


def test_a_limit_on_a_chunked_body_holds_in_any_cut() -> None:
    """The refused table has the next longer ones."""
    trailer = b"A: %b\r\n\r\n" % (b"a" * (MAX_TRAILERS - 8))
    raw = b"5;" + b"a" * 508 + b"\r\nhello\r\n0\r\n" + trailer
    assert len(trailer) == MAX_TRAILERS - 1
    for pieces in ([raw], [raw[i : i + 1] for i in range(len(raw))]):
        payload, rest, body = decoded(pieces)
        assert (payload, rest, body.ended) == (b"hello", b"", True)


def test_the_payload_of_a_large_chunk_does_not_wait_for_its_end() -> None:
    body, pieces = Chunked(), list[bytes]()
    assert body.feed(b"186A0\r\n" + b"a" * 50_000, 0, pieces) == 0
    assert sum(map(len, pieces)) == 50_000
    assert body.feed(b"a" * 50_000 + b"\r", 0, pieces) == 0
    assert not body.whole
    assert body.feed(b"\n", 0, pieces) == 1
    assert body.whole
    assert b"".join(pieces) == b"a" * 100_000


# --- against a reference ------------------------------------------------------------------------

TOKEN = st.text("abcXYZ019!#$%&'*+-.^_`|~", min_size=1, max_size=12).map(str.encode)
VALUE = st.text([chr(c) for c in (9, *range(32, 127), *range(160, 255))], max_size=30).map(
    lambda text: text.encode("latin-1").strip(b" \t")
)
OWS = st.sampled_from((b"", b" ", b"\t", b" \t "))
FRAMING = (b"host", b"content-length", b"transfer-encoding", b"connection", b"expect", b"upgrade")
ONCE = (*FRAMING, b"content-type", b"authorization")
FIELDS = st.lists(st.tuples(TOKEN, OWS, VALUE, OWS), max_size=8).map(
    lambda found: b"".join(
        b"%b:%b%b%b\r\n" % field for field in found if field[0].lower() not in ONCE
    )
)
PAYLOADS = st.lists(st.binary(min_size=1, max_size=300), max_size=6)
EXTENSIONS = st.sampled_from((b"", b"", b"", b";a", b';a="b c"', b";a=b;c"))
ENDS = st.sampled_from((LAST_CHUNK, b"00\r\n\r\n", b"0;a\r\n\r\n", b"0\r\nX-Sum: 1\r\ny:\r\n\r\n"))


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A body's framing field, and its bytes."""
    payloads = draw(PAYLOADS)
    if draw(st.booleans()):
        whole = b"".join(payloads)
        return b"Content-Length: %d\r\n" % len(whole), whole
    size = draw(st.sampled_from((b"%x", b"%X", b"%04x")))
    chunks = [
        size % len(payload) + draw(EXTENSIONS) + b"\r\n" + payload + b"\r\n" for payload in payloads
    ]
    return b"Transfer-Encoding: chunked\r\n", b"".join(chunks) + draw(ENDS)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    method = draw(st.sampled_from((b"GET", b"POST", b"OPTIONS", b"M-SEARCH")))
    target = b"/" + draw(st.text("abc/%2F?&=.;[]{}\\\"'~", max_size=30)).encode()
    framing, body = draw(bodies())
    before, after = draw(FIELDS), draw(FIELDS)
    return b"%b %b HTTP/1.1\r\n%bHost: hive\r\n%b%b\r\n%b" % (
        method, target, before, framing, after, body,
    )  # fmt: skip


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    status = draw(st.sampled_from((b"200 OK", b"404 Not Found", b"503 ", b"299 \xe9t\xe9")))
    framing, body = draw(bodies())
    return b"HTTP/1.1 %b\r\n%b%b%b\r\n%b" % (status, draw(FIELDS), framing, draw(FIELDS), body)


Message = tuple[bytes, bytes, list[Header], bytes]


def reference(raw: bytes, ours: type[h11.CLIENT] | type[h11.SERVER]) -> Message:
    """First line's two parts, headers and payload of one message as h11 reads it."""
    connection = h11.Connection(ours, max_incomplete_event_size=10 * MAX_HEAD)
    if ours is h11.CLIENT:
        connection.send(h11.Request(method="GET", target="/", headers=[("Host", "hive")]))
        connection.send(h11.EndOfMessage())
    connection.receive_data(raw)
    head = connection.next_event()
    assert isinstance(head, h11.Request | h11.Response), head
    payload = b""
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        assert isinstance(event, h11.Data), event
        payload += bytes(event.data)
    headers = [(bytes(name), bytes(value)) for name, value in head.headers]
    if isinstance(head, h11.Request):
        return bytes(head.method), bytes(head.target), headers, payload
    return b"%d" % head.status_code, bytes(head.reason), headers, payload


def read_in_pieces(pieces: list[bytes], method: str | None) -> tuple[list[Message], bytes]:
    """Every whole message in ``pieces`` (answers to ``method``, or requests), and what is left."""
    messages: list[Message] = []
    data = bytearray()
    searched = 0
    head: RequestHead | ResponseHead | None = None
    body: Chunked | None = None
    payload: list[bytes] = []
    for piece in pieces:
        data += piece
        while True:
            if head is None:
                read = (
                    request_head(data, 0, searched)
                    if method is None
                    else response_head(data, 0, method, searched)
                )
                searched = len(data)
                if read is None:
                    break
                head, begin = read
                del data[:begin]
                body = None if head.length is not None else Chunked()
                payload = []
            if body is None:
                assert head.length is not None
                if len(data) < head.length:
                    break
                payload.append(bytes(data[: head.length]))
                del data[: head.length]
            else:
                offset = body.feed(bytes(data), 0, payload)
                del data[: offset if body.ended else len(data)]
                if not body.ended:
                    break
            line = (
                (head.method.encode(), head.target)
                if isinstance(head, RequestHead)
                else (b"%d" % head.status, head.reason)
            )
            messages.append((*line, head.headers, b"".join(payload)))
            head, searched = None, 0
    return messages, bytes(data)


SPLITS = 20  # of each example
THOROUGH = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))


@THOROUGH
@given(st.lists(requests(), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_requests_in_any_cut_are_what_a_reference_reads(raw: list[bytes], random: Random) -> None:
    """5,000 splits, most of them of several requests on one connection."""
    expected = [reference(one, h11.SERVER) for one in raw]
    for _ in range(SPLITS):
        assert read_in_pieces(cut(b"".join(raw), random), None) == (expected, b"")


@THOROUGH
@given(st.lists(answers(), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_answers_in_any_cut_are_what_a_reference_reads(raw: list[bytes], random: Random) -> None:
    """5,000 splits."""
    expected = [reference(one, h11.CLIENT) for one in raw]
    for _ in range(SPLITS):
        assert read_in_pieces(cut(b"".join(raw), random), "GET") == (expected, b"")


SPITE = st.sampled_from(
    (
        *(b"\n", b"\r", b"\r\n", b"\0", b" ", b"\t", b":", b",", b";", b"0", b"\x0b", b"\xff"),
        *(b"chunked", b"Content-Length: 1\r\n", b"Transfer-Encoding: chunked\r\n"),
        *(b"Host: a\r\n", b"\r\n\r\n", b"0\r\n\r\n"),
    )
)


@st.composite
def spoilt(draw: st.DrawFn, messages: st.SearchStrategy[bytes]) -> bytes:
    """A good message with some bytes put in, taken out, or doubled."""
    raw = draw(messages)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(raw)))
        until = at + draw(st.sampled_from((0, 0, 1, 2, 20)))
        raw = raw[:at] + draw(st.one_of(SPITE, st.just(raw[at:until] * 2))) + raw[until:]
    return raw


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(spoilt(requests()), st.randoms(use_true_random=False))
def test_what_is_accepted_of_a_spoilt_request_means_the_same_to_a_reference(
    raw: bytes, random: Random
) -> None:
    """Nothing but :class:`Malformed` is raised, in no cut is it read differently."""
    try:
        messages, left = read_in_pieces([raw], None)
    except Malformed:
        with pytest.raises(Malformed):
            read_in_pieces(cut(raw, random), None)
        return
    assert read_in_pieces(cut(raw, random), None) == (messages, left)
    if messages:
        assert messages[0] == reference(raw.removeprefix(b"\r\n"), h11.SERVER)


@settings(max_examples=1500, deadline=None)
@given(
    st.binary(max_size=400), st.sampled_from((b"", GET, OK, b"5\r\nhello\r\n", b"0\r\nA: b\r\n"))
)
@example(b"", b"\r")
@example(b"\xff\xff\r\n\r\n", b"")
def test_no_bytes_raise_anything_but_malformed(raw: bytes, before: bytes) -> None:
    readers: tuple[Callable[[bytes], object], ...] = (
        request_head,
        lambda data: response_head(data, 0, "GET"),
        Chunked().feed,
        lambda data: decoded([data[i : i + 1] for i in range(len(data))]),
    )
    for read in readers:
        found = fault(lambda: read(before + raw))  # noqa: B023
        assert found is None or found.status in (400, 413, 417, 431, 501, 502, 505)


# --- cost ---------------------------------------------------------------------------------------


def head_byte_by_byte(size: int) -> None:
    raw = GET + b"A: " + b"a" * size
    data = bytearray()
    for byte in raw:
        assert request_head(data, 0, max(0, len(data) - 1)) is None
        data.append(byte)


def refused(raw: bytes) -> None:
    with pytest.raises(Malformed):
        request_head(raw)


def body_byte_by_byte(size: int) -> None:
    body = Chunked()
    for byte in b"%x;%b\r\n%b" % (size, b"e" * 100, b"a" * size):
        body.feed(bytes((byte,)))


HOSTILE: dict[str, Callable[[int], None]] = {
    "byte by byte": head_byte_by_byte,
    "blanks": lambda size: refused(GET + b"A:" + b" " * size + b"\x01\r\n\r\n"),
    "blanks behind": lambda size: refused(GET + b"A: b" + b" \t" * (size // 2) + b"\0\r\n\r\n"),
    "a name without colon": lambda size: refused(GET + b"a" * size + b"\r\n\r\n"),
    "colons": lambda size: refused(GET + b":" * size + b"\r\n\r\n"),
    "empty lines": lambda size: refused(GET + b"\r" * size + b"\n\r\n\r\n"),
    "a target": lambda size: refused(b"GET /" + b"?" * size + b" HTTP/1.1 \r\n\r\n"),
    "a URL": lambda size: refused(b"GET http://h" + b"/:" * (size // 2) + b" HTTP/1.1\r\n\r\n"),
    "a host": lambda size: refused(b"GET / HTTP/1.1\r\nHost: " + b"a:" * (size // 2) + b"\r\n\r\n"),
    "options": lambda size: refused(b"GET / HTTP/1.1\r\nConnection:" + b"," * size + b"\r\n\r\n"),
    "a body byte by byte": body_byte_by_byte,
    "chunks of one byte": lambda size: decoded([b"1\r\na\r\n" * (size // 6)]) and None,
}


def seconds(work: Callable[[int], None], size: int) -> float:
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        work(size)
        times.append(time.perf_counter() - begin)
    return min(times)


@pytest.mark.parametrize("work", HOSTILE.values(), ids=HOSTILE)
def test_eight_times_the_hostile_bytes_cost_about_eight_times_as_much(
    work: Callable[[int], None],
) -> None:
    """Quadratic would be 64 times."""
    assert seconds(work, 64_000) < 30 * seconds(work, 8_000)
