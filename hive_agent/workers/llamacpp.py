"""How a llama.cpp worker is started, and what of a request its build refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from hive_agent.workers.flags import OTHER_MEMORY, OTHER_MODEL, FlagRules
from hive_agent.workers.spec import Launch, WorkerSpec, beside, ours

CONNECTIONS = 240  # its server has 256 threads, and each connection holds one

# Names that end in a dash stand for all that begin so.
_SET: Final = (
    "cache-ram-mib",
    "cors-",
    "endpoint-",
    "fit-params",
    "fit-params-",
    "log-json",
    "lora-init-without-apply",
    "mmproj-use-gpu",
    "models-",
    "n-batch",
    "n-threads-http",
    "n-ubatch",
    "no-alloc",
    "no-kv-offload",
    "no-mmproj",
    "no-op-offload",
    "offline",
    "port",
    "reuse-port",
    "sleep-idle-seconds",
    "ui",
    "ui-mcp-proxy",
    "use-jinja",
    "verbose-prompt",
    "verbosity",
    "warmup",
)
_MEMORY: Final = (
    "flash-attn-type",
    "kv-unified",
    "kv-unified-per-slot",
    "lazy-mode",
    "load-mode",
    "load-mtp",
    "mmproj-device",
    "moe-cache-size",
    "mtmd-batch-max-tokens",
    "n-ctx-checkpoints",
    "n-outputs-",
    "no-extra-bufts",
    "no-host",
    "swa-full",
    "tensor-buft-overrides",
)
_MODEL: Final = (
    "attention-type",
    "grp-attn-",
    "rope-",
    "yarn-",
)

RULES: Final = FlagRules(
    engine="llama.cpp",
    set_by_hive={
        "cache-type-k": "options.kv_type",
        "cache-type-v": "options.kv_type",
        "chat-template": "options.chat_template",
        "ctx-shift": "options.context_shift",
        "embedding": "options.embeddings",
        "main-gpu": "devices",
        "n-ctx": "options.context_length",
        "n-gpu-layers": "devices",
        "n-parallel": "options.slots",
        "pooling-type": "options.embeddings",
        "split-mode": "devices",
    },
    refused={
        **dict.fromkeys(_SET, "Hive counts on its own setting of it"),
        **dict.fromkeys(_MEMORY, OTHER_MEMORY),
        **dict.fromkeys(_MODEL, OTHER_MODEL),
    },
)


def launch(spec: WorkerSpec, socket: Path) -> Launch:
    """The command of ``worker.engines.llamacpp``."""
    options = spec.options
    flags = [f"--model={spec.model.path}", f"--threads={spec.threads}"]
    flags += [f"--pooling={pooling}"] if (pooling := _pooling(spec)) else []
    flags += [f"--kv-type={options.kv_type}"] if options.kv_type else []
    flags += ["--context-shift"] if options.context_shift else []
    flags += [f"--lora={adapter.scale}:{adapter.path}" for adapter in options.lora or []]
    flags += [f"--projector={spec.model.projector}"] if spec.model.projector else []
    files: dict[Path, str] = {}
    if options.chat_template is not None:
        template = beside(socket, "jinja")
        files[template] = options.chat_template
        flags += [f"--chat-template={template}"]
    if spec.device != "cpu":
        flags += [f"--gpus={len(spec.devices)}"]
    if spec.layers:
        flags += [f"--split={','.join(str(count) for count in spec.layers)}"]
    for name, value in (options.flags or {}).items():
        flags += [f"--setting={field(name)}={json.dumps(value)}"]
    command = ours(spec, socket, *flags, connections=CONNECTIONS)
    return Launch(command.argv, {**command.env, **spec.visible}, CONNECTIONS, files)


def field(flag: str) -> str:
    """The field of llama.cpp's ``common_params`` that a flag means."""
    return flag.replace("-", "_")


def _pooling(spec: WorkerSpec) -> str | None:
    """How a worker that does not chat makes one vector of many: as its model was made for."""
    if spec.options.rerank:
        return "rank"
    if not spec.options.embeddings:
        return None
    return spec.model.pooling if spec.model.pooling not in (None, "rank") else "mean"
