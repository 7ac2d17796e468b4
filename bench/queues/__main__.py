"""``python -m bench.queues``: install the other queues, and say which there are."""

from __future__ import annotations

from bench.peers.base import install_all
from bench.queues.programs import PROGRAMS

if __name__ == "__main__":
    install_all(PROGRAMS)
