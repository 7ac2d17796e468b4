"""Tells a queen that this hive is here, until that queen listens to its heartbeats."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from urllib.parse import urlsplit

import aiohttp

from hive_agent.pulse import Pulse
from hive_agent.settings import AgentSettings
from job_client.client import JobClient
from operations.errors import Conflict, Forbidden, HiveError, Unauthorized
from operations.hosts import Ready, Welcome
from wire.log import outcome
from wire.peer import Peer
from wire.secret import Secret
from wire.serve import Listening

EVERY_S = 1.0
CONNECT_S = 2.0


class Announcer:
    """Posts ``ready`` to the queen every second while she does not listen."""

    def __init__(
        self,
        hive_id: str,
        instance: str,
        listening: Listening,
        settings: AgentSettings,
        secret: Secret | None,
        pulse: Pulse,
    ) -> None:
        self._hive_id = hive_id
        self._instance = instance
        self._listening = listening
        self._advertised = settings.advertise_url
        self._queen_url = settings.queen_url
        self._missed = logging.INFO if "queen_url" in settings.model_fields_set else logging.DEBUG
        self._queen = Peer(
            settings.queen_url,
            secret,
            role="hive",
            id=hive_id,
            roles=("queen",),
            lenient=True,
            connect_s=CONNECT_S,
        )
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
        await self._queen.close()

    async def _run(self) -> None:
        while True:
            if self._queen_id not in self._pulse.queens:
                await self._announce()
            await asyncio.sleep(EVERY_S)

    async def _announce(self) -> None:
        try:
            await self._queen.open()
            ready = Ready(hive_id=self._hive_id, hive_url=self._url(), instance=self._instance)
            client = JobClient(self._queen.base_url, session=self._queen.http)
            answer = await client.post("/v1/hive/ready", ready, timeout_s=5)
            self._queen_id = Welcome.model_validate(answer).queen_id
            self._say("announced", logging.INFO, None)
        except (Conflict, Forbidden, Unauthorized) as error:
            self._say("refused", logging.ERROR, error.message)
        except HiveError as error:
            self._say("unreachable", self._missed, error.message)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._say("unreachable", self._missed, f"nobody answers ({type(error).__name__})")
        except ValueError:
            self._say("unreachable", logging.WARNING, "what answers there is no queen")

    def _url(self) -> str:
        """How the queen reaches this hive: at the address from which this hive reaches her."""
        if self._advertised is not None:
            return self._advertised
        if not self._listening.everywhere:
            return self._listening.url
        return self._listening.url_at(local_address(self._queen.base_url))

    def _say(self, status: str, level: int, why: str | None) -> None:
        """Log a change once, not every second."""
        if self._said != status:
            self._said = status
            outcome("hive", level=level, queen=self._queen_url, status=status, why=why)


def local_address(url: str) -> str:
    """This machine's address on the way to a URL whose host is an address; nothing is sent.

    :raises OSError: there is no way
    """
    parts = urlsplit(url)
    address = ipaddress.ip_address(parts.hostname or "")
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((str(address), parts.port or 80))
        return str(probe.getsockname()[0])
