"""What the daemons tell, as tables. Pure: models in, rows of text out."""

from __future__ import annotations

import time
from collections.abc import Sequence

from keeper import words
from keeper.output import Column, Fields, Table
from operations.hosts import (
    Device,
    DeviceProcess,
    EngineInfo,
    Fit,
    HiveInfo,
    JobInfo,
    ModelInfo,
    WorkerInfo,
    together,
)

LONGEST_NAME = 25  # of a device: "A100-SXM4-40GB MIG 1g.5gb"
LONGEST_PROCESS = 8


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


def fits(found: Sequence[Fit]) -> Table:
    return Table(
        [
            Column("HIVE", "id", if_differs=True),
            Column("DEVICE", "id"),
            Column("FITS", "state"),
            Column("NEEDS", "number"),
            Column("FREE", "number"),
            Column("WEIGHTS", "number"),
            Column("KV CACHE", "number"),
            Column("COMPUTE", "number"),
            Column("OVERHEAD", "number"),
        ],
        [
            [
                fit.hive_id,
                fit.device,
                "no" if not fit.fits else "no engine" if fit.engine_problem else "yes",
                words.memory(fit.needed_mb),
                words.memory(fit.free_mb),
                words.memory(fit.weights_mb),
                words.memory(fit.kv_cache_mb),
                words.memory(fit.compute_mb),
                words.memory(fit.overhead_mb),
            ]
            for fit in found
        ],
        "There is no device that could take it.",
    )


def remarks(fit: Fit) -> list[str]:
    """What is to be said of a verdict beside its numbers."""
    lacks = [] if fit.fits else [fit.sentence]
    measured = []
    if fit.measured_mb is not None:
        measured = [f"measured last time: {words.memory(fit.measured_mb)}."]
    engine = [fit.engine_problem] if fit.engine_problem else []
    return [*lacks, *engine, *fit.notes, *measured]


def workers(found: Sequence[WorkerInfo]) -> Table:
    columns = [
        Column("WORKER", "id"),
        Column("HIVE", "id", if_differs=True),
        Column("MODEL"),
        Column("DEVICE", "id"),
        Column("STATE", "state"),
        Column("BUSY", "number"),
        Column("AGE", "number"),
        Column("AT", "id"),
    ]
    now = time.time()
    rows = [
        [
            worker.worker_id,
            worker.hive_id or "",
            worker.model,
            together(worker.devices or (worker.device,)),
            worker.state,
            f"{worker.in_flight}/{worker.slots}",
            words.age(now - worker.started_at),
            worker.url or "",
        ]
        for worker in found
    ]
    return Table(columns, rows, "No workers yet. Start one with 'hive workers spawn MODEL'.")


def worker_notes(found: Sequence[WorkerInfo]) -> list[str]:
    """What is wrong with workers, or how far their loading has come: a line each."""
    said = [(worker.worker_id, worker.problem or worker.progress) for worker in found]
    return [f"{worker_id}: {what}" for worker_id, what in said if what]


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


def engines(found: Sequence[EngineInfo]) -> Table:
    columns = [
        Column("ENGINE", "id"),
        Column("VERSION", "id"),
        Column("STATE", "state"),
        Column("SOURCE"),
        Column("SIZE", "number"),
        Column("HIVE", "id", if_differs=True),
    ]
    rows = [
        [
            engine.engine,
            engine.version,
            engine.state,
            engine.source,
            "" if engine.size_bytes is None else words.size(engine.size_bytes),
            engine.hive_id or "",
        ]
        for engine in found
    ]
    return Table(columns, rows, "No engines. 'hive check' says why.")


def devices(found: Sequence[tuple[str, Device]]) -> Table:
    """Pairs of hive id and device."""
    columns = [
        Column("DEVICE", "id"),
        Column("HIVE", "id", if_differs=True),
        Column("NAME"),
        Column("MEMORY USED", "number"),
        Column("BUSY", "number"),
        Column("TEMP", "number"),
        Column("REMARK"),
    ]
    rows = [
        [
            device.id,
            hive_id,
            _short_name(device.name),
            _memory_used(device),
            "" if device.utilization_percent is None else f"{device.utilization_percent}%",
            "" if device.temperature_c is None else f"{device.temperature_c}°C",
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
            ("progress", found.progress or ""),
            ("model", found.model),
            ("digest", found.digest),
            ("engine", found.engine),
            ("device", together(found.devices or (found.device,))),
            ("url", found.url or ""),
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
    if device.processes:
        return _others(device.processes)
    if device.compute_capability:
        return f"compute {device.compute_capability}"
    return words.count(device.cores, "core") if device.cores else ""


def _others(processes: Sequence[DeviceProcess]) -> str:
    """The process with most memory, of those that are not ours, and how many more there are."""
    most = max(processes, key=lambda process: process.used_mb or 0)
    held = "" if most.used_mb is None else f" {words.memory(most.used_mb)}"
    more = f" +{len(processes) - 1}" if len(processes) > 1 else ""
    return f"{_cut(most.name, LONGEST_PROCESS)}{held}{more}"


def _memory_used(device: Device) -> str:
    """``20.4/80.0 GB``; only the total of a GPU that does not answer."""
    total, used = device.vram_total_mb, device.vram_used_mb
    if used is None and device.healthy:  # an older hive, or a GPU that does not say
        used = total - device.vram_free_mb
    if used is None:
        return words.memory(total) if total else ""
    if total < 1024:
        return f"{used}/{total} MB"
    digits = 1 if total < 1024 * 1000 else 0
    return f"{used / 1024:.{digits}f}/{total / 1024:.{digits}f} GB"


def _short_name(name: str) -> str:
    """A device's name without what every one of its kind has in it."""
    for noise in ("NVIDIA ", "(R)", "(TM)", " CPU", " Processor"):
        name = name.replace(noise, "")
    return _cut(name.partition(" @ ")[0], LONGEST_NAME)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
