"""Server-sent events survive any cut of the byte stream."""

from __future__ import annotations

import itertools

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from operations.errors import WorkerBroke
from wire import relay, sse
from wire.relay import Upstream, read_whole, refusal, whole_events


def decoded(chunks: list[bytes]) -> list[sse.Event]:
    decoder = sse.Decoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


def cut(raw: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(raw), *(place % (len(raw) + 1) for place in places)})
    return [raw[a:b] for a, b in itertools.pairwise(edges)]


lines = st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8"), max_size=20)
events = st.builds(
    sse.Event,
    data=st.lists(lines, min_size=1, max_size=3).map("\n".join),
    event=st.just("message"),
    id=st.none() | st.text("0123456789abcdef:", min_size=1, max_size=8),
)


@given(st.lists(events, max_size=5), st.lists(st.integers(0, 10_000), max_size=20))
def test_events_come_back_however_the_bytes_are_cut(
    sent: list[sse.Event], places: list[int]
) -> None:
    raw = b"".join(event.encode() for event in sent)
    assert decoded(cut(raw, places)) == sent


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
@given(places=st.lists(st.integers(0, 200), max_size=10))
def test_every_line_ending_of_the_standard_is_read(ending: bytes, places: list[int]) -> None:
    raw = b": hi\nid: 7\nevent: x\ndata: a\ndata:b\nretry: 5\n\ndata: c\n\n".replace(b"\n", ending)
    assert decoded(cut(raw, places)) == [sse.Event("a\nb", "x", "7"), sse.Event("c")]


def test_an_event_without_end_is_cut_off() -> None:
    with pytest.raises(WorkerBroke):
        decoded([b"x" * 1024 * 1024] * 40)


def test_an_event_of_endless_lines_is_cut_off() -> None:
    with pytest.raises(WorkerBroke):
        decoded([b"data: " + b"x" * 1024 * 1024 + b"\n"] * 40)


async def test_a_refusal_in_two_pieces_is_read_whole() -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(status=400)
        await answer.prepare(request)
        await answer.write(b'{"error":{"message":"the first ')
        await answer.write(b'and the second half"}}')
        await answer.write_eof()
        return answer

    app = web.Application()
    app.router.add_get("/", refuse)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        upstream = Upstream(http, str(server.make_url("")), "worker", "worker w-1", "m")
        async with http.get(server.make_url("/")) as answer:
            error = await refusal(answer, upstream)
    assert error.message.startswith("the first and the second half")


async def test_an_event_that_never_ends_is_cut_off() -> None:
    async def endless():  # type: ignore[no-untyped-def]
        yield b"data: whole\n\n"
        while True:
            yield b"x" * 2**20

    chunks = whole_events(endless())
    assert await anext(chunks) == b"data: whole\n\n"
    with pytest.raises(WorkerBroke, match="more than 16 MiB"):
        await anext(chunks)


async def test_an_answer_that_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "WHOLE_BYTES", 2**20)

    async def endless(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        while True:
            await answer.write(b"x" * 2**16)

    app = web.Application()
    app.router.add_get("/", endless)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        upstream = Upstream(http, str(server.make_url("")), "worker", "worker w-1", "m")
        async with http.get(server.make_url("/")) as answer:
            with pytest.raises(WorkerBroke, match="worker w-1 answers with more than 1 MiB"):
                await read_whole(answer, upstream)


@given(st.lists(events, max_size=5), st.lists(st.integers(0, 10_000), max_size=20))
async def test_a_relay_passes_the_same_bytes_cut_only_between_events(
    sent: list[sse.Event], places: list[int]
) -> None:
    raw = b"".join(event.encode() for event in sent)

    async def chunks():  # type: ignore[no-untyped-def]
        for chunk in cut(raw, places):
            yield chunk

    passed = [chunk async for chunk in whole_events(chunks())]
    assert b"".join(passed) == raw
    assert all(chunk.endswith(b"\n\n") for chunk in passed)
