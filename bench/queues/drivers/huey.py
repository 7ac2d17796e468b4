"""huey, by its consumer's threads. Nothing is acknowledged: a task is deleted when it is taken."""

from __future__ import annotations

import time

from huey import RedisHuey, SqliteHuey

from bench.queues.driver import Plain, Said, main, ran


class Huey(Plain):
    def __init__(self, options: Said) -> None:
        super().__init__(options)
        if self.url.startswith("redis:"):
            self._huey = RedisHuey(self.queue, url=self.url)
        else:
            self._huey = SqliteHuey(self.queue, filename=self.url, fsync=True, timeout=30)
        self._task = self._huey.task()(ran)

    def put(self, sent: int) -> None:
        self._task(sent)

    def work(self, workers: int, each: int) -> None:
        # It polls SQLite. The pause at first is the shortest that it backs off from.
        consumer = self._huey.create_consumer(
            workers=workers, periodic=False, initial_delay=0.005, max_delay=0.01
        )
        consumer.start()
        while True:
            time.sleep(60)


if __name__ == "__main__":
    main(Huey)
