"""Which API keys hold no more. Every hive keeps them and tells them in its heartbeats."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic_core import from_json, to_json

from operations.errors import QueueFull
from wire.files import write_whole
from wire.keys import KEY_ID, refused_key

log = logging.getLogger(__name__)

FILE = "revoked-keys.json"
MAX_REVOKED = 10_000


class Revocations:
    """The ids of revoked keys, kept in a file: ``["3f9a…", …]``.

    A key that was revoked stays so: there is no way back but a new key.
    """

    def __init__(self, path: Path | None) -> None:
        """
        :param path: None keeps them in memory alone
        :raises OSError, ValueError: the file is there and cannot be read
        """
        self._path = path
        self._ids: set[str] = set()
        self.added: Callable[[list[str]], None] = lambda key_ids: None
        """Told which keys have been revoked just now."""
        if path is not None and path.exists():
            kept = from_json(path.read_bytes())
            if not isinstance(kept, list):
                raise ValueError("it holds no list")
            self._ids = {key_id for key_id in kept if _valid(key_id)}
        self.listed = sorted(self._ids)
        """All of them, sorted."""

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._ids

    def check(self, key_id: str) -> None:
        """:raises Unauthorized: it has been revoked"""
        if key_id in self._ids:
            raise refused_key("revoked_key", "The API key has been revoked.")

    def add(self, key_ids: Iterable[str]) -> bool:
        """Revoke keys, in memory and on disk; whether any of them was new.

        :raises OSError: the disk takes nothing; they are revoked until the daemon ends
        :raises QueueFull: there are too many
        """
        new = {key_id for key_id in key_ids if _valid(key_id)} - self._ids
        if not new:
            return False
        if len(self._ids) + len(new) > MAX_REVOKED:
            raise QueueFull(
                f"{MAX_REVOKED} keys are revoked already. Make a new secret ('hive secret new'), "
                "which ends all keys.",
                code="too_many_revoked",
            )
        self._ids |= new
        self.listed = sorted(self._ids)
        self.added(sorted(new))
        if self._path is not None:
            write_whole(self._path, to_json(self.listed))
        return True


def _valid(key_id: object) -> bool:
    return isinstance(key_id, str) and KEY_ID.fullmatch(key_id) is not None
