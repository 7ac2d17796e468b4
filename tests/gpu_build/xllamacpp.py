"""The installed ``xllamacpp`` as a build for eight NVIDIA GPUs would show itself.

It takes the same settings; what it cannot do is load a model on a GPU: its server loads for ever.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent


def _installed() -> Any:
    """The real one, under its own name from now on."""
    elsewhere = [path for path in sys.path if Path(path).resolve() != HERE]
    found = PathFinder.find_spec("xllamacpp", elsewhere)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["xllamacpp"] = module
    found.loader.exec_module(module)
    return module


def _devices() -> list[dict[str, object]]:
    return [{"name": "CPU"}, *({"name": f"CUDA{number}"} for number in range(8))]


class LoadsForEver:
    def __init__(self, params: object) -> NoReturn:
        signal.sigwait({signal.SIGTERM})  # the worker blocks it
        os._exit(0)


if __name__ == "xllamacpp":
    installed = _installed()
    installed.get_device_info = _devices
    installed.Server = LoadsForEver
