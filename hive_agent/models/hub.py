"""Getting models from a Hugging Face hub or a mirror of one.

huggingface_hub speaks for metadata and authentication; the bytes are fetched by
:mod:`hive_agent.models.transfer`, into the cache that huggingface_hub lays out.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hive_agent.models import cache
from hive_agent.models.metadata import BRANCH, HubFile, Listing, Metadata
from hive_agent.models.partial import Blob, in_thread
from hive_agent.models.progress import Meter, Progress, human_size
from hive_agent.models.references import Reference
from hive_agent.models.transfer import Changed, Retry, fetch_beginning, fetch_blob, new_session
from hive_agent.models.variants import Variant, choose, ids, variants
from operations.errors import InvalidRequest, Unavailable, WontFit

T = TypeVar("T")

ANSWER_S = 30.0  # what the hub gets to tell of a model
FILES_AT_ONCE = 4
MAX_PLANS = 3
"""How often a download is planned at most when the repository changes under it."""


@dataclass(frozen=True)
class DownloadPlan:
    """What a reference means at this moment.

    :param listing: the repository that it was found in
    :param model_id: under which the catalog will find it
    :param variant: which of the models there
    :param files: that a download brings
    :param missing_bytes: what is not on this disk yet
    """

    reference: Reference
    listing: Listing
    model_id: str
    variant: Variant
    files: tuple[HubFile, ...]
    missing_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def label(self) -> str:
        """What to call it in a line of progress."""
        if len(self.files) == 1:
            return self.files[0].path.rsplit("/", 1)[-1]
        return f"{self.listing.repo} ({len(self.files)} files)"


@asynccontextmanager
async def in_time(reference: Reference) -> AsyncIterator[None]:
    """Give the hub 30 s to tell what is asked of a model.

    :raises Unavailable: it took longer
    """
    try:
        async with asyncio.timeout(ANSWER_S):
            yield
    except TimeoutError:
        raise Unavailable(
            f"The hub did not tell of '{reference}' within {ANSWER_S:.0f} s. Try again later.",
            code="hub_unreachable",
        ) from None


class Hub:
    """A hub, and the cache that its models go to. Holds no connection between calls.

    :param cache_dir: ``…/huggingface/hub``; created when needed
    :param endpoint: the hub's URL; huggingface_hub's own default (``HF_ENDPOINT``) otherwise
    :param token: instead of the one stored by ``hf auth login`` or in ``HF_TOKEN``
    """

    def __init__(
        self,
        *,
        cache_dir: Path,
        endpoint: str | None = None,
        token: str | None = None,
        retry: Retry | None = None,
    ) -> None:
        self._cache_dir = cache_dir
        self._metadata = Metadata(endpoint.rstrip("/") if endpoint else None, token)
        self._retry = retry or Retry()

    async def plan(self, reference: Reference) -> DownloadPlan:
        """Ask the hub which files the reference means, and whether there is room for them.

        :raises HiveError: as :meth:`look`
        :raises Forbidden: the licence of the repository was not accepted
        :raises WontFit: the disk is too small; the message says by how much
        """
        plan = await self.look(reference)
        if plan.missing_bytes:
            await asyncio.to_thread(self._metadata.check_access, plan.listing, plan.files[-1].path)
            await asyncio.to_thread(self._check_room, plan)
        return plan

    async def look(self, reference: Reference) -> DownloadPlan:
        """Ask the hub which files the reference means; nothing is checked on this disk.

        :raises InvalidRequest: the reference is a path
        :raises NotFound: no such repository, file or quantization; the message lists what there is
        :raises Conflict: several files fit; the message lists them
        :raises Unauthorized: the hub knows neither us nor our token
        :raises Unavailable: the hub cannot be reached, or ``HF_HUB_OFFLINE`` is set
        """
        if reference.repo is None:
            raise InvalidRequest(
                f"'{reference}' is a file on this machine; there is nothing to fetch.",
                param="model",
            )
        listing = await asyncio.to_thread(self._metadata.listing, reference.repo)
        found = variants(listing.files)
        variant = choose(listing.repo, found, reference.selector)
        files = tuple(listing.files[path] for path in variant.fetched)
        blobs = [self._blob(listing, file) for file in files]
        there = await asyncio.to_thread(lambda: [blob.bytes_there() for blob in blobs])
        return DownloadPlan(
            reference=reference,
            listing=listing,
            model_id=ids(listing.repo, found)[found.index(variant)],
            variant=variant,
            files=files,
            missing_bytes=sum(file.size for file in files) - sum(there),
        )

    async def beginning(
        self,
        plan: DownloadPlan,
        path: str,
        most: int,
        enough: Callable[[bytes], Awaitable[T | None]],
    ) -> T | None:
        """Read one of a plan's files from its beginning, see
        :func:`~hive_agent.models.transfer.fetch_beginning`.

        :raises HiveError: the hub cannot be reached, or does not give it to us, and why
        """
        headers = await asyncio.to_thread(self._metadata.headers)
        blob = self._blob(plan.listing, plan.listing.files[path])
        try:
            async with new_session(self._retry) as session:
                return await fetch_beginning(session, blob, headers, self._retry, most, enough)
        except Changed as change:
            await asyncio.to_thread(self._metadata.check_access, plan.listing, path)
            raise Unavailable(
                f"'{plan.model_id}' cannot be read: {change}. Try again.", code="hub_unavailable"
            ) from None

    async def fetch(self, plan: DownloadPlan, progress: Callable[[Progress], None]) -> None:
        """Fetch what is missing, check it, and put it into the cache: all of it or nothing.

        Other processes may fetch the same; each file comes over the line once. When cancelled, or
        killed, what came in stays, and the next call goes on from there.

        :param progress: called at most about twice a second, and once at the end
        :raises HiveError: as :meth:`plan`, and what
            :func:`~hive_agent.models.transfer.fetch_blob` raises
        """
        for _ in range(MAX_PLANS):
            try:
                await self._fetch(plan, progress)
            except Changed as change:
                reason = str(change)
                newer = await self.plan(plan.reference)
                if newer.listing == plan.listing:
                    break
                plan = newer
            else:
                return
        raise Unavailable(
            f"'{plan.model_id}' cannot be fetched: {reason}, and its list of files says otherwise. "
            "Try again later, or from another hub (HF_ENDPOINT).",
            code="download_failed",
        )

    async def _fetch(self, plan: DownloadPlan, progress: Callable[[Progress], None]) -> None:
        headers = await asyncio.to_thread(self._metadata.headers)
        meter = Meter(plan.label, plan.total_bytes, progress)
        slots = asyncio.Semaphore(FILES_AT_ONCE)

        async def one(blob: Blob) -> None:
            async with slots:
                await fetch_blob(session, blob, headers, self._retry, meter)

        blobs = [self._blob(plan.listing, file) for file in plan.files]
        try:
            async with new_session(self._retry) as session, asyncio.TaskGroup() as group:
                for blob in blobs:
                    group.create_task(one(blob))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        names = {file.path: file.etag for file in plan.files}
        await in_thread(
            cache.link, self._cache_dir, plan.listing.repo, BRANCH, plan.listing.commit, names
        )
        meter.finish()

    def _blob(self, listing: Listing, file: HubFile) -> Blob:
        return Blob(
            name=file.path,
            url=listing.url(file.path),
            etag=file.etag,
            size=file.size,
            path=cache.blob_path(self._cache_dir, listing.repo, file.etag),
            lock=cache.lock_path(self._cache_dir, listing.repo, file.etag),
        )

    def _check_room(self, plan: DownloadPlan) -> None:
        folder = self._cache_dir
        while not os.path.exists(folder) and folder != folder.parent:
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if plan.missing_bytes > free:
            raise WontFit(
                f"'{plan.model_id}' needs {human_size(plan.missing_bytes)} more on disk, and "
                f"{folder} has {human_size(free)} free: {human_size(plan.missing_bytes - free)} "
                "are missing. Make room, e.g. with 'hive models rm', or choose a smaller "
                "quantization.",
                code="disk_full",
            )
