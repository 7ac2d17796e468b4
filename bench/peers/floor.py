"""No relay, but what the cheapest one on uvloop costs: :mod:`bench.splice`."""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench.peers.base import Command, Peer


@dataclass(frozen=True)
class Splice(Peer):
    name: str

    def install(self) -> None:
        """It comes with Hive."""

    def version(self) -> str:
        return importlib.metadata.version("uvloop")

    def command(self, upstream: str, port: int, folder: Path) -> Command:
        script = Path(__file__).parent.parent / "splice.py"
        upstream_at = urlsplit(upstream).netloc
        # Without its folder on the path, where a queue.py stands beside it.
        return Command((sys.executable, "-P", str(script), upstream_at, str(port)))


SPLICE = Splice("uvloop splice")
