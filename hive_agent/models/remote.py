"""What a model at a hub says of itself, without fetching it: the header of a GGUF, or the
``config.json`` beside safetensors."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any, Final

from pydantic_core import from_json

from hive_agent.models.gguf import GGUFHeader, TensorBytes, read_beginning
from hive_agent.models.hub import DownloadPlan, Hub
from hive_agent.models.safetensors import MAX_CONFIG_BYTES, Config, told
from hive_agent.models.variants import ids, variants
from operations.errors import InvalidRequest
from operations.hosts import ModelInfo

MOST_HEADER_BYTES: Final = 32 * 2**20
"""Of a GGUF: the largest vocabularies take about 12 MB."""


@dataclass(frozen=True)
class AtHub:
    """A model that is not on this disk.

    :param info: as the catalog would tell of it; its digest and its path are empty
    :param headers: of all parts of a GGUF; of those after the one with the table of embeddings
        only the size is known
    :param config: of safetensors
    :param weight_bytes: of its weights' files together
    :param projector_bytes: of the file that lets a GGUF see or hear; 0 where there is none
    :param others: the same model in other files: quantization and bytes
    """

    info: ModelInfo
    headers: tuple[GGUFHeader, ...]
    config: dict[str, Any]
    weight_bytes: int
    others: tuple[tuple[str, int], ...]
    projector_bytes: int = 0


async def look(hub: Hub, plan: DownloadPlan) -> AtHub:
    """Read what a plan's files say of their model.

    :raises InvalidRequest: they are damaged, or no model
    :raises HiveError: the hub cannot be reached, or does not give them to us
    """
    if plan.variant.format == "gguf":
        headers = await _headers(hub, plan)
        first = headers[0]
        info = _info(plan, Config(first.architecture, first.context_length, first.quantization))
        info = info.model_copy(update={"embedding": first.is_embedding, "pooling": first.pooling})
        seeing = plan.variant.projector
        return AtHub(
            info,
            headers,
            {},
            _weight_bytes(plan),
            _others(plan),
            projector_bytes=plan.listing.files[seeing].size if seeing else 0,
        )
    config, known = await _config(hub, plan)
    return AtHub(_info(plan, known), (), config, _weight_bytes(plan), ())


async def _headers(hub: Hub, plan: DownloadPlan) -> tuple[GGUFHeader, ...]:
    headers: list[GGUFHeader] = []
    for path in plan.variant.files:
        size = plan.listing.files[path].size
        if any(header.tensors.vocabulary for header in headers):
            headers.append(replace(headers[0], tensors=TensorBytes(data=size)))
        else:
            headers.append(await _header(hub, plan, path, size))
    return tuple(headers)


async def _header(hub: Hub, plan: DownloadPlan, path: str, size: int) -> GGUFHeader:
    async def read(data: bytes) -> GGUFHeader | None:
        return await asyncio.to_thread(read_beginning, data, size, path)

    header = await hub.beginning(plan, path, MOST_HEADER_BYTES, read)
    if header is None:
        raise InvalidRequest(
            f"{path} of {plan.listing.repo} has a header of more than "
            f"{MOST_HEADER_BYTES // 2**20} MiB. Fetch it with 'hive models pull', then ask again.",
            code="fit_unknown",
            param="model",
        )
    return header


async def _config(hub: Hub, plan: DownloadPlan) -> tuple[dict[str, Any], Config]:
    size = plan.listing.files["config.json"].size

    async def read(data: bytes) -> dict[str, Any] | None:
        if len(data) < min(size, MAX_CONFIG_BYTES):
            return None
        try:
            found = from_json(data)
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {}

    where = f"config.json of {plan.listing.repo}"
    config = await hub.beginning(plan, "config.json", MAX_CONFIG_BYTES, read) or {}
    return config, told(config, where)


def _info(plan: DownloadPlan, known: Config) -> ModelInfo:
    return ModelInfo(
        id=plan.model_id,
        digest="",
        format=plan.variant.format,
        size_bytes=plan.total_bytes,
        source="hub",
        path="",
        architecture=known.architecture,
        quantization=known.quantization,
        context_length=known.context_length,
    )


def _weight_bytes(plan: DownloadPlan) -> int:
    weights = (".safetensors", ".gguf")
    files = plan.listing.files
    return sum(files[p].size for p in plan.variant.files if p.lower().endswith(weights))


def _others(plan: DownloadPlan) -> tuple[tuple[str, int], ...]:
    found = [one for one in variants(plan.listing.files) if one.format == "gguf"]
    names = zip(ids(plan.listing.repo, found), found, strict=True)
    return tuple(
        (name.partition(":")[2], sum(plan.listing.files[path].size for path in one.files))
        for name, one in names
        if one != plan.variant
    )
