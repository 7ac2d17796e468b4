"""Everything that can be asked of a queen or a hive through ``POST /v1/jobs``.

Flat JSON, ``operation`` is the tag. Adding an operation is: a model here, its place in
:data:`Operation`, and a case in the ``match`` of whoever runs it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

from operations import patterns
from operations.errors import InvalidRequest, from_validation

MAX_TOKENS = 1_000_000
MAX_SEED = 2**32 - 1

HiveId = Annotated[str, Field(pattern=patterns.HIVE_ID)]
WorkerId = Annotated[str, Field(pattern=patterns.WORKER_ID)]
ModelName = Annotated[str, Field(min_length=1, max_length=1024, pattern=patterns.ONE_LINE)]
DeviceId = Annotated[str, Field(pattern=patterns.DEVICE_ID)]
DeviceKind = Literal["cpu", "cuda", "metal", "rocm", "vulkan"]
DeviceIndex = Annotated[int, Field(ge=0, le=1023)]
Engine = Literal["llamacpp", "vllm", "scripted", "external"]
EngineName = Annotated[str, Field(pattern=patterns.ENGINE_NAME)]
EngineVersion = Annotated[str, Field(pattern=patterns.ENGINE_VERSION)]
EngineUrl = Annotated[str, Field(max_length=512)]
EngineKey = Annotated[str, Field(max_length=4096, pattern=patterns.KEY)]
Text = Annotated[str, Field(min_length=1, max_length=1024, pattern=patterns.ONE_LINE)]
Placement = Literal["spread", "pack"]
DType = Literal["auto", "float32", "float16", "bfloat16"]
FlagValue = bool | int | float | Text | list[Text]


class Message(BaseModel):
    """One turn of a chat, OpenAI-shaped; ``content`` is text or a list of content parts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, JsonValue]]
    name: str | None = None


class OperationBase(BaseModel):
    """Base of all operations: frozen, strict, and closed to unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    hive_id: HiveId | None = None


class Status(OperationBase):
    """Everything a daemon knows about itself and, if it is a queen, about its hives."""

    operation: Literal["status"] = "status"


class Infer(OperationBase):
    """Ask a loaded model. ``prompt`` is one user message; ``messages`` a whole chat.

    :param max_tokens: tokens to generate at most; without it the model stops by itself or at
        the end of its context
    :param device: only workers on this device (``cuda:0``, ``cpu``)
    :param priority: kept for the queue; requests of both kinds are served alike so far
    :param on_disconnect: what a job does when its last reader leaves for longer than 10 s
    """

    operation: Literal["infer"] = "infer"
    model: ModelName
    prompt: str | None = Field(default=None, min_length=1)
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=10_000)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(
        default=None, min_length=1, max_length=16
    )
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    stream: bool = True
    device: DeviceId | None = None
    worker_id: WorkerId | None = None
    priority: Literal["interactive", "batch"] = "interactive"
    on_disconnect: Literal["cancel", "detach"] = "cancel"

    @model_validator(mode="before")
    @classmethod
    def _one_stop_is_a_list_of_one(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("stop"), str):
            return {**data, "stop": [data["stop"]]}
        return data

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        return self

    def chat(self) -> list[dict[str, Any]]:
        """The conversation as OpenAI messages."""
        if self.messages is None:
            return [{"role": "user", "content": self.prompt}]
        return [message.model_dump(exclude_none=True) for message in self.messages]


KvType = Literal["f32", "f16", "bf16", "fp8", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


class Lora(BaseModel):
    """A LoRA adapter: the model's name with it, and where it lies on the hive's disk.

    :param name: what requests give as ``model`` (vLLM), or what it is listed as (llama.cpp)
    :param path: absolute; a GGUF file for llama.cpp, a folder with ``adapter_config.json`` for vLLM
    :param scale: how much of it is added (llama.cpp only)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: Annotated[str, Field(pattern=patterns.HIVE_ID)]
    path: Annotated[Text, Field(pattern=patterns.ABSOLUTE_PATH)]
    scale: float = Field(default=1.0, ge=-10, le=10)


