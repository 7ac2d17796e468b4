"""The routers and gateways for inference that the Python index has."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from bench.peers.base import Command, FromIndex, Peer, free_port
from bench.upstream import MODEL


@dataclass(frozen=True)
class RustRouter(FromIndex, Peer):
    """sglang-router and its fork vllm-router: one family of flags, retries on as they come.

    :param module: what is run, as ``python -m``
    """

    module: str = ""

    def command(self, upstream: str, port: int, folder: Path) -> Command:
        return Command(
            (
                *(str(self.python), "-m", self.module),
                *("--worker-urls", upstream),
                *("--policy", "round_robin"),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
                *("--log-level", "error"),
            )
        )


class LiteLLM(FromIndex, Peer):
    def command(self, upstream: str, port: int, folder: Path) -> Command:
        config = folder / "config.yaml"
        engine = {"model": f"openai/{MODEL}", "api_base": f"{upstream}/v1", "api_key": "none"}
        config.write_text(  # JSON is YAML
            json.dumps({"model_list": [{"model_name": MODEL, "litellm_params": engine}]})
        )
        argv = (
            str(self.home / "bin" / "litellm"),
            *("--config", str(config)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--num_workers", "1", "--telemetry", "False"),
        )
        key = f"sk-{secrets.token_hex(32)}"  # it does not start without one
        env = {
            "LITELLM_MASTER_KEY": key,
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }
        return Command(argv, env, key)


SGLANG_ROUTER = RustRouter(
    "sglang-router", "sglang-router", "sglang-router==0.3.2", "sglang_router.launch_router"
)
VLLM_ROUTER = RustRouter(
    "vllm-router", "vllm-router", "vllm-router==0.1.17", "vllm_router.launch_router"
)
LITELLM = LiteLLM("litellm", "litellm", "litellm[proxy]==1.106.2")
