"""Small JSON files that outlive the agent: written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from wire.files import open_regular


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value``, so that a reader sees the old or the new one."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w", encoding="ascii") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def read_json(path: Path, max_bytes: int = 64 * 2**20) -> Any:
    """The JSON in ``path``; None if there is no such file, or one that is no JSON or too large.

    :raises OSError: it is there and cannot be read, or is no regular file
    """
    try:
        with open_regular(path) as file:
            data = file.read(max_bytes + 1)
        return json.loads(data) if len(data) <= max_bytes else None
    except (FileNotFoundError, ValueError, RecursionError):
        return None
