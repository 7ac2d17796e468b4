"""``python -m bench.peers``: install them all; say which there are, and why the others are not."""

from __future__ import annotations

from bench.peers import PEERS
from bench.peers.base import install_all

if __name__ == "__main__":
    install_all(PEERS)
