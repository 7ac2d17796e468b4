"""What the daemons tell, as tables. Pure: models in, rows of text out."""

from __future__ import annotations

import time
from collections.abc import Sequence

from keeper import words
from keeper.output import Column, Fields, Table
from operations.hosts import Device, HiveInfo, JobInfo, ModelInfo, WorkerInfo


def hives(found: Sequence[HiveInfo], version: str) -> Table:
    """:param version: the queen's; a hive's is shown where it is another one"""
    return Table(
        [
            Column("HIVE", "id"),
            Column("STATE", "state"),
            Column("DEVICES"),
            Column("MODELS", "number"),
            Column("WORKERS", "number"),
            Column("BUSY", "number"),
            Column("HEARD", "number"),
            Column("FOUND"),
            Column("VERSION"),
            Column("AT", "id"),
        ],
        [
            [
                hive.hive_id if hive.hive_id != hive.hive_url else "?",
                hive.state,
                ", ".join(device.id for device in hive.devices),
                str(len(hive.models)),
                str(len(hive.workers)),
                str(hive.in_flight),
                "" if hive.last_heard_s is None else words.age(hive.last_heard_s),
                hive.found_by,
                hive.version if hive.version and hive.version != version else "",
                hive.hive_url.removeprefix("http://"),
            ]
            for hive in found
        ],
        "No hives yet. Start one on each machine with 'hive agent'; 'hive doctor' says more.",
    )


def workers(found: Sequence[WorkerInfo]) -> Table:
    columns = [
        Column("WORKER", "id"),
        Column("HIVE", "id", if_differs=True),
        Column("MODEL"),
        Column("DEVICE", "id"),
        Column("STATE", "state"),
        Column("BUSY", "number"),
        Column("AGE", "number"),
    ]
    now = time.time()
    rows = [
        [
            worker.worker_id,
            worker.hive_id or "",
            worker.model,
            worker.device,
            worker.state,
            f"{worker.in_flight}/{worker.slots}",
            words.age(now - worker.started_at),
        ]
        for worker in found
    ]
    return Table(columns, rows, "No workers yet. Start one with 'hive workers spawn MODEL'.")


def models(found: Sequence[ModelInfo]) -> Table:
    columns = [
        Column("MODEL", "id"),
        Column("SIZE", "number"),
        Column("QUANT"),
        Column("CONTEXT", "number"),
        Column("LOADED"),
        Column("HIVE", "id", if_differs=True),
    ]
    rows = [
        [
            model.id,
            words.size(model.size_bytes),
            model.quantization or "",
            str(model.context_length or ""),
            "yes" if model.loaded else "no",
            model.hive_id or "",
        ]
        for model in sorted(found, key=lambda model: (model.id.lower(), model.hive_id or ""))
    ]
    return Table(columns, rows, "No models yet. Fetch one with 'hive models pull ORG/REPO'.")


def devices(found: Sequence[tuple[str, Device]]) -> Table:
    """Pairs of hive id and device."""
    columns = [
        Column("DEVICE", "id"),
        Column("HIVE", "id", if_differs=True),
        Column("NAME"),
        Column("MEMORY", "number"),
        Column("FREE", "number"),
        Column("USE", "number"),
        Column("REMARK"),
    ]
    rows = [
        [
            device.id,
            hive_id,
            device.name,
            words.memory(device.vram_total_mb),
            words.memory(device.vram_free_mb),
            "" if device.utilization_percent is None else f"{device.utilization_percent} %",
            _remark(device),
        ]
        for hive_id, device in found
    ]
    return Table(columns, rows, "No devices. 'hive check' says why.")


def jobs(found: Sequence[JobInfo]) -> Table:
    now = time.time()
    return Table(
        [Column("JOB", "id"), Column("STATE", "state"), Column("AGE", "number"), Column("WHAT")],
        [
            [
                job.job_id,
                job.status,
                words.age(now - job.created_at),
                " ".join(part for part in (job.operation, job.model) if part),
            ]
            for job in found
        ],
        "No jobs yet. Ask a model with 'hive infer MODEL PROMPT'.",
    )


def worker(found: WorkerInfo) -> Fields:
    return Fields(
        [
            ("worker", found.worker_id),
            ("hive", found.hive_id or ""),
            ("state", found.state),
            ("problem", found.problem or ""),
            ("model", found.model),
            ("digest", found.digest),
            ("engine", found.engine),
            ("device", found.device),
            ("busy", f"{found.in_flight} of {words.count(found.slots, 'slot')}"),
            ("context", f"{found.context_length} tokens" if found.context_length else ""),
            ("memory", words.memory(found.rss_mb) if found.rss_mb else ""),
            ("started", f"{words.age(time.time() - found.started_at)} ago"),
            ("restarts", str(found.restarts) if found.restarts else ""),
            ("pid", str(found.pid or "")),
            ("log", found.log or ""),
        ]
    )


def model(found: ModelInfo) -> Fields:
    return Fields(
        [
            ("model", found.id),
            ("hive", found.hive_id or ""),
            ("loaded", "yes" if found.loaded else "no"),
            ("size", words.size(found.size_bytes)),
            ("format", " ".join(part for part in (found.format, found.quantization) if part)),
            ("architecture", found.architecture or ""),
            ("context", f"{found.context_length} tokens" if found.context_length else ""),
            ("source", found.source),
            ("digest", found.digest),
            ("path", found.path),
        ]
    )


def _remark(device: Device) -> str:
    if not device.healthy:
        return device.problem or "unhealthy"
    if device.compute_capability:
        return f"compute {device.compute_capability}"
    return words.count(device.cores, "core") if device.cores else ""
