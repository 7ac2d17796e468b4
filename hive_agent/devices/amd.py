"""AMD GPUs, from sysfs (Linux, ``gpu/amdgpu/driver-misc.rst``).

They are listed, and no worker runs there: they are told as unhealthy, with that as the reason, so
that whoever places work passes them by.
"""

from __future__ import annotations

import re
from pathlib import Path

from hive_agent.devices.text import readable
from operations.hosts import Device

SYSFS = Path("/sys")
VENDOR = "0x1002"
LISTED_ONLY = "AMD GPUs are listed only, workers on them are not built yet; use the CPU"
MIB = 2**20

_CARD = re.compile(r"card(\d+)")  # not card0-DP-1, which is a connector


class Amd:
    """Samples the AMD GPUs that the kernel lists under ``sysfs``."""

    def __init__(self, sysfs: Path = SYSFS) -> None:
        self._folder = sysfs / "class" / "drm"

    def sample(self) -> list[Device]:
        """In the order of the kernel's cards, as ``rocm:0`` and on."""
        return [_device(number, card) for number, card in enumerate(self._cards())]

    def _cards(self) -> list[Path]:
        try:
            found = [(int(m[1]), path) for path in self._folder.iterdir() if (m := _card(path))]
        except OSError:
            return []
        devices = [path / "device" for _, path in sorted(found)]
        return [device for device in devices if _read(device / "vendor") == VENDOR]


def _device(number: int, card: Path) -> Device:
    total = _mib(card / "mem_info_vram_total") or 0
    used = _mib(card / "mem_info_vram_used")
    busy = _number(card / "gpu_busy_percent")
    model = (_read(card / "device") or "").removeprefix("0x")
    return Device(
        id=f"rocm:{number}",
        name=readable(_read(card / "product_name"), f"AMD GPU 1002:{model}"),
        device_type="gpu",
        vram_total_mb=total,
        vram_free_mb=max(0, total - used) if used is not None else 0,
        vram_used_mb=used,
        utilization_percent=busy if busy is not None and busy <= 100 else None,
        pci_address=card.resolve().name,
        healthy=False,
        problem=LISTED_ONLY,
    )


def _card(path: Path) -> re.Match[str] | None:
    return _CARD.fullmatch(path.name)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:  # an older driver has fewer files, and a GPU asleep refuses some
        return None


def _number(path: Path) -> int | None:
    text = _read(path) or ""
    return int(text) if text.isascii() and text.isdigit() else None


def _mib(path: Path) -> int | None:
    count = _number(path)
    return None if count is None else count // MIB
