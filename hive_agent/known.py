"""What is known of a model before it is loaded: from its files on this disk, or from the hub."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from hive_agent.fit.advise import Offer
from hive_agent.fit.facts import ModelFacts, from_config, from_gguf
from hive_agent.models.hub import Hub
from hive_agent.models.local import LocalModel, at_path, read_headers
from hive_agent.models.references import Reference
from hive_agent.models.remote import look
from hive_agent.models.safetensors import read_raw
from operations.errors import HiveError
from operations.hosts import ModelInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """A model, and what a prediction needs to know of it.

    :param facts: None where its files do not say enough
    :param offers: the same model in other files that could be had here
    """

    model: ModelInfo
    facts: ModelFacts | None
    offers: tuple[Offer, ...] = ()


async def facts_of(model: ModelInfo) -> ModelFacts | None:
    """What a prediction needs to know of a model on this disk; None where its files do not say
    it."""
    if model.format not in ("gguf", "safetensors"):
        return None
    try:
        return await asyncio.to_thread(_read, model)
    except HiveError as error:
        log.info("what %s needs cannot be predicted: %s", model.id, error.message)
    except Exception:  # it is loaded unasked: the engine says what is wrong with it
        log.exception("what %s needs cannot be predicted", model.id)
    return None


async def at_hub(hub: Hub, reference: Reference) -> Known:
    """What the hub tells of a model that is not here, its files unfetched.

    :raises NotFound: the hub has no such model
    :raises Conflict: several fit the reference; the message lists them
    :raises InvalidRequest: its files say too little, or nonsense
    :raises HiveError: the hub cannot be reached, or does not give the files to us
    """
    found = await look(hub, await hub.look(reference))
    if found.headers:
        facts = _seeing(from_gguf(found.headers), found.projector_bytes)
    else:
        facts = from_config(found.config, found.weight_bytes)
    return Known(found.info, facts, tuple(Offer(*other) for other in found.others))


def offers(model: ModelInfo, others: Iterable[ModelInfo]) -> tuple[Offer, ...]:
    """The files of the same repository among others on this disk."""
    repo = model.id.partition(":")[0]
    return tuple(
        Offer(other.quantization, other.size_bytes)
        for other in others
        if model.source == other.source == "hub"
        and other.id.partition(":")[0] == repo
        and other.format == model.format
        and other.quantization is not None
        and other.digest != model.digest
    )


def _read(model: ModelInfo) -> ModelFacts:
    """:raises HiveError: the files say too little, or are no longer there"""
    local = at_path(Path(model.path))
    if local.format == "gguf":
        facts = from_gguf(read_headers(local), model.digest)
        return _seeing(facts, os.path.getsize(model.projector) if model.projector else 0)
    config = read_raw(local.path / "config.json")
    return from_config(config, _weight_bytes(local), model.digest)


def _seeing(facts: ModelFacts, projector: int) -> ModelFacts:
    """With the weights of a projector, in bytes, which lie beside the model's own."""
    return replace(facts, other=facts.other + projector)


def _weight_bytes(model: LocalModel) -> int:
    return sum(part.key.size for part in model.parts if part.name.endswith(".safetensors"))
