"""Models made of others: with adapters, another chat template, or another projector.

Each answers differently from its base, so each is a model of its own: with an identity and an id
that tell what was added, beside which the base can be loaded and asked for.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from hive_agent.models import digests
from hive_agent.models.catalog import Catalog
from hive_agent.models.gguf import GGUFHeader, read_header
from operations.errors import InvalidRequest
from operations.hosts import ModelInfo
from operations.names import short_forms
from operations.operations import Lora, WorkerOptions

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
SHOWN = 6  # digits of a sum in an id
_PREFIX = "sha256:"


async def derived(catalog: Catalog, model: ModelInfo, options: WorkerOptions) -> ModelInfo:
    """The model that a worker with these options runs.

    Adapters count for a GGUF only, into which llama.cpp adds them: vLLM keeps them beside the base,
    under names of their own.

    :raises InvalidRequest: a file is missing, no GGUF, or of another kind or architecture
    :raises Conflict: a file is being written
    """
    if model.format == "gguf":
        model = await _with_projector(catalog, model, options.projector)
        model = await _with_adapters(catalog, model, options.lora or [])
    return _with_template(model, options.chat_template)


async def adapters(catalog: Catalog, model: ModelInfo, wanted: Sequence[Lora]) -> dict[str, str]:
    """Name → digest of LoRA modules that vLLM keeps beside their base, each a model of its own.

    :raises InvalidRequest: a folder has no adapter in the format of PEFT
    :raises Conflict: a file is being written
    """
    given = {adapter.name.lower() for adapter in wanted}
    if len(given) < len(wanted) or given & short_forms(model.id):
        raise InvalidRequest(
            "Two adapters have one name, or one has the model's. Give each its own.",
            param="options.lora",
        )
    found = {}
    for adapter in wanted:
        parts = [("model", _hex(model))]
        for name in PEFT_FILES:
            path = Path(adapter.path) / name
            if not await asyncio.to_thread(path.is_file):
                raise InvalidRequest(
                    f"{adapter.path} is no adapter that vLLM can load: it has no {name}. Give the "
                    "folder that PEFT wrote.",
                    code="not_an_adapter",
                    param="options.lora",
                )
            parts.append((name, await catalog.sum(path)))
        found[adapter.name] = _PREFIX + digests.combine("peft adapter", parts)
    return found


async def _with_projector(catalog: Catalog, model: ModelInfo, wanted: str | None) -> ModelInfo:
    path = wanted or model.projector
    if path is None:
        return model
    header = await _header(Path(path), "projector")
    if header.kind not in ("mmproj", "model") or header.architecture != "clip":
        raise InvalidRequest(
            f"{path} is no projector: it says that it is of the type '{header.kind[:32]}' "
            f"({header.architecture}). Give the mmproj file that was published with {model.id}.",
            code="not_a_projector",
            param="options.projector",
        )
    if wanted is None or wanted == model.projector:
        return model
    if model.projector is not None:
        raise InvalidRequest(
            f"{model.id} has a projector: {model.projector}. Leave 'projector' out, or name the "
            "model's file by its path (file:/…) to give it another.",
            param="options.projector",
        )
    found = await catalog.sum(Path(path))
    size = await asyncio.to_thread(os.path.getsize, path)
    return model.model_copy(
        update={
            "id": f"{model.id}+projector-{found[:SHOWN]}",
            "digest": _PREFIX + digests.with_projector(_hex(model), found),
            "size_bytes": model.size_bytes + size,
            "projector": path,
        }
    )


async def _with_adapters(catalog: Catalog, model: ModelInfo, wanted: Sequence[Lora]) -> ModelInfo:
    if not wanted:
        return model
    if len({adapter.name for adapter in wanted}) < len(wanted):
        raise InvalidRequest("Two adapters have one name. Give each its own.", param="options.lora")
    sums = []
    for adapter in wanted:
        _check_adapter(adapter, await _header(Path(adapter.path), "lora"), model)
        sums.append((f"adapter x {adapter.scale!r}", await catalog.sum(Path(adapter.path))))
    parts = [("model", _hex(model)), *sorted(sums)]
    return model.model_copy(
        update={
            "id": "+".join([model.id, *(_name(adapter) for adapter in wanted)]),
            "digest": _PREFIX + digests.combine("gguf with adapters", parts),
        }
    )


def _with_template(model: ModelInfo, text: str | None) -> ModelInfo:
    if text is None:
        return model
    found = hashlib.sha256(text.encode()).hexdigest()
    parts = [("model", _hex(model)), ("chat template", found)]
    return model.model_copy(
        update={
            "id": f"{model.id}+template-{found[:SHOWN]}",
            "digest": _PREFIX + digests.combine("with chat template", parts),
        }
    )


def _check_adapter(adapter: Lora, header: GGUFHeader, model: ModelInfo) -> None:
    """:raises InvalidRequest: it is no LoRA adapter, or one for another kind of model"""
    if header.kind != "adapter" or header.adapter != "lora":
        raise InvalidRequest(
            f"{adapter.path} is no LoRA adapter: it says that it is of the type "
            f"'{(header.adapter or header.kind)[:32]}'. Convert the adapter with llama.cpp's "
            "convert_lora_to_gguf.py.",
            code="not_an_adapter",
            param="options.lora",
        )
    if header.architecture != model.architecture:
        raise InvalidRequest(
            f"{adapter.path} is an adapter for the architecture {header.architecture}; {model.id} "
            f"is of {model.architecture}. Give the adapters that were trained on this model.",
            code="wrong_architecture",
            param="options.lora",
        )


async def _header(path: Path, option: str) -> GGUFHeader:
    try:
        return await asyncio.to_thread(read_header, path)
    except InvalidRequest as error:
        error.param = f"options.{option}"
        raise


def _name(adapter: Lora) -> str:
    return adapter.name if adapter.scale == 1 else f"{adapter.name}@{adapter.scale:g}"


def _hex(model: ModelInfo) -> str:
    return model.digest.removeprefix(_PREFIX)
