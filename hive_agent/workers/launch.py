"""From what was asked to what shall run: pure decisions, no process is touched here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from hive_agent.workers.spec import WorkerSpec
from operations.errors import InvalidRequest, Unavailable
from operations.hosts import Device, ModelInfo
from operations.operations import Engine, WorkerOptions, WorkerSpawn

DEFAULT_SLOTS = 4
DEFAULT_CONTEXT = 4096  # tokens; what a model can do beyond must be asked for, it costs memory
SMALL_MODEL_BYTES = 256 * 10**6
LLAMACPP_SLOTS = 256  # the most sequences that llama.cpp holds


def decide(
    request: WorkerSpawn,
    model: ModelInfo,
    devices: Sequence[Device],
    *,
    worker_id: str,
    cores: int,
    threads_in_use: int,
    no_gpu_because: str | None,
) -> WorkerSpec:
    """Turn a request into a spec, with every default filled in.

    :param cores: cores that this machine lets us use
    :param threads_in_use: engine threads of the workers that run already
    :param no_gpu_because: why this machine shows no NVIDIA GPU, if it shows none
    :raises InvalidRequest: no such device, an option out of range, an engine that cannot run it
    :raises Unavailable: the engine that it needs is not installed here
    """
    device = _device(request, devices, no_gpu_because)
    engine = _engine(request.options, model)
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
    return WorkerSpec(
        worker_id=worker_id,
        model=model,
        engine=engine,
        devices=(device.id,),
        uuids=(device.uuid,) if device.uuid else (),
        slots=request.options.slots or DEFAULT_SLOTS,
        context_length=wanted or min(longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT),
        threads=threads or default_threads(model.size_bytes, cores, threads_in_use),
        options=request.options.model_copy(
            update={
                "embeddings": not request.options.rerank
                and (request.options.embeddings or model.embedding)
            }
        ),
    )


def default_threads(model_bytes: int, cores: int, in_use: int) -> int:
    """Engine threads on the CPU: never more than free cores, for ggml's threads spin.

    A small model needs few; a larger one takes half of what is free, so that the next finds some;
    on a small machine all but one, which stays for the agent and the token path.
    """
    free = cores - in_use
    share = free // 2 if cores > 4 else free - 1
    return max(1, min(share, 2) if model_bytes < SMALL_MODEL_BYTES else share)


def scripted_model(request: WorkerSpawn) -> ModelInfo:
    """The model of a scripted worker: any name, identified by that name and its script."""
    script = json.dumps(request.options.script or {}, sort_keys=True)
    digest = hashlib.sha256(f"{request.model.lower()}\n{script}".encode()).hexdigest()
    return ModelInfo(
        id=request.model,
        digest=f"sha256:{digest}",
        format="scripted",
        size_bytes=0,
        source="scripted",
        path="",
        loaded=True,
    )


def _device(request: WorkerSpawn, devices: Sequence[Device], no_gpu_because: str | None) -> Device:
    wanted = request.device_ids()
    if len(wanted) > 1:
        raise InvalidRequest(
            "A worker over several devices is not built yet. Name one device.", param="devices"
        )
    for device in devices:
        if device.id == wanted[0]:
            if not device.healthy:
                raise InvalidRequest(
                    f"{device.id} takes no work: {device.problem}. Choose another device.",
                    code="device_unhealthy",
                    param="device",
                )
            return device
    there = ", ".join(device.id for device in devices)
    why = f" ({no_gpu_because})" if request.worker == "cuda" and no_gpu_because else ""
    raise InvalidRequest(
        f"This hive has no device {wanted[0]}{why}. It has: {there}. Choose one of these with "
        "'worker' and 'device'.",
        code="device_not_found",
        param="device",
    )


def _engine(options: WorkerOptions, model: ModelInfo) -> Engine:
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
    if chosen == "vllm":
        raise Unavailable(
            f"{model.id} needs the engine vLLM, which this version cannot run yet. "
            "Use a GGUF of the same model.",
            code="engine_not_installed",
            retryable=False,
        )
    return chosen
