"""The relays that Hive is measured against, each in a folder of its own under ``.bench``."""

from bench.peers.base import Absent, Peer
from bench.peers.floor import SPLICE
from bench.peers.proxies import HAPROXY, NGINX
from bench.peers.routers import LITELLM, SGLANG_ROUTER, VLLM_ROUTER

PEERS: tuple[Peer, ...] = (NGINX, HAPROXY, SGLANG_ROUTER, VLLM_ROUTER, LITELLM, SPLICE)

__all__ = ["NGINX", "PEERS", "Absent", "Peer"]
