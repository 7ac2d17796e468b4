"""What the installed build of llama.cpp can do, and whether that is enough for a worker."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hive_agent.asked import Asked
from hive_agent.processes import without_secrets
from hive_agent.workers.flags import PARAM, Flag
from hive_agent.workers.llamacpp import RULES, field
from operations.errors import InvalidRequest, Unavailable
from operations.hosts import Device
from operations.operations import FlagValue, WorkerOptions, WorkerSpawn

PROBE: Final = "worker.engines.llamacpp_build"
PROBE_S: Final = 60.0
TEXTS: Final = frozenset({"cls_sep", "embd_sep"})
"""The settings of text that may be passed on: the others name files, addresses and prompts."""

_INT: Final = range(-(2**31), 2**31)


class Setting(BaseModel):
    """One setting of llama.cpp."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: Literal["bool", "int", "float", "text", "choice"]
    choices: tuple[str, ...] = ()


class Build(BaseModel):
    """What a build of llama.cpp told of itself.

    :param version: of ``xllamacpp``
    :param backends: the kinds of devices that it computes on here: ``cpu``, ``cuda``
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: str
    backends: frozenset[str]
    settings: Mapping[str, Setting]

    def cpu_only(self, request: WorkerSpawn, devices: Sequence[Device]) -> str | None:
        """Why a request that leaves the device to the hive gets the CPU in spite of GPUs."""
        left_open = request.worker is None and request.gpus is None
        if not left_open or self.backends != {"cpu"} or all(d.id == "cpu" for d in devices):
            return None
        return (
            f"The installed build of llama.cpp (xllamacpp {self.version}) computes on the CPU "
            "only, so this worker runs there."
        )

    def check_device(self, device: str) -> None:
        """Whether it can compute on a device.

        :raises Unavailable: it cannot, and how to get a build that does
        """
        kind = device.partition(":")[0]
        if kind in self.backends:
            return
        raise Unavailable(
            f"The installed build of llama.cpp (xllamacpp {self.version}) does not compute on "
            f"{kind}: it sees {', '.join(sorted(self.backends))}. Install a build of xllamacpp for "
            f"{kind}, whose version fits the driver, into the environment of the hive agent, or "
            "load the model on the CPU ('--device cpu').",
            code="engine_without_device",
            param="worker",
            retryable=False,
        )

    def check_options(self, options: WorkerOptions) -> None:
        """Whether it is the version that is asked for, and has the flags.

        :raises InvalidRequest: it is not, or has not
        """
        wanted = options.engine_version
        if wanted is not None and wanted != self.version:
            raise InvalidRequest(
                f"llama.cpp is installed here as xllamacpp {self.version}, not {wanted}. Leave "
                "'engine_version' out.",
                param="options.engine_version",
            )
        flags = options.flags or {}
        RULES.check(flags, {name.replace("_", "-"): _flag(s) for name, s in self._open().items()})
        for name, value in flags.items():
            _check_number(name, value, self.settings[field(name)])

    def _open(self) -> Mapping[str, Setting]:
        """The settings that a request may name."""
        return {
            name: setting
            for name, setting in self.settings.items()
            if setting.kind != "text" or name in TEXTS
        }


class Builds:
    """Asks the installed build once, and again when it was replaced or the driver or the GPUs are
    others: the same build computes on GPUs with one driver, and on the CPU alone with another.

    :param sample: the devices as they are now; may block
    """

    def __init__(self, sample: Callable[[], Iterable[Device]]) -> None:
        self._sample = sample
        self._asked: Asked[Hashable, Build] = Asked()

    async def problems(self, kinds: Iterable[str]) -> dict[str, str]:
        """By kind of device, why the build does not compute there, and what to do."""
        found: dict[str, str] = {}
        for kind in kinds:
            try:
                (await self.installed()).check_device(kind)
            except Unavailable as error:
                found[kind] = error.message
        return found

    async def installed(self) -> Build:
        """What the build that workers would use can do.

        :raises Unavailable: none is installed, or it cannot be loaded on this machine
        """
        return await self._asked.get(await asyncio.to_thread(self._key), _ask)

    def _key(self) -> Hashable:
        gpus = (device for device in self._sample() if device.id.startswith("cuda:"))
        return _files(), frozenset((gpu.uuid, gpu.driver_version, gpu.healthy) for gpu in gpus)


def _files() -> Hashable:
    """Changes when another ``xllamacpp`` is installed. Does not load it.

    :raises Unavailable: there is none
    """
    importlib.invalidate_caches()
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise _broken("it is not installed")
    folder = Path(found.origin).parent
    return tuple(sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(folder)))


async def _ask() -> Build:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        PROBE,
        env={**without_secrets(os.environ), "PYTHONSAFEPATH": "1"},
        cwd=os.sep,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PROBE_S):
            said, complained = await process.communicate()
    except TimeoutError:
        raise _broken(f"it did not answer within {PROBE_S:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        return Build.model_validate_json(said)
    except ValidationError:
        words = complained.decode("utf-8", "replace").strip().splitlines()
        why = words[-1][:300] if words else f"it ended with status {process.returncode}"
        raise _broken(why) from None


def _broken(why: str) -> Unavailable:
    return Unavailable(
        f"llama.cpp cannot be used here: {why}. Install xllamacpp into the environment of the hive "
        "agent again; 'hive engines ls' shows what there is.",
        code="engine_broken",
        retryable=False,
    )


def _flag(setting: Setting) -> Flag:
    switch = setting.kind == "bool"
    return Flag(switch=switch, off=switch, choices=setting.choices)


def _check_number(name: str, value: FlagValue, setting: Setting) -> None:
    """:raises InvalidRequest: it is no number where one is wanted, or one that does not fit"""
    match setting.kind:
        case "int" if not isinstance(value, int) or value not in _INT:
            wanted = "a whole number of 32 bits"
        case "float" if not isinstance(value, int | float):
            wanted = "a number"
        case "text" if not isinstance(value, str):
            wanted = "text"
        case _:
            return
    raise InvalidRequest(f"--{name} of llama.cpp takes {wanted}. Correct it.", param=PARAM)
