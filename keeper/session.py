"""One command's conversation with one daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from keeper.output import Output
from keeper.progress import Narrator

if TYPE_CHECKING:
    from job_client.client import JobClient, Outcome
    from keeper.connect import Daemon
    from operations.operations import OperationBase

CANCEL_S = 2.0


class Session:
    """What a command is given: the daemon found, a client of it, and where its words go."""

    def __init__(self, out: Output, daemon: Daemon, client: JobClient) -> None:
        self.out = out
        self.daemon = daemon
        self.client = client

    @classmethod
    async def open(cls, out: Output, url: str | None, hive: str | None) -> Self:
        """Find the daemon. :raises HiveError: see :func:`keeper.connect.connect`"""
        from keeper import connect

        daemon = await connect.connect(url, hive)
        return cls(out, daemon, connect.client(daemon.url))

    async def close(self) -> None:
        await self.client.close()

    @property
    def hive_id(self) -> str | None:
        """The hive that operations are meant for; None leaves it to the daemon."""
        return self.daemon.hive_id

    async def get(self, path: str) -> Any:
        """A JSON answer of the daemon."""
        return await self.client.get(path)

    async def run(self, operation: OperationBase, *, narrate: bool = False) -> Any:
        """Run an operation, return its result.

        :param narrate: its progress is worth keeping on the screen, not only while one waits
        :raises HiveError: refused, failed, cancelled, or the daemon was lost
        """
        with Narrator(self.out, passing=not narrate) as narrator:
            outcome = await self.stream(operation, narrator.take)
        return outcome.value()

    async def stream(self, operation: OperationBase, take: Callable[[str], object]) -> Outcome:
        """Run an operation, hand each of its lines to ``take``.

        Whatever ends the reading early, Ctrl-C or an output that nobody reads any more, cancels
        the job.
        """
        submitting = asyncio.ensure_future(
            self.client.submit(operation.model_dump(exclude_none=True))
        )
        try:
            job_id = (await asyncio.shield(submitting)).job_id
            return await self.client.follow(job_id, take)
        except (asyncio.CancelledError, OSError):
            with suppress(Exception):  # best effort; what interrupted is raised
                async with asyncio.timeout(CANCEL_S):
                    await self.client.cancel((await submitting).job_id)
            raise
