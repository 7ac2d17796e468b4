"""The beginning of a blob on disk, which outlives the process that fetched it.

It lies beside the finished blobs as ``<etag>.incomplete``, so that whoever comes next, after a
crash, too, goes on where it ends. The ETag is the blob's own hash, so at the end the file proves
itself, whoever wrote which part of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

CHUNK_BYTES = 2**20
T = TypeVar("T")


@dataclass(frozen=True)
class Blob:
    """A file to fetch.

    :param name: for messages
    :param etag: its SHA-256, or its git id (SHA-1), in hex
    :param path: where it belongs: ``…/blobs/<etag>``
    :param lock: who holds this file's lock is the one that fetches it
    """

    name: str
    url: str
    etag: str
    size: int
    path: Path
    lock: Path

    @property
    def partial_path(self) -> Path:
        return self.path.with_name(f"{self.etag}.incomplete")

    def is_there(self) -> bool:
        """Whether it was fetched before, by whomever."""
        try:
            return self.path.stat().st_size == self.size
        except OSError:
            return False

    def bytes_there(self) -> int:
        """How much of it is on disk."""
        if self.is_there():
            return self.size
        try:
            return min(self.partial_path.stat().st_size, self.size)
        except OSError:
            return 0


class Partial:
    """A partial file. Its methods block and may raise :class:`OSError`; one at a time.

    :ivar size: bytes on disk and in the hash
    :ivar inherited: how many of them were there before
    """

    def __init__(self, blob: Blob) -> None:
        self.size = 0
        self.inherited = 0
        self._blob = blob
        self._stop = threading.Event()
        self._fd: int | None = None
        self._hash = _hasher(blob)

    def open(self) -> None:
        """Open or create the file and hash what is there: about a second for each GB.

        A file that is longer than the blob is emptied.
        """
        self._blob.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(self._blob.partial_path, flags, 0o666)
        there = os.fstat(self._fd).st_size
        if there > self._blob.size:
            self.restart()
            there = 0
        while self.size < there and not self._stop.is_set():
            chunk = os.pread(self._fd, CHUNK_BYTES, self.size)
            if not chunk:
                break
            self._hash.update(chunk)
            self.size += len(chunk)
        self.inherited = self.size

    def give_up(self) -> None:
        """End an :meth:`open` that runs in another thread."""
        self._stop.set()

    def write(self, data: bytes) -> None:
        """Append. Written at a position of its own: where a file system's locks do not work, two
        writers of the same bytes do no harm."""
        self._hash.update(data)
        view = memoryview(data)
        while view:
            written = os.pwrite(self._open_fd, view, self.size)
            self.size += written
            view = view[written:]

    def restart(self) -> None:
        """Back to zero bytes."""
        os.ftruncate(self._open_fd, 0)
        self.size = self.inherited = 0
        self._hash = _hasher(self._blob)

    def is_true(self) -> bool:
        """Whether the whole file is what its ETag says."""
        return self.size == self._blob.size and self._hash.hexdigest() == self._blob.etag

    def publish(self) -> None:
        """Make it the finished blob, durably and at once."""
        os.fsync(self._open_fd)
        try:
            os.replace(self._blob.partial_path, self._blob.path)
        except FileNotFoundError:
            if not self._blob.is_there():  # else another writer was faster, see write()
                raise

    def discard(self) -> None:
        """Remove it from disk."""
        with contextlib.suppress(FileNotFoundError):
            self._blob.partial_path.unlink()

    def close(self) -> None:
        """Closing one that was never opened is fine."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @property
    def _open_fd(self) -> int:
        if self._fd is None:
            raise ValueError("the partial file is not open")
        return self._fd


def _hasher(blob: Blob) -> hashlib._Hash:
    if len(blob.etag) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % blob.size, usedforsecurity=False)  # a git object's id


async def in_thread(
    function: Callable[..., T], *args: object, on_cancel: Callable[[], None] | None = None
) -> T:
    """Run ``function`` in a thread and, even when cancelled, return only after it ended.

    So a file is never closed under the thread that writes to it.
    """
    future = asyncio.get_running_loop().run_in_executor(None, partial(function, *args))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if on_cancel is not None:
            on_cancel()
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        future.exception()  # seen; the cancellation is what counts
        raise
