"""Procrastinate, by its worker, which does several jobs at a time in one process."""

from __future__ import annotations

import time
from collections.abc import Sequence

import psycopg
from procrastinate import App, PsycopgConnector
from procrastinate.jobs import Status

from bench.queues.driver import Async, Said, main, ran


async def run(sent: int) -> None:
    ran(sent)


class Procrastinate(Async):
    def __init__(self, options: Said) -> None:
        super().__init__(options)
        self._app = App(connector=PsycopgConnector(conninfo=self.url, min_size=1, max_size=10))
        self._task = self._app.task(name="ran", queue=self.queue)(run)

    def prepare(self) -> None:
        self._within(self._app.schema_manager.apply_schema_async)

    async def open(self) -> None:
        await self._app.open_async()

    async def close(self) -> None:
        await self._app.close_async()

    async def put(self, sent: int) -> None:
        await self._task.defer_async(sent=sent)

    async def put_all(self, sent: Sequence[int]) -> None:
        await self._task.batch_defer_async(*({"sent": one} for one in sent))

    async def serve(self, workers: int, each: int) -> None:
        async with self._app.open_async():
            await self._app.run_worker_async(
                queues=[self.queue], concurrency=workers, install_signal_handlers=False
            )

    def finished(self, tasks: int) -> None:
        with psycopg.connect(self.url, autocommit=True) as conn:
            conn.execute("SET session_replication_role = replica")  # no trigger for what never was
            conn.execute(
                "INSERT INTO procrastinate_jobs (queue_name, task_name, args, status, attempts)"
                " SELECT %s, 'ran', '{\"sent\": 0}', 'succeeded', 1 FROM generate_series(1, %s)",
                (self.queue, tasks),
            )
            conn.execute("VACUUM ANALYZE")

    def claim(self, tasks: int) -> list[float]:
        async def one_by_one() -> list[float]:
            manager = self._app.job_manager
            worker = await manager.register_worker()
            took: list[float] = []
            for _ in range(tasks):
                await self.put(0)
                began = time.perf_counter()
                job = await manager.fetch_job(queues=[self.queue], worker_id=worker)
                took.append((time.perf_counter() - began) * 1000)
                assert job is not None
                await manager.finish_job(job, status=Status.SUCCEEDED, delete_job=False)
            return took

        return list(self._within(one_by_one))


if __name__ == "__main__":
    main(Procrastinate)
