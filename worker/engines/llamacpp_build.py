"""What the installed build of llama.cpp can do, told as JSON to whoever starts this module.

Run by the agent in a process of its own: the agent itself never loads an engine.
"""

from __future__ import annotations

import json
from enum import IntEnum
from typing import Any

_OTHER_NAMES = {"mtl": "metal"}


def describe(xlc: Any) -> dict[str, Any]:
    """Version, the kinds of devices that it computes on, and the settings that it takes.

    A setting has a ``kind`` (``bool``, ``int``, ``float``, ``text``, ``choice``), and a choice its
    ``choices``. Those that are lists or groups of others are left out.
    """
    params = xlc.CommonParams()
    settings = {}
    for name in dir(params):
        if not name.startswith("_") and (told := _setting(getattr(params, name))):
            settings[name] = told
    return {
        "version": xlc.__version__,
        "backends": sorted({backend(str(one["name"])) for one in xlc.get_device_info()}),
        "settings": settings,
    }


def backend(device: str) -> str:
    """The kind of a device of llama.cpp: ``CUDA0`` is ``cuda``."""
    kind = device.rstrip("0123456789").lower()
    return _OTHER_NAMES.get(kind, kind)


def choices(kind: type[IntEnum]) -> dict[str, IntEnum]:
    """The members of an enumeration without what all names begin with, in lower case."""
    words = {name: name.split("_") for name in kind.__members__}
    shared = 0
    while len({tuple(split[: shared + 1]) for split in words.values()}) == 1 < len(words):
        shared += 1
    return {"_".join(words[name][shared:]).lower(): kind[name] for name in words}


def _setting(value: object) -> dict[str, Any] | None:
    match value:
        case bool():
            return {"kind": "bool"}
        case IntEnum():
            return {"kind": "choice", "choices": list(choices(type(value)))}
        case int():
            return {"kind": "int"}
        case float():
            return {"kind": "float"}
        case str():
            return {"kind": "text"}
        case _:
            return None


def main() -> None:
    """Print the description of the ``xllamacpp`` that this interpreter imports."""
    import xllamacpp

    print(json.dumps(describe(xllamacpp)))


if __name__ == "__main__":
    main()
