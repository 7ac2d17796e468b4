"""RQ, by workers that do not fork for each job (``SimpleWorker``): the fastest that it has."""

from __future__ import annotations

from collections.abc import Sequence

from redis import Redis
from rq import Queue, SimpleWorker

from bench.queues.driver import Plain, Said, main, ran


class Rq(Plain):
    def __init__(self, options: Said) -> None:
        super().__init__(options)
        self._queue = self._connected()

    @property
    def processes(self) -> int:
        return 8

    def _connected(self) -> Queue:
        return Queue(self.queue, connection=Redis.from_url(self.url))

    def put(self, sent: int) -> None:
        self._queue.enqueue(ran, sent)

    def put_all(self, sent: Sequence[int]) -> None:
        self._queue.enqueue_many([Queue.prepare_data(ran, (one,)) for one in sent])

    def work(self, workers: int, each: int) -> None:
        queue = self._connected()  # of this process's own
        SimpleWorker([queue], connection=queue.connection).work(logging_level="WARNING")


if __name__ == "__main__":
    main(Rq)
