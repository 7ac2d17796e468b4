"""The command that runs a worker."""

from __future__ import annotations

import json
from pathlib import Path

from hive_agent.workers import llamacpp, vllm
from hive_agent.workers.spec import Launch, WorkerSpec, ours


def launch(spec: WorkerSpec, socket: Path) -> Launch:
    """The command that runs a worker, which will listen on ``socket``."""
    match spec.engine:
        case "llamacpp":
            return llamacpp.launch(spec, socket)
        case "vllm":
            return vllm.launch(spec, socket)
        case "scripted":
            return ours(spec, socket, f"--script={json.dumps(spec.options.script or {})}")
        case "external":
            raise AssertionError("an external engine is never started")
