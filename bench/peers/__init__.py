"""The relays that Hive is measured against, each in a folder of its own under ``.bench``."""

from bench.peers.base import Absent, Peer
from bench.peers.proxies import HAPROXY, NGINX
from bench.peers.routers import LITELLM, SGLANG_ROUTER, VLLM_ROUTER

PEERS: tuple[Peer, ...] = (NGINX, HAPROXY, SGLANG_ROUTER, VLLM_ROUTER, LITELLM)

__all__ = ["PEERS", "Absent", "Peer"]
