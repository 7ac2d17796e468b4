"""The SHA-256 of files, computed once and remembered for as long as a file stays as it is."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hive_agent.models.storage import read_json, write_json
from operations.errors import Conflict, InvalidRequest
from wire.files import open_regular

log = logging.getLogger(__name__)

CHUNK_BYTES = 2**20
REMEMBERED = 10_000
"""Files remembered at most; beyond that, those that are gone are forgotten first."""


@dataclass(frozen=True)
class FileKey:
    """A file's identity as far as the file system tells it without reading the file."""

    path: str
    size: int
    mtime_ns: int
    inode: int

    @staticmethod
    def of(path: str | os.PathLike[str]) -> FileKey:
        """:raises OSError: it is gone or out of reach"""
        facts = os.stat(path)
        return FileKey(os.fspath(path), facts.st_size, facts.st_mtime_ns, facts.st_ino)


class Digests:
    """SHA-256 sums by :class:`FileKey`, kept in one JSON file. Safe to use from many threads.

    A sum that was computed and not saved is only computed again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known = _load(path)
        self._unsaved = False

    def get(self, key: FileKey) -> str | None:
        """The sum in hex, if this very file was summed before."""
        with self._lock:
            return self._known.get(key)

    def compute(self, key: FileKey, stop: threading.Event | None = None) -> str:
        """Sum the file unless that is done, and remember it. Blocks: about 1 s for each GB.

        :param stop: set from another thread to give up
        :raises InvalidRequest: the file cannot be read
        :raises Conflict: it changed meanwhile, or ``stop`` was set
        """
        if known := self.get(key):
            return known
        try:
            digest = _sha256(key.path, stop)
            unchanged = FileKey.of(key.path) == key
        except OSError as error:
            raise InvalidRequest(
                f"{key.path} cannot be read: {error.strerror}. Make it readable for the hive agent."
            ) from None
        if not unchanged:
            raise Conflict(
                f"{key.path} changed while it was read. Try again when it is complete.",
                code="file_changing",
                retryable=True,
            )
        with self._lock:
            self._known[key] = digest
            self._unsaved = True
        return digest

    def save(self) -> None:
        """Write down what was computed since the last time. Blocks for a disk write."""
        with self._lock:
            if not self._unsaved:
                return
            if len(self._known) > REMEMBERED:
                self._known = {k: v for k, v in self._known.items() if os.path.exists(k.path)}
            rows = [[k.path, k.size, k.mtime_ns, k.inode, v] for k, v in self._known.items()]
            self._unsaved = False
            try:
                write_json(self._path, rows)
            except OSError as error:
                log.warning("digests are not remembered: %s: %s", self._path, error.strerror)


async def compute(digests: Digests, key: FileKey) -> str:
    """:meth:`Digests.compute` in a thread that ends soon after this task is cancelled."""
    stop = threading.Event()
    try:
        return await asyncio.to_thread(digests.compute, key, stop)
    finally:
        stop.set()


def combine(kind: str, parts: Sequence[tuple[str, str]]) -> str:
    """One digest for a model of several files.

    :param kind: sets apart models whose parts happen to be equal
    :param parts: (name or number, SHA-256 in hex) in an order that every machine agrees on
    :returns: SHA-256 in hex
    """
    lines = [f"{digest}  {name}\n" for name, digest in parts]
    return hashlib.sha256("".join([f"hive {kind}\n", *lines]).encode()).hexdigest()


def with_projector(model: str, projector: str) -> str:
    """The digest of a model together with its projector, from those of both; all in hex."""
    return combine("gguf with projector", [("model", model), ("projector", projector)])


def _sha256(path: str, stop: threading.Event | None) -> str:
    total = hashlib.sha256()
    with open_regular(path, buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            total.update(chunk)
            if stop is not None and stop.is_set():
                raise Conflict(f"Reading {path} was given up. Try again.", retryable=True)
    return total.hexdigest()


def _load(path: Path) -> dict[FileKey, str]:
    """What was remembered; a damaged file only costs summing again."""
    rows = read_json(path)
    known = {}
    for row in rows if isinstance(rows, list) else []:
        match row:
            case [str(name), int(size), int(mtime_ns), int(inode), str(digest)]:
                known[FileKey(name, size, mtime_ns, inode)] = digest
    return known
