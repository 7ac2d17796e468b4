"""Carrying revocations from hive to hive, so that a revoked key ends everywhere."""

from __future__ import annotations

import asyncio
import logging

from operations.errors import HiveError
from operations.hosts import Heartbeat, HiveInfo
from queen.registry import Registry
from wire.revocations import Revocations
from wire.trust_api import REVOKED

log = logging.getLogger(__name__)


class Spread:
    """Takes from each heartbeat what is new, and gives each hive what it lacks."""

    def __init__(self, registry: Registry, revocations: Revocations) -> None:
        self._registry = registry
        self._revocations = revocations
        self._telling: dict[str, asyncio.Task[None]] = {}

    def heard(self, hive: HiveInfo, beat: Heartbeat) -> None:
        """A hive's heartbeat tells which keys it knows to be revoked."""
        if beat.revoked_keys == self._revocations.listed:
            return
        try:
            self._revocations.add(beat.revoked_keys)
        except (OSError, HiveError) as error:
            log.error("revoked keys could not be kept: %s", error)
        lacks = set(self._revocations.listed) - set(beat.revoked_keys)
        if lacks and hive.hive_url not in self._telling:
            task = asyncio.create_task(self._tell(hive, sorted(lacks)))
            self._telling[hive.hive_url] = task
            task.add_done_callback(lambda _: self._telling.pop(hive.hive_url, None))

    async def close(self) -> None:
        for task in self._telling.values():
            task.cancel()
        await asyncio.gather(*self._telling.values(), return_exceptions=True)

    async def _tell(self, hive: HiveInfo, key_ids: list[str]) -> None:
        try:
            client = self._registry.client(hive.hive_url)
            await client.post(REVOKED, {"key_ids": key_ids}, timeout_s=5)
        except HiveError as error:
            log.warning("hive %s did not learn of revoked keys: %s", hive.hive_id, error.message)
