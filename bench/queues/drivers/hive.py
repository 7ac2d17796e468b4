"""Hive's queue over HTTP: kept connections, one request at a time on each, and an API key."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Coroutine, Sequence
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec
import uvloop

from bench.queues.driver import Async, Said, main, ran

WAIT_S = 20.0


class Refused(Exception):
    """An answer that is no success."""


class Connection(asyncio.Protocol):
    """A kept connection; one request at a time."""

    def __init__(self, head: str) -> None:
        self._head = head
        self._parser = httptools.HttpResponseParser(self)
        self._body = b""
        self._answer: asyncio.Future[Any]
        self._transport: asyncio.Transport

    async def post(self, path: str, body: Any) -> Any:
        """:raises Refused: it was not accepted"""
        self._answer = asyncio.get_running_loop().create_future()
        self._body = b""
        data = msgspec.json.encode(body)
        head = f"POST {path} HTTP/1.1\r\n{self._head}Content-Length: {len(data)}\r\n\r\n"
        self._transport.write(head.encode() + data)
        return await self._answer

    def close(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_exception(Refused(f"the connection was lost: {exc}"))

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if 200 <= status < 300:
            self._answer.set_result(msgspec.json.decode(self._body))
        else:
            self._answer.set_exception(Refused(f"{status}: {self._body.decode()}"))


class Hive(Async):
    def __init__(self, options: Said) -> None:
        super().__init__(options)
        parts = urlsplit(self.url)
        self._host, self._port = parts.hostname or "", parts.port or 0
        key = options.get("key")
        self._head = (
            f"Host: {parts.netloc}\r\nContent-Type: application/json\r\n"
            "Accept: application/json\r\n"
            "Prefer: return=minimal\r\n"  # of a task its id, which is all that others answer
            + (f"Authorization: Bearer {key}\r\n" if key else "")
        )
        self._free: list[Connection] = []
        self._drones = itertools.count(1)

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main)

    async def close(self) -> None:
        for connection in self._free:
            connection.close()

    async def put(self, sent: int) -> None:
        await self._post("/v1/tasks", self._task(sent))

    async def put_all(self, sent: Sequence[int]) -> None:
        await self._post("/v1/tasks", {"tasks": [self._task(one) for one in sent]})

    async def serve(self, workers: int, each: int) -> None:
        await asyncio.gather(*(self._drone(each) for _ in range(workers)))

    async def _drone(self, each: int) -> None:
        connection = await self._connect()
        request = self._request(each)
        while True:
            claims = (await connection.post("/v1/claims", request))["claims"]
            for claim in claims:
                ran(claim["task"]["payload"]["sent"])
            if each == 1:
                for claim in claims:
                    await connection.post(f"/v1/claims/{claim['claim_id']}/complete", {})
            elif claims:
                done = [{"claim_id": claim["claim_id"]} for claim in claims]
                await connection.post("/v1/claims/complete", {"claims": done})

    def finished(self, tasks: int) -> None:
        from bench.queues.past import finished  # its imports would slow every start down

        self.claim(1)
        asyncio.run(finished(self.options["store"], tasks))

    def claim(self, tasks: int) -> list[float]:
        async def one_by_one() -> list[float]:
            connection = await self._connect()
            took: list[float] = []
            for _ in range(tasks):
                await connection.post("/v1/tasks", self._task(0))
                began = time.perf_counter()
                [claim] = (await connection.post("/v1/claims", self._request(1)))["claims"]
                took.append((time.perf_counter() - began) * 1000)
                await connection.post(f"/v1/claims/{claim['claim_id']}/complete", {})
            connection.close()
            return took

        return list(self._within(one_by_one))

    def _task(self, sent: int) -> Said:
        return {"type": self.queue, "payload": {"sent": sent}}

    def _request(self, each: int) -> Said:
        drone = f"bench-{next(self._drones)}"
        return {"drone_id": drone, "types": [self.queue], "wait": WAIT_S, "n": each}

    async def _post(self, path: str, body: Any) -> Any:
        connection = self._free.pop() if self._free else await self._connect()
        answer = await connection.post(path, body)
        self._free.append(connection)
        return answer

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: Connection(self._head), self._host, self._port
        )
        return connection


if __name__ == "__main__":
    main(Hive)
