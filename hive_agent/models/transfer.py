"""Fetching one blob over HTTP so that no interruption costs more than the last second.

Range requests (RFC 9110, section 14) go on where the partial file ends, in this process or in the
next. Dropped and stalled connections are retried with exponential backoff; whatever the server
does, a file that is not what its ETag says is never published.
"""

from __future__ import annotations

import asyncio
import errno
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
from filelock import FileLock, Timeout
from yarl import URL

from hive_agent.models.cache import ETAG
from hive_agent.models.partial import Blob, Partial, in_thread
from hive_agent.models.progress import Meter, human_size
from operations.errors import HiveError, Unavailable, WontFit

BATCH_BYTES = 2**20
FLUSH_S = 1.0
"""Received bytes are written at the latest after this time, as far as new ones come in."""

LOCK_POLL_S = 0.2
MAX_REDIRECTS = 10
MAX_RETRY_AFTER_S = 120.0

T = TypeVar("T")

_REDIRECTS = (301, 302, 303, 307, 308)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True)
class Retry:
    """How patient a download is.

    :param attempts: connections in a row without a new byte before it gives up
    :param base_s: the wait after a connection that brought something; it doubles with each that
        did not, less a random part of up to a half
    :param cap_s: the longest wait
    :param stall_s: a connection that brings nothing for so long counts as dropped
    """

    attempts: int = 6
    base_s: float = 0.5
    cap_s: float = 30.0
    stall_s: float = 30.0

    def wait_s(self, failures: int) -> float:
        """Seconds to wait after so many connections without a new byte."""
        return min(self.cap_s, self.base_s * 2.0**failures) * random.uniform(0.5, 1.0)


class Changed(Exception):
    """The hub has something else than what was planned: plan again."""


class Refused(Changed):
    """The hub does not, or no longer, give it to us; planning again tells why."""


class _Dropped(Exception):
    """The connection was of no use; try again, not before ``retry_after`` seconds."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = min(retry_after, MAX_RETRY_AFTER_S)


def new_session(retry: Retry) -> aiohttp.ClientSession:
    """A client for :func:`fetch_blob`; proxies come from the environment."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=retry.stall_s, sock_read=retry.stall_s
        ),
        auto_decompress=False,
        trust_env=True,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def fetch_blob(
    session: aiohttp.ClientSession,
    blob: Blob,
    headers: dict[str, str],
    retry: Retry,
    meter: Meter,
) -> None:
    """Fetch a blob unless it is there. When cancelled, what came in stays for the next time.

    :param headers: sent to the hub; ``Authorization`` goes nowhere else
    :raises Changed: the hub has something else under this address, or refuses what it has
    :raises Unavailable: the hub stayed unreachable, or sent wrong bytes
    :raises WontFit: the disk is full
    :raises HiveError: the disk cannot be written to
    """
    try:
        async with _locked(blob, meter):
            if blob.is_there():
                meter.found(blob.size)
                return
            partial = Partial(blob)
            try:
                await in_thread(partial.open, on_cancel=partial.give_up)
                meter.found(partial.size)
                await _complete(session, blob, headers, retry, meter, partial)
            except Changed as change:
                if not isinstance(change, Refused):
                    partial.discard()  # the beginning of what is no more
                raise
            finally:
                partial.close()
    except OSError as error:
        raise _disk_error(error, blob) from None


