"""The models that this machine has: the shipped one, those in the Hugging Face cache, and files
that somebody registered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from weakref import WeakValueDictionary

from hive_agent.models import cache, digests
from hive_agent.models.cache import Part
from hive_agent.models.digests import Digests, FileKey
from hive_agent.models.gguf import unreadable
from hive_agent.models.local import Facts, LocalModel, at_path, from_cache, read_facts
from hive_agent.models.references import Reference, parse_reference
from hive_agent.models.storage import read_json, write_json
from operations.errors import Conflict, Forbidden, HiveError, InvalidRequest, NotFound
from operations.hosts import ModelInfo
from operations.names import resolve, short_forms

SHIPPED_ID = "hive-tiny"
SHIPPED = Path(__file__).parent.parent / "shipped" / "hive-tiny.Q8_0.gguf"
AT_ONCE_BYTES = 32 * 2**20
"""Models with at most this much to hash are hashed while the list is made, in its thread; larger
ones in the background."""


class Catalog:
    """What is on this machine's disk. Nothing is downloaded here; see :mod:`hive_agent.models.hub`.

    :param cache_dir: the Hugging Face cache, ``…/huggingface/hub``; need not exist
    :param state_dir: the agent's own folder: digests and registered files are remembered there
    """

    def __init__(self, *, cache_dir: Path, state_dir: Path, shipped: Path = SHIPPED) -> None:
        self._cache_dir = cache_dir
        self._shipped = shipped
        self._digests = Digests(state_dir / "digests.json")
        self._registry = state_dir / "model-files.json"
        self._registered = _load_registry(self._registry)
        self._facts: dict[tuple[Part, ...], Facts | None] = {}
        self._lock = asyncio.Lock()
        self._summing: WeakValueDictionary[FileKey, asyncio.Lock] = WeakValueDictionary()
        self._hashing: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Stop hashing in the background. Closing twice, or an unused catalog, is fine."""
        if self._hashing is not None:
            self._hashing.cancel()
            await asyncio.wait([self._hashing])

    async def list(self) -> list[ModelInfo]:
        """The complete models; cheap enough to call every second.

        A large file that was never hashed joins the list when its digest is known.
        """
        models = await self._models()
        unknown = [model for model in models if self._digest(model) is None]
        if unknown and (self._hashing is None or self._hashing.done()):
            self._hashing = asyncio.create_task(self._hash_all(unknown))
        return [info for model in models if (info := self._info(model))]

    async def find(self, name: str) -> ModelInfo:
        """The model that a caller means, by id, reference, last part or digest.

        Waits until a large file is hashed. ``file:/path`` need not be registered.

        :raises InvalidRequest: ``file:`` names something that is no whole model
        :raises NotFound: nothing matches; the message lists what there is
        :raises Conflict: several models match; the message lists them
        """
        if name[:5].lower() == "file:":
            return await self._file(parse_reference(name))
        return (await self._find(name))[1]

    async def register_file(self, reference: Reference | str) -> ModelInfo:
        """Remember a model outside the cache, ``file:/path``: a GGUF or a safetensors folder.

        :raises InvalidRequest: it is missing, unreadable, no model, or not whole
        """
        if isinstance(reference, str):
            reference = parse_reference(reference)
        info = await self._file(reference)
        if info.path not in self._registered:
            await self._register([*self._registered, info.path])
        return info

    async def delete(self, model_id: str) -> ModelInfo:
        """Remove a fetched model from the cache, or forget a registered file, which stays.

        The digest of what is returned is empty where it was never computed.

        :raises Forbidden: the model ships with Hive, or its files cannot be removed
        :raises NotFound: there is no such model
        :raises Conflict: the name fits several models, or its part of the cache is damaged
        """
        if model_id[:5].lower() == "file:":
            return await self._forget(parse_reference(model_id))
        model, info = await self._find(model_id)
        if model.source == "file":
            return await self._forget(Reference(path=model.path))
        if model.cached is None:
            raise Forbidden(f"'{model.id}' is part of Hive and stays. Delete another model.")
        async with self._lock:
            await asyncio.to_thread(cache.remove, self._cache_dir, model.cached)
        return info

    async def sum(self, path: Path) -> str:
        """The SHA-256 of a file that belongs to no model of the catalog, in hex; remembered.

        :raises InvalidRequest: it cannot be read
        :raises Conflict: it is being written
        """
        try:
            key = await asyncio.to_thread(FileKey.of, path)
        except OSError as error:
            raise unreadable(path, error) from None
        async with self._summing.setdefault(key, asyncio.Lock()):
            found = await digests.compute(self._digests, key)
        await asyncio.to_thread(self._digests.save)
        return found

    async def _find(self, name: str) -> tuple[LocalModel, ModelInfo]:
        wanted = name.lower()
        models = await self._models()
        for model in models:
            if wanted in short_forms(model.id) | model.aliases():
                await self._hash(model)
        known = [(model, info) for model in models if (info := self._info(model))]
        try:
            digest = resolve(name, [(info.id, info.digest) for _, info in known])
        except NotFound:
            matching = {info.digest: info.id for model, info in known if wanted in model.aliases()}
            if not matching:
                raise
            if len(matching) > 1:
                candidates = ", ".join(sorted(matching.values()))
                raise Conflict(
                    f"The name '{name}' fits more than one model: {candidates}. Use one of these.",
                    code="model_ambiguous",
                    param="model",
                ) from None
            (digest,) = matching
        same = [pair for pair in known if pair[1].digest == digest]
        return next((pair for pair in same if pair[0].id.lower() == wanted), same[0])

    async def _file(self, reference: Reference) -> ModelInfo:
        if reference.path is None:
            raise InvalidRequest(
                f"'{reference}' is no file. Write file:/path/to/file.gguf.", param="model"
            )
        model = await asyncio.to_thread(at_path, reference.path)
        facts = await asyncio.to_thread(read_facts, model)
        await self._hash(model)
        digest = self._digest(model)
        assert digest is not None
        return _told(model, facts, digest)

    async def _forget(self, reference: Reference) -> ModelInfo:
        path = str(reference.path)
        if path not in self._registered:
            raise NotFound(
                f"'{reference}' is not registered, so there is nothing to forget.",
                code="model_not_found",
                param="model",
            )
        listed = (info for model in await self._models() if (info := self._info(model)))
        gone = ModelInfo(
            id=str(reference), digest="", format="gguf", size_bytes=0, source="file", path=path
        )
        await self._register([other for other in self._registered if other != path])
        return next((info for info in listed if info.id == gone.id), gone)

    async def _register(self, paths: Sequence[str]) -> None:
        try:
            await asyncio.to_thread(write_json, self._registry, paths)
        except OSError as error:
            raise HiveError(
                f"{self._registry} could not be written: {error.strerror}. "
                "Make room there, or make it writable for the hive agent."
            ) from None
        self._registered = tuple(paths)

    async def _models(self) -> Sequence[LocalModel]:
        async with self._lock:
            return await asyncio.to_thread(self._scan)

    def _scan(self) -> Sequence[LocalModel]:
        """The models there are, in the order of the list. Blocks."""
        facts: dict[tuple[Part, ...], Facts | None] = {}
        models = []
        for model in self._candidates():
            if model.parts not in facts:
                facts[model.parts] = self._read(model)
            if facts[model.parts] is not None:
                models.append(model)
        self._facts = facts
        for model in models:
            missing = self._unhashed(model)
            if sum(part.key.size for part in missing) <= AT_ONCE_BYTES:
                with contextlib.suppress(InvalidRequest, Conflict):
                    for part in missing:
                        self._digests.compute(part.key)
        self._digests.save()
        return models

    def _read(self, model: LocalModel) -> Facts | None:
        """What the model says of itself, read once; None if it is no model after all."""
        if model.parts in self._facts:
            return self._facts[model.parts]
        try:
            return read_facts(model)
        except InvalidRequest:
            return None

    def _candidates(self) -> Iterator[LocalModel]:
        with contextlib.suppress(InvalidRequest):
            yield at_path(self._shipped, SHIPPED_ID, "shipped")
        for cached in cache.scan(self._cache_dir):
            yield from_cache(cached)
        for path in self._registered:
            with contextlib.suppress(InvalidRequest):
                yield at_path(Path(path))

    def _unhashed(self, model: LocalModel) -> Sequence[Part]:
        projector = [model.projector] if model.projector else []
        return [part for part in (*model.identity, *projector) if self._sum(part) is None]

    def _sum(self, part: Part) -> str | None:
        return part.sha256 or self._digests.get(part.key)

    def _digest(self, model: LocalModel) -> str | None:
        sums = []
        for part in model.identity:
            digest = self._sum(part)
            if digest is None:
                return None
            sums.append(digest)
        whole = _digest_of(model, sums)
        if model.projector is None:
            return f"sha256:{whole}"
        projector = self._sum(model.projector)
        return f"sha256:{digests.with_projector(whole, projector)}" if projector else None

    def _info(self, model: LocalModel) -> ModelInfo | None:
        digest, facts = self._digest(model), self._facts.get(model.parts)
        return _told(model, facts, digest) if digest and facts else None

    async def _hash(self, model: LocalModel) -> None:
        """Wait until the model's digest is known.

        :raises InvalidRequest: a file cannot be read
        :raises Conflict: a file is being written
        """
        missing = self._unhashed(model)
        for part in missing:
            async with self._summing.setdefault(part.key, asyncio.Lock()):
                await digests.compute(self._digests, part.key)
        if missing:
            await asyncio.to_thread(self._digests.save)

    async def _hash_all(self, models: Sequence[LocalModel]) -> None:
        for model in models:
            with contextlib.suppress(InvalidRequest, Conflict):  # the next list tries again
                await self._hash(model)


def _digest_of(model: LocalModel, sums: Sequence[str]) -> str:
    """The digest of a model whose files have these sums, in hex."""
    if model.format == "safetensors":
        named = zip((part.name for part in model.identity), sums, strict=True)
        return digests.combine("safetensors", sorted(named))
    if len(sums) == 1:
        return sums[0]
    return digests.combine("split gguf", [(str(i), s) for i, s in enumerate(sums)])


def _told(model: LocalModel, facts: Facts, digest: str) -> ModelInfo:
    projector = (model.projector,) if model.projector else ()
    return ModelInfo(
        id=model.id,
        digest=digest,
        format=model.format,
        size_bytes=sum(part.key.size for part in (*model.parts, *projector)),
        source=model.source,
        path=str(model.path),
        architecture=facts.architecture,
        quantization=facts.quantization,
        context_length=facts.context_length,
        embedding=facts.embedding,
        pooling=facts.pooling,
        projector=str(model.projector_path) if model.projector_path else None,
    )


def _load_registry(path: Path) -> tuple[str, ...]:
    paths = read_json(path)
    return tuple(p for p in paths if isinstance(p, str)) if isinstance(paths, list) else ()
