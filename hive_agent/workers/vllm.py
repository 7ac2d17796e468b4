"""How a vLLM worker is started: its own OpenAI server, by the Python of its environment.

Flags and variables: vLLM's ``--help=all`` and ``vllm/envs.py`` (0.32 and 0.33).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from hive_agent.workers.flags import FlagRules
from hive_agent.workers.spec import Launch, WorkerSpec, beside

SERVER: Final = "vllm.entrypoints.openai.api_server"
GIB: Final = 2**30
LEAST_CPU_CACHE_GIB: Final = 1
LARGEST_RANK: Final = 64
"""vLLM refuses adapters of a rank above ``--max-lora-rank``, and takes its memory for all of it."""

RULES: Final = FlagRules(
    engine="vLLM",
    set_by_hive={
        "chat-template": "options.chat_template",
        "dtype": "options.dtype",
        "enable-lora": "options.lora",
        "gpu-memory-utilization": "options.memory_share",
        "kv-cache-dtype": "options.kv_type",
        "lora-modules": "options.lora",
        "max-model-len": "options.context_length",
        "max-num-seqs": "options.slots",
        "model": "model",
        "quantization": "options.quantization",
        "served-model-name": "model",
        "tensor-parallel-size": "devices",
    },
    refused=(
        "aggregate-engine-logging",
        "api-key",
        "api-server-count",
        "config",
        "data-parallel-",
        "enable-log-",
        "grpc",
        "headless",
        "help",
        "host",
        "log-config-file",
        "logging-config",
        "master-",
        "middleware",
        "nnodes",
        "node-rank",
        "port",
        "root-path",
        "ssl-",
        "uds",
        "uvicorn-",
    ),
    refused_because="it would change where the engine listens, what it logs, or how it is run",
)
"""Names that end in a dash stand for all that begin so."""

KV_TYPES: Final = {"f16": "auto", "bf16": "bfloat16", "fp8": "fp8"}


def launch(spec: WorkerSpec, socket: Path) -> Launch:
    """The command of vLLM's own server."""
    options = spec.options
    argv = [spec.python, "-m", SERVER, f"--uds={socket}", f"--model={spec.model.path}"]
    argv += [f"--served-model-name={spec.served_as}"]
    argv += [f"--max-model-len={spec.context_length}", f"--max-num-seqs={spec.slots}"]
    argv += ["--disable-uvicorn-access-log"]
    argv += [f"--dtype={options.dtype}"] if options.dtype else []
    argv += [f"--quantization={options.quantization}"] if options.quantization else []
    argv += [f"--kv-cache-dtype={KV_TYPES[options.kv_type]}"] if options.kv_type else []
    argv += _task(spec)
    argv += _lora(spec)
    files = {}
    if options.chat_template is not None:
        template = beside(socket, "jinja")
        files[template] = options.chat_template
        argv += [f"--chat-template={template}"]
    env: dict[str, str | None] = {
        **spec.env,
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
        env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        env |= {"CUDA_VISIBLE_DEVICES": ",".join(spec.uuids)} if spec.uuids else {}
    if (options.flags or {}).get("enable-sleep-mode") is True:
        env["VLLM_SERVER_DEV_MODE"] = "1"  # without it there is no /sleep
    argv += RULES.argv(options.flags or {})
    return Launch(tuple(argv), env, files=files)


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
        f"--max-lora-rank={LARGEST_RANK}",
        "--lora-modules",
        *named,
    ]