async def fetch_beginning(
    session: aiohttp.ClientSession,
    blob: Blob,
    headers: dict[str, str],
    retry: Retry,
    most: int,
    enough: Callable[[bytes], Awaitable[T | None]],
) -> T | None:
    """Read a file from its beginning until that is enough; nothing is written down.

    :param most: bytes that are read at most
    :param enough: asked each time that twice as much has come, and at the end; what it makes of
        the bytes so far, or None where it needs more of them
    :returns: that, or None where all of them were not enough
    :raises Changed: the hub has something else under this address, or refuses what it has
    :raises Unavailable: the hub cannot be reached, or sent something else
    """
    data, asked = bytearray(), BATCH_BYTES // 4
    try:
        async with _get(session, blob, headers, 0, min(most, blob.size)) as response:
            if _start(response, blob) != 0:
                raise _Dropped("the server did not send the part that was asked for")
            async for chunk in response.content.iter_any():
                data += chunk
                if asked <= len(data) < most:
                    asked = 2 * len(data)
                    if (found := await enough(bytes(data))) is not None:
                        return found
                elif len(data) >= most:
                    break
        return await enough(bytes(data[:most]))
    except (_Dropped, aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        raise Unavailable(
            f"The beginning of {blob.name} could not be read: {_reason(error, retry)}. "
            "Try again later.",
            code="hub_unreachable",
        ) from None


async def _complete(
    session: aiohttp.ClientSession,
    blob: Blob,
    headers: dict[str, str],
    retry: Retry,
    meter: Meter,
    partial: Partial,
) -> None:
    while True:
        inherited = partial.inherited
        await _receive_all(session, blob, headers, retry, meter, partial)
        if partial.is_true():
            await in_thread(partial.publish)
            return
        await _restart(partial, meter)
        if not inherited:
            partial.discard()
            raise Unavailable(
                f"What {URL(blob.url).host} sent as {blob.name} is not what its checksum says; it "
                "was removed. Try again; if it happens again, the hub's copy is damaged.",
                code="download_corrupt",
            )
        meter.say("what was there from before is damaged; starting over")


async def _receive_all(
    session: aiohttp.ClientSession,
    blob: Blob,
    headers: dict[str, str],
    retry: Retry,
    meter: Meter,
    partial: Partial,
) -> None:
    """Receive until the file has its size, over as many connections as it takes."""
    failures, furthest = 0, partial.size
    while partial.size < blob.size:
        try:
            await _receive(session, blob, headers, meter, partial)
        except (_Dropped, aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            failures = 0 if partial.size > furthest else failures + 1
            furthest = max(furthest, partial.size)
            host = URL(blob.url).host
            reason = _reason(error, retry)
            if failures >= retry.attempts:
                raise Unavailable(
                    f"{blob.name} could not be fetched from {host}: {reason}, {failures} times in "
                    f"a row. {human_size(partial.size)} of {human_size(blob.size)} are kept; ask "
                    "again to go on from there.",
                    code="download_failed",
                ) from None
            wait = retry.wait_s(failures)
            if isinstance(error, _Dropped):
                wait = max(wait, error.retry_after)
            meter.say(f"{reason}; trying again in {wait:.1f} s")
            await asyncio.sleep(wait)


async def _receive(
    session: aiohttp.ClientSession,
    blob: Blob,
    headers: dict[str, str],
    meter: Meter,
    partial: Partial,
) -> None:
    """Receive over one connection, from where the partial file ends."""
    async with _get(session, blob, headers, partial.size) as response:
        start = _start(response, blob)
        if start != partial.size:  # the server knows no ranges, or no such range
            await _restart(partial, meter)
        if start != partial.size:
            raise _Dropped("the server did not send the part that was asked for")
        async for batch in _batches(response):
            if partial.size + len(batch) > blob.size:
                await _restart(partial, meter)
                raise _Dropped("the server sent more than the file's size")
            await in_thread(partial.write, batch)
            meter.fetched(len(batch))
    if partial.size < blob.size:
        raise _Dropped("the connection was closed too early")


def _start(response: aiohttp.ClientResponse, blob: Blob) -> int:
    """The position of the answer's first byte in the file; -1 if there is none such."""
    if response.status == 416:
        return -1
    if response.status == 200:
        start, total = 0, response.content_length
    else:
        given = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if given is None:
            raise _Dropped("the server did not say which part it sent")
        start, total = int(given[1]), None if given[2] == "*" else int(given[2])
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise _Dropped("the server sent a compressed file that was asked for as it is")
    if total is not None and total != blob.size:
        raise Changed(f"{blob.name} has {total:,} bytes at the hub, not {blob.size:,}")
    return start


@asynccontextmanager
async def _get(
    session: aiohttp.ClientSession,
    blob: Blob,
    headers: dict[str, str],
    start: int,
    end: int | None = None,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """GET from ``start`` on, before ``end`` where one is given, following redirects; yields an
    answer of status 200, 206 or 416."""
    url = URL(blob.url, encoded=True)
    hub = url.origin()
    for _ in range(MAX_REDIRECTS):
        at_hub = url.origin() == hub
        sent = {"Accept-Encoding": "identity"}
        for name, value in headers.items():
            if at_hub or name.lower() != "authorization":
                sent[name] = value
        if start or end is not None:
            sent["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        async with session.get(
            url, headers=sent, allow_redirects=False, read_bufsize=BATCH_BYTES
        ) as response:
            if at_hub:
                _check_etag(response, blob)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or not location:
                _check_status(response, at_hub)
                yield response
                return
            url = _joined(url, location)
    raise _Dropped(f"the server redirected more than {MAX_REDIRECTS} times")


def _joined(url: URL, location: str) -> URL:
    try:
        target = url.join(URL(location, encoded=True))
    except ValueError:
        raise _Dropped("the server redirected to what is no address") from None
    if target.scheme not in ("http", "https") or not target.host:
        raise _Dropped("the server redirected to what is no web address")
    return target


def _check_etag(response: aiohttp.ClientResponse, blob: Blob) -> None:
    """The hub, unlike what it redirects to, names a file by its hash."""
    etag = response.headers.get("X-Linked-Etag")
    if etag is None and response.status in (200, 206):
        etag = response.headers.get("ETag")
    etag = (etag or "").removeprefix("W/").strip('"')
    if ETAG.fullmatch(etag) and len(etag) == len(blob.etag) and etag != blob.etag:
        raise Changed(f"{blob.name} has changed at the hub")


def _check_status(response: aiohttp.ClientResponse, at_hub: bool) -> None:
    status = response.status
    if status in (200, 206, 416):
        return
    if at_hub and status in (401, 403, 404, 410):
        raise Refused(f"{response.url.host} answered {status}")
    after = response.headers.get("Retry-After", "")
    raise _Dropped(
        f"{response.url.host} answered {status}", float(after) if after.isdecimal() else 0.0
    )


async def _batches(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The body in pieces worth a disk write; what came in before an error is yielded first."""
    loop = asyncio.get_running_loop()
    batch, since = bytearray(), loop.time()
    failure: Exception | None = None
    while True:
        try:
            chunk = await response.content.readany()
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            chunk, failure = b"", error
        batch += chunk
        if batch and (not chunk or len(batch) >= BATCH_BYTES or loop.time() - since >= FLUSH_S):
            yield bytes(batch)
            batch.clear()
            since = loop.time()
        if failure is not None:
            raise failure
        if not chunk:
            return


async def _restart(partial: Partial, meter: Meter) -> None:
    meter.found(-partial.size)
    await in_thread(partial.restart)


@asynccontextmanager
async def _locked(blob: Blob, meter: Meter) -> AsyncIterator[None]:
    """Hold the blob's lock. While somebody else does, report how far they are."""
    blob.lock.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(blob.lock, timeout=0)
    seen = 0
    while True:
        try:
            lock.acquire()
            break
        except Timeout:
            there = await in_thread(blob.bytes_there)
            meter.found(there - seen)
            seen = there
            await asyncio.sleep(LOCK_POLL_S)
    try:
        meter.found(-seen)
        yield
    finally:
        lock.release()


def _reason(error: Exception, retry: Retry) -> str:
    if isinstance(error, _Dropped):
        return str(error)
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"no connection to {error.host}"
    if isinstance(error, TimeoutError):
        return f"nothing came for {retry.stall_s:.0f} s"
    return "the connection was lost"


def _disk_error(error: OSError, blob: Blob) -> HiveError:
    where = blob.path.parent
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        missing = blob.size - blob.bytes_there()
        return WontFit(
            f"The disk is full: {blob.name} needs {human_size(missing)} more in {where}. Make "
            "room, e.g. with 'hive models rm', and ask again; what was fetched is kept.",
            code="disk_full",
        )
    return HiveError(
        f"{blob.name} could not be written to {where}: {error.strerror or error}. Make the folder "
        "writable for the hive agent, or choose another with HF_HOME.",
        code="cache_not_writable",
    )
