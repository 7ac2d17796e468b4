"""From what was asked to what shall run: pure decisions, no process is touched here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

from hive_agent.workers.spec import WorkerSpec
from operations.errors import InvalidRequest, Unavailable
from operations.hosts import Device, ModelInfo
from operations.operations import Engine, WorkerOptions, WorkerSpawn

DEFAULT_SLOTS = 4
DEFAULT_CONTEXT = 4096  # tokens; what a model can do beyond must be asked for, it costs memory
SMALL_MODEL_BYTES = 256 * 10**6
GPU_THREADS = 1
LLAMACPP_SLOTS = 256  # the most sequences that llama.cpp holds


def decide(
    request: WorkerSpawn,
    model: ModelInfo,
    devices: Sequence[Device],
    *,
    worker_id: str,
    cores: int,
    threads_in_use: int,
) -> WorkerSpec:
    """Turn a request into a spec, with every default filled in.

    :param devices: those that it is to run on
    :param cores: cores that this machine lets us use
    :param threads_in_use: engine threads of the workers that run already
    :raises InvalidRequest: an option out of range, an engine that cannot run it
    """
    engine = engine_of(request.options, model)
    wanted = request.options.context_length
    longest = model.context_length
    if wanted is not None and longest is not None and wanted > longest:
        raise InvalidRequest(
            f"{model.id} was made for at most {longest} tokens of context, not {wanted}. "
            f"Ask for {longest} or less.",
            param="options.context_length",
        )
    if engine == "llamacpp" and (request.options.slots or 1) > LLAMACPP_SLOTS:
        raise InvalidRequest(
            f"llama.cpp serves at most {LLAMACPP_SLOTS} requests at once. Ask for fewer slots.",
            param="options.slots",
        )
    threads = request.options.threads
    if threads is not None and threads > cores:
        raise InvalidRequest(
            f"{threads} threads were asked for; this machine has {cores} cores. Ask for fewer.",
            param="options.threads",
        )
    spec = WorkerSpec(
        worker_id=worker_id,
        model=model,
        engine=engine,
        devices=tuple(device.id for device in devices),
        cuda_ids=_cuda_ids(devices),
        slots=request.options.slots or DEFAULT_SLOTS,
        context_length=wanted or min(longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT),
        threads=threads or 1,
        options=request.options.model_copy(update=_task(request.options, model)),
    )
    return seated(spec, cores, threads_in_use)


def _task(options: WorkerOptions, model: ModelInfo) -> dict[str, bool]:
    """What it is for: what was asked, else what the model was made for."""
    rerank = options.rerank or (model.pooling == "rank" and not options.embeddings)
    return {"rerank": rerank, "embeddings": not rerank and (options.embeddings or model.embedding)}


def seated(spec: WorkerSpec, cores: int, in_use: int) -> WorkerSpec:
    """A worker with as many threads as are left for it now, unless it was asked for a number.

    Beside GPUs that hold all layers one is enough.
    """
    if spec.options.threads is not None:
        return spec
    on_cpu = spec.device == "cpu"
    return replace(
        spec,
        threads=default_threads(spec.model.size_bytes, cores, in_use) if on_cpu else GPU_THREADS,
    )


def crowding(threads: int, cores: int, in_use: int) -> str | None:
    """What to tell whoever starts a worker whose threads find no cores of their own."""
    if threads + in_use <= cores:
        return None
    return (
        f"The engines have {threads + in_use} threads with this worker, and this machine has "
        f"{cores} cores: they take turns, and all answer slower. Stop a worker, or give this one "
        "fewer threads."
    )


def default_threads(model_bytes: int, cores: int, in_use: int) -> int:
    """Engine threads on the CPU: never more than free cores, for ggml's threads spin.

    A small model needs few; a larger one takes half of what is free, so that the next finds some;
    on a small machine all but one, which stays for the agent and the token path.
    """
    free = cores - in_use
    share = free // 2 if cores > 4 else free - 1
    return max(1, min(share, 2) if model_bytes < SMALL_MODEL_BYTES else share)


def scripted_model(name: str, options: WorkerOptions) -> ModelInfo:
    """The model of a scripted worker: any name, identified by that name and its script."""
    script = json.dumps(options.script or {}, sort_keys=True)
    digest = hashlib.sha256(f"{name.lower()}\n{script}".encode()).hexdigest()
    return ModelInfo(
        id=name,
        digest=f"sha256:{digest}",
        format="scripted",
        size_bytes=0,
        source="scripted",
        path="",
        loaded=True,
    )


def engine_of(options: WorkerOptions, model: ModelInfo) -> Engine:
    """The engine that runs a model: what its format needs.

    :raises InvalidRequest: another one was asked for
    """
    fitting: Engine
    match model.format:
        case "gguf":
            fitting = "llamacpp"
        case "safetensors":
            fitting = "vllm"
        case "scripted":
            fitting = "scripted"
        case "external":
            fitting = "external"
    chosen = options.engine or fitting
    if chosen != fitting:
        raise InvalidRequest(
            f"{model.id} is a {model.format} model; the engine {chosen} cannot run it here. "
            f"Leave 'engine' out, or say {fitting}.",
            param="options.engine",
        )
    return chosen


def _cuda_ids(devices: Sequence[Device]) -> tuple[str, ...]:
    """What CUDA is to be told of NVIDIA GPUs: their UUIDs, or, if one of them tells none, the
    numbers of all, which are those of the bus unless a GPU has come or gone since the start.

    :raises Unavailable: a MIG instance without a UUID: CUDA knows it by nothing else
    """
    gpus = [device for device in devices if device.id.startswith("cuda:")]
    told = tuple(device.uuid for device in gpus if device.uuid)
    if len(told) == len(gpus):
        return told
    if nameless := [device.id for device in gpus if device.parent and not device.uuid]:
        raise Unavailable(
            f"The driver tells no UUID of the MIG instance {nameless[0]}, so CUDA cannot be told "
            "to use it. Choose another device.",
            code="device_without_uuid",
            param="device",
            retryable=False,
        )
    return tuple(device.id.partition(":")[2] for device in gpus)
