"""Tells a queen that this hive is here, until that queen listens to its heartbeats."""

from __future__ import annotations

import asyncio
import logging

from hive_agent.pulse import Pulse
from job_client.client import JobClient
from operations.errors import Conflict, HiveError
from operations.hosts import Ready, Welcome
from wire.log import outcome

EVERY_S = 1.0


class Announcer:
    """Posts ``ready`` to the queen every second while she does not listen."""

    def __init__(self, hive_id: str, hive_url: str, queen_url: str, pulse: Pulse) -> None:
        self._ready = Ready(hive_id=hive_id, hive_url=hive_url)
        self._client = JobClient(queen_url)
        self._queen_url = queen_url
        self._pulse = pulse
        self._queen_id: str | None = None
        self._said: str | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="announcer")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._client.close()

    async def _run(self) -> None:
        while True:
            if self._queen_id not in self._pulse.queens:
                await self._announce()
            await asyncio.sleep(EVERY_S)

    async def _announce(self) -> None:
        try:
            answer = await self._client.post("/v1/hive/ready", self._ready, timeout_s=5)
            self._queen_id = Welcome.model_validate(answer).queen_id
            self._say("known", logging.INFO, None)
        except Conflict as error:
            self._say("refused", logging.ERROR, error.message)
        except HiveError as error:
            self._say("unreachable", logging.INFO, error.message)
        except ValueError:
            self._say("unreachable", logging.WARNING, "what answers there is no queen")

    def _say(self, status: str, level: int, why: str | None) -> None:
        """Log a change once, not every second."""
        if self._said != status:
            self._said = status
            outcome("hive", level=level, queen=self._queen_url, status=status, why=why)