class WorkerOptions(BaseModel):
    """How a worker is to run. What is left out is chosen from the model and the machine.

    :param engine_version: which of the installed environments of the engine (``hive engines ls``)
    :param context_length: tokens that one request may use, prompt and answer together
    :param slots: requests served at the same time
    :param threads: CPU threads of the engine; never more than the machine has cores
    :param embeddings: serve ``/v1/embeddings`` instead of chat (an embedding model)
    :param rerank: serve ``/v1/rerank`` instead of chat (a reranking model)
    :param kv_type: numbers of the KV cache; ``q8_0`` takes half of the memory of ``f16``
    :param context_shift: let an answer run past the context by forgetting its beginning
    :param dtype: numbers of the weights (vLLM)
    :param quantization: how vLLM is to read or make quantized weights (``awq``, ``fp8``)
    :param memory_share: of each GPU, how much vLLM takes altogether
    :param lora: adapters
    :param chat_template: Jinja text in place of the model's own; makes it another model
    :param projector: llama.cpp's multimodal projector (``mmproj``), an absolute path on the hive
    :param flags: other flags of the engine by their long names without dashes, checked against
        what the engine knows; those that Hive sets itself are refused
    :param url: of an external engine: ``http://host:port`` or ``unix:/path``
    :param api_key: the external engine's own key
    :param served_as: the model's name at the external engine, where it differs
    :param script: behaviour of the scripted engine, see ``worker/engines/scripted.py``
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    engine: Engine | None = None
    engine_version: EngineVersion | None = None
    context_length: int | None = Field(default=None, ge=64, le=16_777_216)
    slots: int | None = Field(default=None, ge=1, le=4096)
    threads: int | None = Field(default=None, ge=1, le=1024)
    embeddings: bool = False
    rerank: bool = False
    kv_type: KvType | None = None
    context_shift: bool = False
    dtype: DType | None = None
    quantization: Annotated[str, Field(pattern=patterns.QUANTIZATION)] | None = None
    memory_share: float | None = Field(default=None, gt=0, le=1)
    lora: list[Lora] | None = Field(default=None, min_length=1, max_length=64)
    chat_template: str | None = Field(default=None, min_length=1, max_length=2**20)
    projector: Annotated[Text, Field(pattern=patterns.ABSOLUTE_PATH)] | None = None
    flags: dict[Annotated[str, Field(pattern=patterns.FLAG)], FlagValue] | None = None
    url: EngineUrl | None = None
    api_key: EngineKey | None = Field(default=None, repr=False)
    served_as: ModelName | None = None
    script: dict[str, JsonValue] | None = None

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        if self.embeddings and self.rerank:
            raise ValueError("give either 'embeddings' or 'rerank': a worker is for one of them")
        return self


class WorkerSpawn(OperationBase):
    """Start a worker: ``worker`` is the kind of device, ``device`` an index within the kind.

    Without ``device``, ``devices`` and ``gpus`` the hive chooses: as many devices as it needs.

    :param worker: without it, the GPUs of a hive that has some, else its CPU; of no meaning for an
        external engine
    :param gpus: how many devices the hive is to choose, to share the model
    :param placement: ``spread`` takes the emptiest devices, ``pack`` the fullest that have room
    :param force: load it although it will not fit
    """

    operation: Literal["worker_spawn"] = "worker_spawn"
    model: ModelName
    worker: DeviceKind | None = None
    device: DeviceIndex | None = None
    devices: list[DeviceIndex] | None = Field(default=None, min_length=1, max_length=64)
    gpus: int | None = Field(default=None, ge=1, le=64)
    placement: Placement = "spread"
    options: WorkerOptions = WorkerOptions()
    force: bool = False

    @model_validator(mode="after")
    def _device_or_devices(self) -> Self:
        given = [name for name in ("device", "devices", "gpus") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give either '{given[0]}' or '{given[1]}'")
        if self.devices is not None and len(set(self.devices)) < len(self.devices):
            raise ValueError("'devices' names one device twice")
        if self.worker is None and (self.device is not None or self.devices is not None):
            raise ValueError("'device' is an index within a kind: give 'worker', too")
        return self

    def device_ids(self) -> list[str]:
        """The devices asked for, as ids (``cuda:0``; the CPU is ``cpu``)."""
        indices = self.devices or [self.device or 0]
        return [
            "cpu" if self.worker == "cpu" and index == 0 else f"{self.worker}:{index}"
            for index in indices
        ]


class WorkerProcessList(OperationBase):
    """The workers of a hive, or of all hives."""

    operation: Literal["worker_process_list"] = "worker_process_list"


class _OneWorker(OperationBase):
    """Names one worker, by its process id or by its worker id."""

    pid: int | None = Field(default=None, ge=1, le=2**31 - 1)
    worker_id: WorkerId | None = None

    @model_validator(mode="after")
    def _pid_or_worker_id(self) -> Self:
        if (self.pid is None) == (self.worker_id is None):
            raise ValueError("give either 'pid' or 'worker_id'")
        return self


class WorkerProcessGet(_OneWorker):
    """One worker, with the path of its log and its last lines."""

    operation: Literal["worker_process_get"] = "worker_process_get"
    log_lines: int = Field(default=20, ge=0, le=10_000)


class WorkerProcessDelete(_OneWorker):
    """Stop a worker: no new requests, running ones may finish, then its process group ends."""

    operation: Literal["worker_process_delete"] = "worker_process_delete"


class ModelDownload(OperationBase):
    """Fetch a model: ``org/repo``, ``org/repo:Q4_K_M``, ``org/repo:file.gguf``, ``file:/path``."""

    operation: Literal["model_download"] = "model_download"
    model: ModelName


class ModelList(OperationBase):
    """The models on the disk of a hive, or of all hives."""

    operation: Literal["model_list"] = "model_list"


class ModelGet(OperationBase):
    """One model on a hive's disk."""

    operation: Literal["model_get"] = "model_get"
    id: ModelName


class ModelDelete(OperationBase):
    """Remove a model from a hive's disk; refused while a worker has it loaded."""

    operation: Literal["model_delete"] = "model_delete"
    id: ModelName


