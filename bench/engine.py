"""The scripted engine on a TCP port, where others can ask it without Hive.

``python -m bench.engine --rate 40`` prints its URL and serves until its standard input closes.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys

import uvicorn

from worker.engines.scripted import Engine, Script

MODEL = "scripted"
BACKLOG = 1024


async def serve(rate: float, slots: int) -> None:
    """:param rate: tokens a second of each answer
    :param slots: answers at once
    """
    engine = Engine(Script(tokens_per_second=rate), MODEL, slots)
    config = uvicorn.Config(
        engine.app(), log_level="warning", access_log=False, ws="none", lifespan="off"
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listening:
        host, port = listening.getsockname()
        print(f"http://{host}:{port}", flush=True)
        serving = asyncio.create_task(server.serve([listening]))
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        server.should_exit = True
        await serving


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--rate", type=float, default=40.0)
    flags.add_argument("--slots", type=int, default=256)
    given = flags.parse_args()
    asyncio.run(serve(given.rate, given.slots))
