"""What daemons tell each other and their callers about machines, models and workers.

These models ignore unknown fields, so that an older daemon understands a newer one.
Sizes are MiB where a name ends in ``_mb`` and bytes where it ends in ``_bytes``; times are
seconds since the epoch unless a name says otherwise.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

VERSION = "0.2.0"

Task = Literal["generate", "embed"]
"""What a worker is for: an engine that was started for embeddings does not generate."""

WorkerState = Literal["starting", "ready", "restarting", "stopping", "failed"]
HiveState = Literal["online", "suspect", "gone"]
JobStatus = Literal["queued", "running", "completed", "failed", "cancelled"]
ModelFormat = Literal["gguf", "safetensors", "scripted"]


class Told(BaseModel):
    """Base of everything told: frozen, and tolerant of fields from a newer daemon."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Device(Told):
    """One GPU, or the CPU (whose memory is the machine's)."""

    id: str
    name: str
    device_type: Literal["gpu", "cpu"]
    vram_total_mb: int
    vram_free_mb: int
    compute_capability: str | None = None
    uuid: str | None = None
    utilization_percent: int | None = None
    cores: int | None = None
    healthy: bool = True
    problem: str | None = None


class ModelInfo(Told):
    """One model on a machine's disk.

    ``digest`` identifies it: the digest of its files and its chat template, ``sha256:<hex>``.
    ``embedding``: it makes vectors and does not chat.
    """

    id: str
    digest: str
    format: ModelFormat
    size_bytes: int
    source: Literal["shipped", "hub", "file", "scripted"]
    path: str
    architecture: str | None = None
    quantization: str | None = None
    context_length: int | None = None
    embedding: bool = False
    hive_id: str | None = None
    loaded: bool = False


class WorkerInfo(Told):
    """One inference worker, and how busy it is."""

    worker_id: str
    pid: int | None = None
    model: str
    digest: str
    engine: str
    device: str
    state: WorkerState
    slots: int
    in_flight: int
    restarts: int = 0
    started_at: float
    rss_mb: int | None = None
    context_length: int | None = None
    tasks: tuple[Task, ...] = ("generate", "embed")
    problem: str | None = None
    hive_id: str | None = None
    socket: str | None = None
    log: str | None = None

    @property
    def free(self) -> bool:
        return self.state == "ready" and self.in_flight < self.slots


class Heartbeat(Told):
    """One hive, whole: what the queen knows of it is its last heartbeat and nothing else.

    ``instance`` is new at each start of the agent: two addresses that tell the same one are one
    hive. ``revoked_keys`` are ids of API keys.
    """

    type: Literal["heartbeat"] = "heartbeat"
    hive_id: str
    instance: str = ""
    version: str
    hostname: str
    timestamp: float
    operational_status: Literal["starting", "ready", "busy", "stopping"]
    devices: list[Device] = Field(default_factory=list)
    models: list[ModelInfo] = Field(default_factory=list)
    workers: list[WorkerInfo] = Field(default_factory=list)
    jobs_in_flight: int = 0
    revoked_keys: list[str] = Field(default_factory=list)


class Capabilities(Told):
    """``GET /v1/capabilities``."""

    hive_id: str
    devices: list[Device]


class Info(Told):
    """``GET /v1/info``."""

    role: Literal["queen", "hive"]
    id: str
    version: str
    base_url: str
    port: int
    features: list[str]


class HealthWorker(Told):
    """One worker in ``GET /health``; ``free`` when it can take a request now."""

    id: str
    free: bool


class Health(Told):
    """``GET /health``, the same on every daemon."""

    ok: bool = True
    role: Literal["queen", "hive"]
    version: str
    workers: list[HealthWorker]
    queued: int


class HiveInfo(Told):
    """One hive as the queen sees it. ``last_heard_s`` is its age in seconds."""

    hive_id: str
    hive_url: str
    state: HiveState
    found_by: Literal["flag", "ready", "mdns"]
    last_heard_s: float | None = None
    version: str | None = None
    problem: str | None = None
    devices: list[Device] = Field(default_factory=list)
    models: list[ModelInfo] = Field(default_factory=list)
    workers: list[WorkerInfo] = Field(default_factory=list)
    in_flight: int = 0


class Ready(BaseModel):
    """``POST /v1/hive/ready``: a hive tells a queen where it is."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    hive_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    hive_url: str = Field(max_length=512, pattern=r"^https?://[^\s/?#@]+/?$")
    instance: str = Field(default="", max_length=32)


class Welcome(Told):
    """The queen's answer to ``ready``; ``queen_id`` is new at each start of the queen."""

    status: Literal["ok"] = "ok"
    message: str
    queen_id: str


class JobInfo(Told):
    """``GET /v1/jobs/{id}``: what became of a job. The operation's prompt is not kept."""

    job_id: str
    operation: str
    status: JobStatus
    created_at: float
    finished_at: float | None = None
    model: str | None = None
    hive_id: str | None = None
    message: str | None = None
    events: int = 0
    readers: int = 0
