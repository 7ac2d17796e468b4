"""The instruments of ``bench``: what they count is what was sent, and what they say adds up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from urllib.parse import urlsplit
from xml.etree import ElementTree

import aiohttp
import pytest

from bench import serve
from bench.load import Heard, Target, callers, closed_loop, connect, first_token
from bench.meter import Cores, cpu_seconds
from bench.picture import svg
from bench.relay import order
from bench.report import Results
from bench.stages import Answers, Plan, percentile, silence
from bench.subjects import BARE, ENTRIES, QUEEN, QUEEN_AND_HIVE, upstream_running
from bench.upstream import Arrival, Orders
from tests.cluster import until

HERE = min(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
async def upstream() -> AsyncIterator[Target]:
    async with upstream_running(Cores(load=HERE, upstream=HERE, measured=HERE)) as url:
        yield Target(url)


@contextlib.asynccontextmanager
async def answering(pieces: Sequence[bytes]) -> AsyncIterator[Target]:
    """A server that answers the first request in these pieces, and hangs up on the others."""
    left = list(pieces)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        while left:
            writer.write(left.pop(0))
            await asyncio.sleep(0)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        yield Target(f"http://{host}:{port}")


async def raw_answer(upstream: Target, orders: Orders) -> bytes:
    """What the upstream sends, head and chunk framing included."""
    parts = urlsplit(upstream.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(upstream.request(orders, stream=True))
    data = await reader.readuntil(b"\r\n0\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return data


@pytest.mark.parametrize("rate", [0.0, 500.0])
@pytest.mark.parametrize("arrival", ["spread", "steps"])
async def test_a_caller_hears_as_many_tokens_as_were_ordered(
    upstream: Target, rate: float, arrival: Arrival
) -> None:
    heard = Heard(sampling=True)
    async with callers(upstream, heard, 20) as made:
        for caller in made:
            caller.send(upstream.request(Orders(100, rate, arrival), stream=True), stream=True)
        await until(lambda: heard.answers == 20, "all answers to end")
    assert heard.tokens == len(heard.delays_ns) == 20 * 100
    assert all(delay > 0 for delay in heard.delays_ns)
    assert not heard.errors


@pytest.mark.parametrize("seed", range(5))
async def test_tokens_are_counted_wherever_a_relay_cuts_them(upstream: Target, seed: int) -> None:
    whole = await raw_answer(upstream, Orders(50))
    cuts = sorted(random.Random(seed).sample(range(len(whole)), 600))
    pieces = [whole[begin:end] for begin, end in pairwise((0, *cuts, len(whole)))]
    heard = Heard()
    async with answering(pieces) as relay:
        caller = await connect(relay, heard)
        await first_token(caller, relay.request(Orders(50), stream=True), within_s=10)
        caller.hang_up()
    assert (heard.tokens, heard.answers, heard.errors) == (50, 1, {})


async def test_tokens_come_at_the_rate_that_was_ordered(upstream: Target) -> None:
    heard = Heard()
    began = time.monotonic()
    caller = await connect(upstream, heard)
    await first_token(caller, upstream.request(Orders(51, 100.0), stream=True), within_s=10)
    caller.hang_up()
    assert heard.tokens == 51
    assert time.monotonic() - began >= 0.45  # the first token is not waited for


async def test_a_closed_loop_counts_an_answer_for_each_question(upstream: Target) -> None:
    heard = Heard()
    request = upstream.request(Orders(), stream=False, padding=100_000)
    async with callers(upstream, heard, 4) as made:
        with closed_loop(made, request):
            await until(lambda: heard.answers >= 100, "a hundred answers")
    assert not heard.errors


async def test_the_upstream_ends_the_streams_of_callers_that_hang_up(upstream: Target) -> None:
    heard = Heard()
    async with callers(upstream, heard, 50) as made:
        for caller in made:
            caller.send(upstream.request(Orders(10_000, 10.0), stream=True), stream=True)
        await until(lambda: heard.tokens >= 50, "all streams to begin")
    assert await silence(upstream) is not None


async def test_a_refusal_and_a_lost_connection_are_errors_not_answers() -> None:
    heard = Heard()
    async with answering([b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n"]) as target:
        for _ in range(2):
            caller = await connect(target, heard)
            request = target.request(Orders(), stream=True)
            assert await first_token(caller, request, within_s=10) is None
    assert heard.answers == 0
    assert heard.errors == {"status 503": 1, "connection lost: closed": 1}


def test_the_cpu_of_a_process_tree_only_grows() -> None:
    before = cpu_seconds((os.getpid(),))
    until_s = time.process_time() + 0.1
    while time.process_time() < until_s:
        pass
    assert cpu_seconds((os.getpid(),)) - before >= 0.05


def test_a_percentile_is_one_of_the_values() -> None:
    assert percentile(range(1, 101), 50) == 50
    assert percentile(range(1, 101), 99) == 99
    assert percentile([7], 99) == 7


def test_every_round_measures_everything_the_bare_upstream_first() -> None:
    rounds = [order(ENTRIES, number) for number in range(5)]
    assert all(one[0].rows == (BARE,) for one in rounds)
    assert all(set(one) == set(ENTRIES) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


def results() -> Results:
    """Two rounds of a queen beside nginx."""
    made = Results(Plan(), "a machine", "2026-01-01", "abc", {})
    made.versions = {BARE: "", "nginx": "1.22", QUEEN: "1", QUEEN_AND_HIVE: "1"}
    for number, slow in enumerate((1.0, 2.0)):
        made.add(number, (BARE,), Answers(whole={"delay_p50_ms": 0.5}))
        nginx = {"nginx": {"token_us": 20.0 * slow}}
        made.add(number, ("nginx",), Answers(whole={"delay_p50_ms": 0.75}, groups=nginx))
        hive = {QUEEN: {"token_us": 10.0 * slow}, QUEEN_AND_HIVE: {"token_us": 30.0 * slow}}
        made.add(number, (QUEEN, QUEEN_AND_HIVE), Answers({"delay_p50_ms": 1.5}, hive))
    return made


def test_ratios_are_made_round_by_round() -> None:
    made = results()
    assert made.ratios(QUEEN, "nginx", "token_us") == [0.5, 0.5]
    assert made.document()["summary"][QUEEN]["token_us"] == {"median": 15, "min": 10, "max": 20}


def test_delays_are_those_that_a_relay_adds() -> None:
    made = results()
    assert made.values(BARE, "delay_p50_ms") == [0.5, 0.5]
    assert made.values("nginx", "delay_p50_ms") == [0.25, 0.25]
    assert made.values(QUEEN_AND_HIVE, "delay_p50_ms") == [1.0, 1.0]
    assert made.values(QUEEN, "delay_p50_ms") == []  # the path is not hers alone


def test_the_picture_is_whole_and_says_where_it_was_taken() -> None:
    drawn = ElementTree.fromstring(svg(results()))
    text = " ".join(drawn.itertext())
    assert "CPU a token" in text
    assert "a machine; 2026-01-01; abc" in text


def test_a_ratio_compares_what_was_measured_in_one_round() -> None:
    rounds = [
        {"engine": {"output_throughput": 600.0}, "through Hive": {"output_throughput": 594.0}},
        {"engine": {"output_throughput": 500.0}, "through Hive": {"output_throughput": 450.0}},
    ]
    assert serve.ratios(rounds, "output_throughput") == [0.99, 0.9]


async def test_the_engine_on_a_port_says_as_much_as_it_is_asked_for() -> None:
    async with serve.engine_running(rate=1000.0) as url, aiohttp.ClientSession(url) as http:
        body = {"model": "any", "messages": [{"role": "user", "content": "x"}], "max_tokens": 7}
        async with http.post("/v1/chat/completions", json=body) as answer:
            assert (await answer.json())["usage"]["completion_tokens"] == 7
