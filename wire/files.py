"""Files: written whole or not at all, and read only where they are files indeed."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | os.PathLike[str], *, buffering: int = -1) -> BinaryIO:
    """Open a file to read it; a pipe or a device is refused and never waited for.

    :param buffering: as of :func:`open`
    :raises OSError: it cannot be opened, or is no regular file
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "It is no regular file", os.fspath(path))
        return open(descriptor, "rb", buffering=buffering)
    except BaseException:
        os.close(descriptor)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write, or replace, a file that only its owner may read; it survives a power cut.

    :raises OSError: it cannot be written; what was there before is still there
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)  # a link that somebody has put there is not followed
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_file(path: Path, limit: int) -> bytes:
    """The content of a regular file.

    :param limit: bytes that it may have
    :raises OSError: it cannot be read, is no regular file, or is longer; ``strerror`` says which
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"It is longer than {limit} bytes", str(path))
    return content
