"""Load a GGUF as the worker does, but with llama.cpp's log, and end once it is ready.

python -m tests.fit_models.load MODEL SOCKET CONTEXT SLOTS KV_TYPE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import xllamacpp

from worker.engines.llamacpp import Wanted, parameters

LOG_ALL = 4


def main(model: str, socket: str, context: str, slots: str, kv_type: str) -> None:
    wanted = Wanted(
        model=Path(model),
        socket=Path(socket),
        served_name="m",
        context=int(context),
        slots=int(slots),
        threads=1,
        kv_type=kv_type,
    )
    params = parameters(xllamacpp, wanted)
    params.verbosity = LOG_ALL
    server = xllamacpp.Server(params)
    print(f"ready on {server.listening_address}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
