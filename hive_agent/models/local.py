"""Models as they lie on disk, before anybody has summed them up: which files, and what the files
say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hive_agent.models import cache
from hive_agent.models.cache import Part
from hive_agent.models.gguf import GGUFHeader, read_header, unreadable
from hive_agent.models.safetensors import read_config
from hive_agent.models.variants import expected_shards, variants
from operations.errors import InvalidRequest
from operations.hosts import Pooling


@dataclass(frozen=True)
class Facts:
    """What the header of a GGUF or the ``config.json`` says."""

    architecture: str | None
    context_length: int | None
    quantization: str | None
    embedding: bool = False
    pooling: Pooling | None = None


@dataclass(frozen=True)
class LocalModel:
    """A model whose files are there.

    :param path: what an engine opens: a GGUF file, or a folder
    :param parts: all files, those of a split GGUF in their order
    :param identity: the files that the digest covers, in an order that all machines agree on
    :param cached: where it lies in the cache, if it does
    :param projector: what lets it see or hear, published beside it
    """

    id: str
    source: Literal["shipped", "hub", "file"]
    format: Literal["gguf", "safetensors"]
    path: Path
    parts: tuple[Part, ...]
    identity: tuple[Part, ...]
    cached: cache.Cached | None = None
    projector: Part | None = None

    @property
    def projector_path(self) -> Path | None:
        """Where an engine finds the projector."""
        if self.cached is None or self.projector is None:
            return None
        return self.cached.snapshot / self.projector.name

    def aliases(self) -> set[str]:
        """Names beside the id under which it may be asked for, lower case."""
        if self.cached is None:
            return set()
        variant = self.cached.variant
        selectors = {*variant.files, *(name.rsplit("/", 1)[-1] for name in variant.files)}
        if variant.label:
            selectors.add(variant.label)
        return {f"{self.cached.repo}:{selector}".lower() for selector in selectors}


def from_cache(cached: cache.Cached) -> LocalModel:
    """A model in the Hugging Face cache."""
    variant = cached.variant
    parts = {part.name: part for part in cached.parts}
    safetensors = variant.format == "safetensors"
    return LocalModel(
        id=cached.id,
        source="hub",
        format=variant.format,
        path=cached.snapshot if safetensors else cached.snapshot / variant.files[0],
        parts=cached.parts,
        identity=tuple(parts[name] for name in variant.identity),
        cached=cached,
        projector=cached.projector,
    )


def at_path(
    path: Path, model_id: str | None = None, source: Literal["shipped", "file"] = "file"
) -> LocalModel:
    """The model in a GGUF file, all of its parts, or in a folder of safetensors.

    :raises InvalidRequest: there is none, or a part is missing
    """
    try:
        if path.is_dir():
            return _in_folder(path)
        names = expected_shards(path.name)
        path = path.with_name(names[0])
        parts = tuple(cache.part(path.parent, name) for name in names)
    except (OSError, ValueError) as error:
        part = getattr(error, "filename", None)  # of a split file, the one that is missing
        raise unreadable(Path(part) if part else path, error) from None
    return LocalModel(
        id=model_id or f"file:{path}",
        source=source,
        format="gguf",
        path=path,
        parts=parts,
        identity=parts,
    )


def _in_folder(path: Path) -> LocalModel:
    found = variants(cache.files_below(path))
    variant = next((v for v in found if v.format == "safetensors"), None)
    if variant is None:
        raise InvalidRequest(
            f"{path} is a folder without a config.json and all of its safetensors; give a .gguf "
            "file, or a folder that has both.",
            code="not_a_model",
            param="model",
        )
    parts = {name: cache.part(path, name) for name in variant.files}
    return LocalModel(
        id=f"file:{path}",
        source="file",
        format="safetensors",
        path=path,
        parts=tuple(parts.values()),
        identity=tuple(parts[name] for name in variant.identity),
    )


def read_headers(model: LocalModel) -> list[GGUFHeader]:
    """The headers of all parts of a GGUF, in their order.

    :raises InvalidRequest: one is missing or no GGUF
    """
    return [read_header(model.path.with_name(Path(part.name).name)) for part in model.parts]


def _check_parts(model: LocalModel, headers: Sequence[GGUFHeader]) -> None:
    """:raises InvalidRequest: a part belongs to another model, or stands in another one's place"""
    wrong = next(
        (
            place
            for place, header in enumerate(headers)
            if (header.split_index, header.split_count, header.split_tensors)
            != (place, len(headers), headers[0].split_tensors)
        ),
        None,
    )
    if wrong is not None:
        found = headers[wrong]
        raise _foreign(
            f"{model.parts[wrong].name} says that it is part {found.split_index + 1} of "
            f"{found.split_count}, of a model with {found.split_tensors} tensors"
        )
    there, expected = sum(header.tensor_count for header in headers), headers[0].split_tensors
    if expected is not None and there != expected:
        raise _foreign(f"the parts of {model.path} hold {there} tensors instead of {expected}")


def _foreign(what: str) -> InvalidRequest:
    return InvalidRequest(
        f"The parts of a split model do not belong together: {what}. Fetch all parts again.",
        code="foreign_part",
        param="model",
    )


def read_facts(model: LocalModel) -> Facts:
    """:raises InvalidRequest: the files are no model that an engine could load"""
    if model.format == "safetensors":
        config = read_config(model.path / "config.json")
        return Facts(config.architecture, config.context_length, config.quantization)
    headers = read_headers(model)
    header = headers[0]
    if header.kind != "model" or header.architecture == "clip":
        raise InvalidRequest(
            f"{model.path} is no model by itself: it says that it is of the type "
            f"'{header.kind[:32]}' ({header.architecture}). Give the model that it belongs to.",
            code="not_a_model",
            param="model",
        )
    if header.split_count != len(model.parts):
        raise InvalidRequest(
            f"{model.path} is one of {header.split_count} parts, and its name does not say which. "
            "Give the parts the names that they were published under.",
            code="not_a_model",
            param="model",
        )
    _check_parts(model, headers)
    return Facts(
        header.architecture,
        header.context_length,
        header.quantization,
        header.is_embedding,
        header.pooling,
    )
