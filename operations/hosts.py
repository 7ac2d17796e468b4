"""What daemons tell each other and their callers about machines, models and workers.

These models ignore unknown fields, so that an older daemon understands a newer one.
Sizes are MiB where a name ends in ``_mb`` and bytes where it ends in ``_bytes``; times are
seconds since the epoch unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

VERSION = "0.5.0"

Task = Literal["generate", "embed", "rerank"]
"""What a worker is for: an engine started for embeddings, or to rerank, does not generate."""

WorkerState = Literal["starting", "ready", "restarting", "stopping", "failed"]
HiveState = Literal["online", "suspect", "gone"]
JobStatus = Literal["queued", "running", "completed", "failed", "cancelled"]
Pooling = Literal["mean", "cls", "last", "rank"]
ModelFormat = Literal["gguf", "safetensors", "scripted", "external"]

LINKS = ("nvlink", "pcie-switch", "host-bridge", "node", "system")
"""What two GPUs reach each other through, the fastest first: the last passes from one NUMA node's
memory to another's."""


class Told(BaseModel):
    """Base of everything told: frozen, and tolerant of fields from a newer daemon."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class DeviceProcess(Told):
    """A process that holds memory of a GPU; ``used_mb`` is None where the driver does not say."""

    pid: int
    name: str
    used_mb: int | None = None


class Device(Told):
    """One GPU, one MIG instance of a GPU, or the CPU (whose memory is the machine's).

    A GPU's number stays while its agent runs; ``cuda:N`` counts the GPUs that CUDA can compute on,
    with MIG instances in place of the GPU that they divide. ``uuid`` is what an engine is to be
    given. ``problem`` says why a device that is not healthy takes no work, and what to do.

    :param parent: of a MIG instance: the UUID of its GPU, whose temperature is also told
    :param cuda_version: the newest that the driver supports (``12.4``)
    :param links: which of ``LINKS`` joins it to each other GPU, by that one's id; those of which
        the driver tells nothing are left out
    :param processes: those that are not workers of this hive; those with most memory come first
    :param lost: of one that is not healthy: it has failed itself, and its workers with it; a driver
        that is merely silent takes nothing from those that run
    :param instruction_sets: of a CPU: ``avx2``, ``avx512f``, ``amx``, ``neon``
    """

    id: str
    name: str
    device_type: Literal["gpu", "cpu"]
    vram_total_mb: int
    vram_free_mb: int
    vram_used_mb: int | None = None
    compute_capability: str | None = None
    uuid: str | None = None
    parent: str | None = None
    pci_address: str | None = None
    utilization_percent: int | None = None
    temperature_c: int | None = None
    power_w: int | None = None
    driver_version: str | None = None
    cuda_version: str | None = None
    links: dict[str, str] = Field(default_factory=dict)
    processes: tuple[DeviceProcess, ...] = ()
    cores: int | None = None
    instruction_sets: tuple[str, ...] = ()
    healthy: bool = True
    problem: str | None = None
    lost: bool = False


def together(devices: Sequence[str]) -> str:
    """``cuda:0,1`` for the devices ``cuda:0`` and ``cuda:1``, which are of one kind."""
    first, *others = devices
    return ",".join((first, *(other.partition(":")[2] for other in others)))


class ModelInfo(Told):
    """One model on a machine's disk.

    ``digest`` identifies it: the digest of its files and its chat template, ``sha256:<hex>``.
    ``embedding``: it makes vectors and does not chat.

    :param pooling: how it makes one vector of many, where its file says so; with ``rank`` it is no
        vector but a score, of how well a document answers a query
    :param projector: the file that lets it see or hear, if it has one
    """

    id: str
    digest: str
    format: ModelFormat
    size_bytes: int
    source: Literal["shipped", "hub", "file", "scripted", "external"]
    path: str
    architecture: str | None = None
    quantization: str | None = None
    context_length: int | None = None
    embedding: bool = False
    pooling: Pooling | None = None
    projector: str | None = None
    hive_id: str | None = None
    loaded: bool = False


class EngineInfo(Told):
    """One engine that a hive has: built in, already importable, or in an environment of its own.

    :param path: of its Python interpreter
    :param problem: why it cannot be used, and what to do
    """

    engine: str
    version: str
    state: Literal["ready", "installing", "broken"]
    source: Literal["built in", "importable", "installed"]
    path: str
    size_bytes: int | None = None
    problem: str | None = None
    hive_id: str | None = None


class WorkerInfo(Told):
    """One inference worker, and how busy it is.

    ``device`` is the first of its ``devices``; that of an external engine is ``external``.

    :param adapters: name → digest of those that can be asked for by name (vLLM's LoRA modules)
    :param progress: how far loading has come, in words of the engine
    :param in_flight: what it works on; of an external engine with what others ask of it
    :param url: of an external engine
    """

    worker_id: str
    pid: int | None = None
    model: str
    digest: str
    engine: str
    device: str
    devices: tuple[str, ...] = ()
    state: WorkerState
    slots: int
    in_flight: int
    restarts: int = 0
    started_at: float
    rss_mb: int | None = None
    context_length: int | None = None
    tasks: tuple[Task, ...] = ("generate", "embed")
    adapters: dict[str, str] = Field(default_factory=dict)
    problem: str | None = None
    progress: str | None = None
    hive_id: str | None = None
    url: str | None = None
    socket: str | None = None
    log: str | None = None

    @property
    def free(self) -> bool:
        return self.state == "ready" and self.in_flight < self.slots

    @property
    def answers_for(self) -> tuple[tuple[str, str], ...]:
        """Names, and digests, under which it can be asked: its model, and its adapters."""
        return ((self.model, self.digest), *self.adapters.items())

    def has(self, digest: str) -> bool:
        """Whether it answers for this model, or adapter."""
        return digest == self.digest or digest in self.adapters.values()


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


class Fit(Told):
    """What a model would take of one device, or of several that share it.

    :param device: an id, or several (``cuda:0,1``); sizes are those of all together
    :param on_disk: the model lies on this hive's disk; otherwise the hub told of it
    :param engine_problem: why no engine of this hive computes there now, and what to do
    :param measured_mb: what the latest load in the same setting held
    :param suggestions: what would make it fit, in words, the cheapest first
    """

    hive_id: str
    model: str
    device: str
    engine: str = ""
    on_disk: bool = True
    engine_problem: str | None = None
    fits: bool
    needed_mb: int
    weights_mb: int
    kv_cache_mb: int
    compute_mb: int
    overhead_mb: int
    free_mb: int
    missing_mb: int
    measured_mb: int | None = None
    sentence: str
    notes: list[str] = Field(default_factory=list)
    suggestions: list[str] = Field(default_factory=list)


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
