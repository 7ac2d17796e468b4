"""SAQ, on redis or PostgreSQL, by its worker, which does several jobs at a time in one process."""

from __future__ import annotations

from typing import Any

from saq import Queue, Worker

from bench.queues.driver import Async, main, ran


async def run(context: Any, *, sent: int) -> None:
    ran(sent)


class Saq(Async):
    async def open(self) -> None:
        self._queue = Queue.from_url(self.url, name=self.queue)
        await self._queue.connect()

    async def close(self) -> None:
        await self._queue.disconnect()

    def prepare(self) -> None:
        async def nothing() -> None:
            pass

        self._within(nothing)  # it makes its tables when it connects

    async def put(self, sent: int) -> None:
        await self._queue.enqueue("run", sent=sent)

    async def serve(self, workers: int, each: int) -> None:
        await self.open()
        await Worker(self._queue, [run], concurrency=workers).start()


if __name__ == "__main__":
    main(Saq)
