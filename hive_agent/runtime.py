"""The folders of an agent: state that stays, and a private one on a short path for sockets."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from wire.serve import CannotStart

SOCKET_PATH_LIMIT = 100  # bytes; sun_path holds 108 on Linux
LONGEST_NAME = len("/w-000000.sock")


def state_folder(state_dir: Path) -> Path:
    """:raises CannotStart: it cannot be made"""
    folder = state_dir / "agent"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise CannotStart(
            f"The state folder {folder} cannot be made: {error.strerror}. "
            "Choose another with --state-dir."
        ) from None
    return folder


def lock(folder: Path) -> FileLock:
    """Held for the agent's life: one agent a state folder.

    :raises CannotStart: another agent holds it
    """
    held = FileLock(folder / "agent.lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise CannotStart(
            f"Another hive agent uses the state folder {folder}. Stop it with 'hive shutdown', "
            "or give this one its own --state-dir."
        ) from None
    return held


def runtime_folder(state: Path) -> Path:
    """A private folder (0700) for the sockets, the same one at each start on the same state.

    :raises CannotStart: somebody else owns it
    """
    name = f"hive-{hashlib.sha256(str(state.resolve()).encode()).hexdigest()[:10]}"
    for base in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):
        if not base:
            continue
        folder = Path(base) / name
        if len(os.fsencode(folder)) + LONGEST_NAME >= SOCKET_PATH_LIMIT:
            continue
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
        except OSError:
            continue
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise CannotStart(
                f"{folder} belongs to somebody else, so no socket can be kept there safely. "
                "Remove it, or set XDG_RUNTIME_DIR to a folder of your own."
            )
        folder.chmod(0o700)
        return folder
    raise CannotStart(
        "There is no folder for the workers' sockets. Set XDG_RUNTIME_DIR to one with a short path."
    )
