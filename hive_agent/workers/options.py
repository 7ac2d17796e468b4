"""Which options belong to which engine: one that it does not know is refused, not ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from hive_agent.kv_types import KV_TYPES
from operations.errors import InvalidRequest
from operations.operations import Engine, WorkerOptions

_ALL: Final = frozenset({"engine", "context_length", "slots", "embeddings", "rerank"})
_OURS: Final = frozenset({"threads"})

OPTIONS: Final[Mapping[Engine, frozenset[str]]] = {
    "llamacpp": _ALL
    | _OURS
    | {
        "engine_version",
        "kv_type",
        "context_shift",
        "lora",
        "chat_template",
        "projector",
        "flags",
    },
    "vllm": _ALL
    | _OURS
    | {
        "engine_version",
        "kv_type",
        "dtype",
        "quantization",
        "memory_share",
        "lora",
        "chat_template",
        "flags",
    },
    "scripted": _ALL | _OURS | {"script"},
    "external": _ALL | {"url", "api_key", "served_as"},
}

NAMES: Final[Mapping[Engine, str]] = {
    "llamacpp": "llama.cpp",
    "vllm": "vLLM",
    "scripted": "the scripted engine",
    "external": "an external engine",
}


def check_before_model(options: WorkerOptions) -> None:
    """What options tell before it is known which model, and so which engine, they are for.

    :raises InvalidRequest: the engine that they name does not know one; or one belongs to an engine
        that no model's format means, and that is not named
    """
    if options.engine is not None:
        check(options.engine, options)
        return
    for engine in ("external", "scripted"):
        own = OPTIONS[engine] - OPTIONS["llamacpp"] - OPTIONS["vllm"]
        for name in sorted(own, reverse=True):
            if getattr(options, name) is not None:
                raise InvalidRequest(
                    f"'{name}' belongs to {NAMES[engine]}. Leave it out, or say "
                    f'"engine":"{engine}".',
                    param=f"options.{name}",
                )


def check(engine: Engine, options: WorkerOptions) -> None:
    """Hold options against what the engine knows.

    :raises InvalidRequest: it does not know one, or not this value; names whose it is
    """
    defaults = WorkerOptions()
    for name in WorkerOptions.model_fields:
        if name in OPTIONS[engine] or getattr(options, name) == getattr(defaults, name):
            continue
        owners = [NAMES[other] for other, known in OPTIONS.items() if name in known]
        raise InvalidRequest(
            f"'{name}' is no option of {NAMES[engine]}: it belongs to {' and '.join(owners)}. "
            "Leave it out.",
            param=f"options.{name}",
        )
    kinds = KV_TYPES.get(engine)
    if kinds is not None and options.kv_type is not None and options.kv_type not in kinds:
        raise InvalidRequest(
            f"{NAMES[engine]} keeps no cache of {options.kv_type}. Give one of: "
            f"{', '.join(kinds)}.",
            param="options.kv_type",
        )
    if engine == "vllm" and (scaled := [one.name for one in options.lora or () if one.scale != 1]):
        raise InvalidRequest(
            f"vLLM adds every adapter whole, and '{scaled[0]}' is asked for with a scale. Leave "
            "its 'scale' out.",
            param="options.lora",
        )


def check_device(engine: Engine, options: WorkerOptions, device: str) -> None:
    """Hold options against the device that was chosen.

    :raises InvalidRequest: one means nothing there
    """
    if engine == "vllm" and device == "cpu" and options.memory_share is not None:
        raise InvalidRequest(
            "'memory_share' is a share of a GPU's memory, and this worker would run on the CPU. "
            "Leave it out, or choose a GPU.",
            param="options.memory_share",
        )