class ModelLoad(OperationBase):
    """Load a model on a device: a ``worker_spawn`` under an older name."""

    operation: Literal["model_load"] = "model_load"
    id: ModelName
    device: DeviceId = "cpu"

    def as_spawn(self) -> WorkerSpawn:
        kind, _, index = self.device.partition(":")
        try:
            return WorkerSpawn(
                hive_id=self.hive_id,
                model=self.id,
                worker=kind,  # type: ignore[arg-type]  # validated by the model
                device=int(index or 0),
            )
        except ValidationError as error:
            raise from_validation(error, "model_load") from None


class ModelUnload(OperationBase):
    """Stop every worker that has the model loaded."""

    operation: Literal["model_unload"] = "model_unload"
    id: ModelName


class ModelFit(OperationBase):
    """What a model would take of each device, of a hive or of all, and whether it is there."""

    operation: Literal["model_fit"] = "model_fit"
    model: ModelName
    options: WorkerOptions = WorkerOptions()


class EngineList(OperationBase):
    """The engines of a hive, or of all hives, and what is wrong with any."""

    operation: Literal["engine_list"] = "engine_list"


class EngineModels(OperationBase):
    """What an OpenAI-compatible server that somebody else started serves, asked by a hive.

    :param url: as the hive's machine reaches it: ``http://host:port`` or ``unix:/path``
    :param api_key: the server's own key
    """

    operation: Literal["engine_models"] = "engine_models"
    url: EngineUrl
    api_key: EngineKey | None = Field(default=None, repr=False)


class EngineInstall(OperationBase):
    """Install an engine into an environment of its own; one that is there and whole stays."""

    operation: Literal["engine_install"] = "engine_install"
    engine: EngineName
    version: EngineVersion | None = None


class EngineDelete(OperationBase):
    """Remove an engine's environment; refused while a worker runs in it."""

    operation: Literal["engine_delete"] = "engine_delete"
    engine: EngineName
    version: EngineVersion | None = None


class HiveCheck(OperationBase):
    """A hive checks itself, line by line: devices, engines, disk, models."""

    operation: Literal["hive_check"] = "hive_check"
    alias: str | None = Field(default=None, max_length=64)


class QueenCheck(OperationBase):
    """The queen checks itself and every hive that it knows."""

    operation: Literal["queen_check"] = "queen_check"


class DeviceList(OperationBase):
    """The devices of a hive, or of all hives."""

    operation: Literal["device_list"] = "device_list"


Operation = Annotated[
    Status
    | Infer
    | WorkerSpawn
    | WorkerProcessList
    | WorkerProcessGet
    | WorkerProcessDelete
    | ModelDownload
    | ModelList
    | ModelGet
    | ModelDelete
    | ModelLoad
    | ModelUnload
    | ModelFit
    | EngineList
    | EngineModels
    | EngineInstall
    | EngineDelete
    | HiveCheck
    | QueenCheck
    | DeviceList,
    Field(discriminator="operation"),
]

ADAPTER: TypeAdapter[Operation] = TypeAdapter(Operation)

ALIASES = {
    "worker_list": "worker_process_list",
    "worker_get": "worker_process_get",
    "worker_stop": "worker_process_delete",
}


def parse(body: bytes, *, from_daemon: bool = False) -> Operation:
    """Read an operation from a request's body.

    :param body: UTF-8 JSON
    :param from_daemon: another daemon sent it; fields that only a newer version knows are ignored
    :raises InvalidRequest: no JSON, no such operation, or missing, extra or mistyped fields
    """
    payload = parse_json_object(body)
    tag = payload.get("operation")
    if not isinstance(tag, str):
        raise InvalidRequest(
            'The body has no \'operation\'. Send e.g. {"operation":"status"}.', param="operation"
        )
    tag = ALIASES.get(tag, tag)
    if tag not in known_operations():
        raise InvalidRequest(
            f"There is no operation '{tag[:64]}'. Known: {', '.join(known_operations())}.",
            code="unknown_operation",
            param="operation",
        )
    try:
        return ADAPTER.validate_python(
            {**payload, "operation": tag}, extra="ignore" if from_daemon else "forbid"
        )
    except ValidationError as error:
        raise from_validation(error, tag) from None
    except RecursionError:
        raise InvalidRequest(f"{tag}: the JSON is nested too deeply.") from None


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Decode a JSON object.

    :raises InvalidRequest: not UTF-8, not JSON, NaN or infinity, nested too deeply, no object
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"The body is not UTF-8 (byte {error.start}). Send UTF-8 JSON.", code="invalid_utf8"
        ) from None
    try:
        payload = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(payload, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    return payload


def known_operations() -> list[str]:
    """The tags that :func:`parse` takes, aliases left out."""
    return list(_TAGS)


def json_schema() -> dict[str, Any]:
    """The JSON schema of all operations (printed by ``python -m operations``)."""
    return ADAPTER.json_schema()


_TAGS: tuple[str, ...] = tuple(json_schema()["discriminator"]["mapping"])
