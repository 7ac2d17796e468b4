"""How a llama.cpp worker is started."""

from __future__ import annotations

from pathlib import Path

from hive_agent.workers.spec import Launch, WorkerSpec, ours

CONNECTIONS = 240  # its server has 256 threads, and each connection holds one


def launch(spec: WorkerSpec, socket: Path) -> Launch:
    """The command of ``worker.engines.llamacpp``."""
    flags = [f"--model={spec.model.path}", f"--threads={spec.threads}"]
    flags += ["--embeddings"] if spec.options.embeddings else []
    flags += ["--rerank"] if spec.options.rerank else []
    flags += [f"--kv-type={spec.options.kv_type}"] if spec.options.kv_type else []
    flags += ["--context-shift"] if spec.options.context_shift else []
    return ours(spec, socket, *flags, connections=CONNECTIONS)
