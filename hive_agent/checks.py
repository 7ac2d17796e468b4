"""``hive_check``: a hive looks at itself and says, line by line, what is well and what is not."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

from hive_agent.devices import Devices
from hive_agent.engines import Engines
from hive_agent.models.catalog import Catalog
from hive_agent.workers.pool import WorkerPool
from wire.jobs import Job

LOW_DISK_BYTES = 10 * 10**9
LOW_STATE_BYTES = 10**9


async def hive_check(
    job: Job,
    devices: Devices,
    engines: Engines,
    catalog: Catalog,
    cache_dir: Path,
    state_dir: Path,
    pool: WorkerPool,
) -> Any:
    """Write a line for each thing checked; ``{"ok", "problems"}``."""
    problems: list[str] = []

    def problem(text: str) -> None:
        job.warn(text)
        problems.append(text)

    for device in await asyncio.to_thread(devices.sample, pool.pids()):
        if device.id.startswith("rocm:"):
            job.info(f"device {device.id}: {device.name}: {device.problem}")
        elif device.healthy:
            memory = f"{device.vram_free_mb} of {device.vram_total_mb} MiB free"
            job.info(f"device {device.id}: {device.name}, {memory}")
        else:
            problem(f"device {device.id}: {device.problem}")
    if devices.no_gpu_because:
        job.info(f"no GPU: {devices.no_gpu_because}; workers run on the CPU")
    for engine in await engines.all():
        if engine.problem:
            problem(f"engine {engine.engine}: {engine.problem}")
        else:
            job.info(f"engine {engine.engine} {engine.version}: {engine.state}, {engine.source}")
    for what, folder, low in (
        ("models", cache_dir, LOW_DISK_BYTES),
        ("engines, logs and records", state_dir, LOW_STATE_BYTES),
    ):
        free = shutil.disk_usage(existing(folder)).free
        left = f"{free / 1e9:.1f} GB left for {what} in {folder}"
        if free < low:
            problem(f"disk: only {left}. Free some space there.")
        else:
            job.info(f"disk: {left}")
    job.info(f"models on disk: {len(await catalog.list())}")
    for worker in pool.all():
        if worker.state in ("failed", "restarting"):
            problem(f"worker {worker.worker_id} ({worker.model}): {worker.state}: {worker.problem}")
        else:
            job.info(f"worker {worker.worker_id} ({worker.model}): {worker.state}")
    return {"ok": not problems, "problems": problems}


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())
