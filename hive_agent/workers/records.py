"""The records of running workers on disk, and how a worker of an earlier agent is recognised.

A worker outlives its agent. Its record names it beyond doubt: process id, the process's start
time, and a nonce that stands in the process's environment.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from hive_agent.processes import signal_group, wait_for_group

log = logging.getLogger(__name__)

NONCE = "HIVE_WORKER_NONCE"
TERM_S = 5.0  # what an engine's process gets between SIGTERM and SIGKILL
REST_S = 3.0  # what the rest of its group gets after it: vLLM's take their shared memory with them


class WorkerRecord(BaseModel):
    """One worker. ``started`` is the process's start in seconds since the epoch."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    worker_id: str
    pid: int
    started: float
    nonce: str
    socket: str
    model: str
    device: str


class Records:
    """The records in one folder, a file a worker."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def write(self, record: WorkerRecord) -> None:
        path = self._path(record.worker_id)
        draft = path.with_suffix(".new")
        draft.write_text(record.model_dump_json())
        draft.replace(path)

    def remove(self, worker_id: str) -> None:
        self._path(worker_id).unlink(missing_ok=True)

    def all(self) -> list[WorkerRecord]:
        found = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                found.append(WorkerRecord.model_validate_json(path.read_bytes()))
            except (ValidationError, OSError) as error:
                log.warning("worker record %s is unreadable and is dropped: %s", path.name, error)
                path.unlink(missing_ok=True)
        return found

    def end_all(self) -> list[WorkerRecord]:
        """End the process group of every recorded worker that still runs; blocks while it does.

        :returns: those that ran
        """
        ended = []
        for record in self.all():
            if process := living(record):
                end_group(process)
                ended.append(record)
            remove_files(Path(record.socket))
            self.remove(record.worker_id)
        return ended

    def _path(self, worker_id: str) -> Path:
        return self._folder / f"{worker_id}.json"


def remove_files(socket: Path) -> None:
    """Remove a worker's socket and the files beside it, all named after the worker."""
    for path in socket.parent.glob(f"{socket.stem}.*"):
        path.unlink(missing_ok=True)


def living(record: WorkerRecord) -> psutil.Process | None:
    """The process that the record names, if it is still that very process."""
    try:
        process = psutil.Process(record.pid)
        if abs(process.create_time() - record.started) > 1:
            return None
        if process.environ().get(NONCE) != record.nonce:
            return None
        return process if process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def end_group(process: psutil.Process) -> None:
    """SIGTERM to the process's group; SIGKILL to it after 5 s, to the rest of the group 3 s later.

    Returns as soon as all of them are gone.
    """
    signal_group(process.pid, signal.SIGTERM)
    try:
        process.wait(TERM_S)
    except psutil.TimeoutExpired:
        signal_group(process.pid, signal.SIGKILL)
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(TERM_S)
    wait_for_group(process.pid, REST_S)
    signal_group(process.pid, signal.SIGKILL)  # stragglers of the group
