"""The flags that every engine process takes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path


def parser(description: str) -> argparse.ArgumentParser:
    """Flags common to all engines; an engine adds its own."""
    flags = argparse.ArgumentParser(description=description, allow_abbrev=False)
    flags.add_argument("--socket", required=True, type=Path, help="unix socket to listen on")
    flags.add_argument("--served-name", required=True, help="the model's name in answers")
    flags.add_argument("--context", type=int, required=True, help="tokens of context a slot")
    flags.add_argument("--slots", type=int, required=True, help="requests served at once")
    flags.add_argument("--device", required=True, help="cpu, cuda:0, …")
    return flags


def parse(flags: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags and make way for the socket: engines fail if its path exists."""
    arguments = flags.parse_args(argv)
    os.umask(0o077)
    arguments.socket.unlink(missing_ok=True)
    return arguments
