"""The devices of this machine: NVIDIA GPUs through NVML, AMD GPUs from sysfs, and the CPU."""

from hive_agent.devices.cpu import cores
from hive_agent.devices.machine import Devices

__all__ = ["Devices", "cores"]
