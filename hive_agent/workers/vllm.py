"""How a vLLM worker is started: its own OpenAI server, by the Python of its environment.

Flags and variables: vLLM's ``--help=all`` and ``vllm/envs.py`` (0.32 and 0.33).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from hive_agent.fit.vllm import LORA_RANK
from hive_agent.workers.flags import OTHER_MEMORY, OTHER_MODEL, FlagRules
from hive_agent.workers.spec import Launch, WorkerSpec, beside
from operations.operations import WorkerOptions

SERVER: Final = "vllm.entrypoints.openai.api_server"
GIB: Final = 2**30
LEAST_CPU_CACHE_GIB: Final = 1

BATCH_FLAG: Final = "max-num-batched-tokens"
"""Tokens that vLLM computes at once; what it takes is predicted with it."""

# Names that end in a dash stand for all that begin so.
_HOW_IT_RUNS: Final = (
    "additional-config",
    "aggregate-engine-logging",
    "api-key",
    "api-server-count",
    "collect-detailed-traces",
    "config",
    "data-parallel-",
    "dcp-",
    "decode-context-parallel-size",
    "device-ids",
    "disable-uvicorn-access-log",
    "distributed-executor-backend",
    "dp-",
    "ec-",
    "elastic-ep-",
    "enable-elastic-ep",
    "enable-fault-tolerance",
    "enable-log-",
    "enable-logging-",
    "enable-scale-out",
    "enable-ssl-refresh",
    "fault-tolerance-config",
    "grpc",
    "grpc-",
    "headless",
    "help",
    "host",
    "kv-events-config",
    "kv-transfer-config",
    "log-",
    "logging-config",
    "master-",
    "max-log-len",
    "middleware",
    "mm-processor-device",
    "nnodes",
    "node-rank",
    "numa-bind",
    "numa-bind-",
    "otlp-traces-endpoint",
    "pipeline-parallel-size",
    "port",
    "prefill-context-parallel-size",
    "profiler-config",
    "ray-",
    "root-path",
    "scheduler-cls",
    "shutdown-timeout",
    "ssl-",
    "tokens-only",
    "uds",
    "uvicorn-",
    "weight-transfer-config",
    "worker-",
)
_MEMORY: Final = (
    "cpu-offload-",
    "disable-hybrid-kv-cache-manager",
    "disable-sliding-window",
    "enable-eplb",
    "eplb-config",
    "kv-cache-dtype-skip-layers",
    "kv-cache-memory-bytes",
    "kv-offloading-",
    "lora-dtype",
    "mamba-block-size",
    "mamba-cache-dtype",
    "mamba-ssm-cache-dtype",
    "max-cpu-loras",
    "mm-ipc-gpu-memory-gb",
    "mm-processor-cache-gb",
    "mm-shm-cache-max-object-size-mb",
    "num-gpu-blocks-override",
    "offload-",
    "skip-mm-profiling",
    "spec-",
    "speculative-config",
    "swap-space",
)
_MODEL: Final = (
    "code-revision",
    "config-format",
    "default-mm-loras",
    "diffusion-config",
    "download-dir",
    "hf-",
    "ignore-patterns",
    "load-format",
    "mm-encoder-only",
    "model-",
    "pooler-config",
    "quantization-",
    "revision",
    "rope-",
    "skip-tokenizer-init",
    "tokenizer",
    "tokenizer-",
)
_REACHES_OUT: Final = (
    "allowed-local-media-path",
    "io-processor-plugin",
    "logits-processors",
    "mm-encoder-fp8-scale-",
    "reasoning-parser-plugin",
    "tool-parser-plugin",
    "tool-server",
)

RULES: Final = FlagRules(
    engine="vLLM",
    set_by_hive={
        "chat-template": "options.chat_template",
        "dtype": "options.dtype",
        "convert": "options.embeddings",
        "enable-lora": "options.lora",
        "gpu-memory-utilization": "options.memory_share",
        "kv-cache-dtype": "options.kv_type",
        "lora-modules": "options.lora",
        "max-lora-rank": "options.lora",
        "max-loras": "options.lora",
        "max-model-len": "options.context_length",
        "max-num-seqs": "options.slots",
        "model": "model",
        "quantization": "options.quantization",
        "runner": "options.embeddings",
        "served-model-name": "model",
        "tensor-parallel-size": "devices",
    },
    refused={
        **dict.fromkeys(
            _HOW_IT_RUNS, "it would change where the engine listens, what it logs, or how it is run"
        ),
        **dict.fromkeys(_MEMORY, OTHER_MEMORY),
        **dict.fromkeys(_MODEL, OTHER_MODEL),
        **dict.fromkeys(
            _REACHES_OUT, "it would have the engine use code, files or servers beyond the model's"
        ),
    },
    counted={BATCH_FLAG},
)

KV_NAMES: Final = {"f16": "auto", "bf16": "bfloat16", "fp8": "fp8"}
"""What vLLM calls the types of its KV cache."""


def launch(spec: WorkerSpec, socket: Path) -> Launch:
    """The command of vLLM's own server."""
    options = spec.options
    argv = [spec.python, "-m", SERVER, f"--uds={socket}", f"--model={spec.model.path}"]
    argv += [f"--served-model-name={spec.served_as}"]
    argv += [f"--max-model-len={spec.context_length}", f"--max-num-seqs={spec.slots}"]
    argv += ["--disable-uvicorn-access-log"]
    argv += [f"--dtype={options.dtype}"] if options.dtype else []
    argv += [f"--quantization={options.quantization}"] if options.quantization else []
    argv += [f"--kv-cache-dtype={KV_NAMES[options.kv_type]}"] if options.kv_type else []
    argv += _task(spec)
    argv += _lora(spec)
    files = {}
    if options.chat_template is not None:
        template = beside(socket, "jinja")
        files[template] = options.chat_template
        argv += [f"--chat-template={template}"]
    env: dict[str, str | None] = {
        **spec.env,
        **spec.visible,
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": None,
        "PYTHONPATH": None,  # this environment imports nothing of ours
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_COLOR": "0",
    }
    if spec.device == "cpu":
        argv += ["--enforce-eager"]
        cache = -(-spec.reserved.kv_cache // GIB) if spec.reserved else LEAST_CPU_CACHE_GIB
        env |= {
            "OMP_NUM_THREADS": str(spec.threads),
            "VLLM_CPU_KVCACHE_SPACE": str(max(LEAST_CPU_CACHE_GIB, cache)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    else:
        argv += [f"--tensor-parallel-size={len(spec.devices)}"]
        share = spec.reserved.share if spec.reserved else options.memory_share
        argv += [f"--gpu-memory-utilization={share:.4f}"] if share else []
    if (options.flags or {}).get("enable-sleep-mode") is True:
        env["VLLM_SERVER_DEV_MODE"] = "1"  # without it there is no /sleep
    argv += RULES.argv(options.flags or {})
    return Launch(tuple(argv), env, files=files)


def batch_asked(options: WorkerOptions) -> int | None:
    """Tokens that it is told to compute at once; None for its own default."""
    asked = (options.flags or {}).get(BATCH_FLAG)
    return asked if type(asked) is int and asked > 0 else None


def _task(spec: WorkerSpec) -> list[str]:
    if spec.options.rerank:
        return ["--runner=pooling", "--convert=classify"]
    return ["--runner=pooling", "--convert=embed"] if spec.options.embeddings else []


def _lora(spec: WorkerSpec) -> list[str]:
    modules = spec.options.lora or []
    if not modules:
        return []
    named = [f"{module.name}={module.path}" for module in modules]
    return [
        "--enable-lora",
        f"--max-loras={len(modules)}",
        f"--max-lora-rank={LORA_RANK}",
        "--lora-modules",
        *named,
    ]
