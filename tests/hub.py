"""A Hugging Face hub that tests run: real sockets, real bytes, and faults on command.

It speaks what huggingface_hub and Hive ask of a hub: model info, tree, and HEAD and GET of files
with ETags and ranges. Large files (LFS) may be served by a "CDN" on a port of its own, as the real
hub does. Every request is recorded.

    async with HubServer() as hub:
        hub.add("org/name", {"model-Q8_0.gguf": data})
        hub.fault("model-Q8_0.gguf", Drop(after=1000))
        ...
        assert hub.ranges("model-Q8_0.gguf") == [None, "bytes=1000-"]
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import zlib
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from aiohttp import web

LFS_SUFFIXES = (".gguf", ".safetensors", ".bin", ".model")
CHUNK = 64 * 1024


@dataclass(frozen=True)
class Drop:
    """Cut the connection after so many bytes of the body."""

    after: int


@dataclass(frozen=True)
class Stall:
    """Send nothing more after so many bytes, until the client leaves or the hub closes."""

    after: int


@dataclass(frozen=True)
class IgnoreRange:
    """Answer 200 with the whole file, whatever was asked; ``drop_after`` bytes, then cut."""

    drop_after: int | None = None


@dataclass(frozen=True)
class Corrupt:
    """Send other bytes of the same length."""


@dataclass(frozen=True)
class Status:
    """Answer with this status instead."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WrongPart:
    """Answer a range with the part that begins so many bytes later."""

    by: int


@dataclass
class Gate:
    """Send only as many bytes as the test allows, and tell it how many were sent."""

    allowed: int = 0
    sent: int = 0
    _moved: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def allow(self, count: int | None = None) -> None:
        """Let ``count`` more bytes pass, or all."""
        async with self._moved:
            self.allowed = 2**62 if count is None else self.allowed + count
            self._moved.notify_all()

    async def reached(self, count: int) -> None:
        """Wait until ``count`` bytes were sent."""
        async with self._moved:
            await self._moved.wait_for(lambda: self.sent >= count)

    async def pass_through(self, wanted: int) -> int:
        async with self._moved:
            await self._moved.wait_for(lambda: self.allowed > self.sent)
            return min(wanted, self.allowed - self.sent)

    async def count(self, sent: int) -> None:
        async with self._moved:
            self.sent += sent
            self._moved.notify_all()


Fault = Drop | Stall | IgnoreRange | Corrupt | Status | WrongPart | Gate


@dataclass(frozen=True)
class Seen:
    """One request as it came in."""

    method: str
    host: str
    path: str
    headers: Mapping[str, str]

    @property
    def authorization(self) -> str | None:
        return self.headers.get("Authorization")

    @property
    def range(self) -> str | None:
        return self.headers.get("Range")


@dataclass(frozen=True)
class File:
    """A file of a repository. ``claimed_size`` is what the hub says of one that is not served."""

    data: bytes | Path
    lfs: bool
    claimed_size: int | None = None

    @property
    def size(self) -> int:
        if self.claimed_size is not None:
            return self.claimed_size
        return len(self.data) if isinstance(self.data, bytes) else self.data.stat().st_size

    def read(self, start: int, count: int) -> bytes:
        if isinstance(self.data, bytes):
            return self.data[start : start + count]
        with self.data.open("rb") as file:
            file.seek(start)
            return file.read(count)

    def hashes(self) -> tuple[str, str]:
        """SHA-256 and git's id for the bytes."""
        sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % self.size)
        for start in range(0, self.size, 2**20):
            chunk = self.read(start, 2**20)
            if not chunk:
                break
            sha256.update(chunk)
            sha1.update(chunk)
        return sha256.hexdigest(), sha1.hexdigest()


@dataclass
class Repo:
    """A repository at one commit.

    :ivar token: what ``Authorization: Bearer`` must carry; None for a public repository
    :ivar gated: files are refused, whoever asks
    """

    name: str
    files: dict[str, File]
    commit: str
    token: str | None
    gated: bool
    hashes: dict[str, tuple[str, str]]

    def etag(self, name: str) -> str:
        """What the cache will call the blob: SHA-256 of an LFS file, git's id of any other."""
        sha256, sha1 = self.hashes[name]
        return sha256 if self.files[name].lfs else sha1

    def info(self, name: str) -> dict[str, Any]:
        file, (sha256, sha1) = self.files[name], self.hashes[name]
        told: dict[str, Any] = {"size": file.size, "oid": sha1}
        if file.lfs:
            told["lfs"] = {"size": file.size, "oid": sha256, "pointerSize": 135}
        return told


class HubServer:
    """The hub. ``cdn=True`` redirects LFS files to a second port; ``blobs=False`` leaves sizes and
    hashes out of the model info, as some mirrors do."""

    def __init__(self, *, cdn: bool = False, blobs: bool = True) -> None:
        self.requests: list[Seen] = []
        self.repos: dict[str, Repo] = {}
        self._faults: dict[str, deque[Fault]] = defaultdict(deque)
        self._cdn = cdn
        self._blobs = blobs
        self._runners: list[web.AppRunner] = []
        self._closing = asyncio.Event()
        self.url = ""
        self.cdn_url = ""

    async def __aenter__(self) -> Self:
        hub = web.Application()
        hub.router.add_get("/api/models/{org}/{name}", self._model)
        hub.router.add_get("/api/models/{org}/{name}/revision/{revision}", self._model)
        hub.router.add_get("/api/models/{org}/{name}/tree/{revision}", self._tree)
        hub.router.add_get("/{org}/{name}/resolve/{revision}/{path:.+}", self._resolve)
        self.url = await self._serve(hub)
        cdn = web.Application()
        cdn.router.add_get("/{org}/{name}/{path:.+}", self._from_cdn)
        # Another host than the hub's, as clients see it.
        self.cdn_url = (await self._serve(cdn)).replace("127.0.0.1", "localhost")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing.set()
        for runner in self._runners:
            await runner.cleanup()

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes | Path],
        *,
        token: str | None = None,
        gated: bool = False,
        claimed_sizes: Mapping[str, int] | None = None,
    ) -> Repo:
        """Put a repository there, or a new commit in the place of one."""
        sizes = claimed_sizes or {}
        stored = {
            name: File(data, name.endswith(LFS_SUFFIXES), sizes.get(name))
            for name, data in files.items()
        }
        hashes = {name: file.hashes() for name, file in stored.items()}
        digest = hashlib.sha1(repr((repo, sorted(hashes.items()))).encode()).hexdigest()
        self.repos[repo.lower()] = Repo(repo, stored, digest, token, gated, hashes)
        return self.repos[repo.lower()]

    def fault(self, path: str, *faults: Fault) -> None:
        """What happens to the next GETs of this file, one fault each; then all is well."""
        self._faults[path].extend(faults)

    def seen(self, path: str, method: str = "GET") -> list[Seen]:
        """The requests for a file's bytes, at the hub and at the CDN."""
        return [
            seen
            for seen in self.requests
            if seen.method == method and seen.path.endswith(f"/{path}") and "/api/" not in seen.path
        ]

    def ranges(self, path: str) -> list[str | None]:
        """The ``Range`` of each GET of a file that was answered with bytes or with a fault."""
        host = "localhost" if self._cdn else "127.0.0.1"
        return [seen.range for seen in self.seen(path) if seen.host.startswith(host)]

    async def _serve(self, app: web.Application) -> str:
        runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=0.5, handler_cancellation=True
        )
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._runners.append(runner)
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    def _record(self, request: web.Request) -> None:
        self.requests.append(
            Seen(request.method, request.host, request.path, dict(request.headers))
        )

    def _repo(self, request: web.Request) -> Repo:
        """The repository, or one of the hub's refusals with its ``X-Error-Code``."""
        self._record(request)
        name = f"{request.match_info['org']}/{request.match_info['name']}"
        repo = self.repos.get(name.lower())
        sent = request.headers.get("Authorization")
        if sent == "Bearer invalid":
            raise web.HTTPUnauthorized(
                headers={"X-Error-Message": "Invalid credentials in Authorization header"}
            )
        if repo is None or (repo.token is not None and sent != f"Bearer {repo.token}"):
            refusal = web.HTTPNotFound if sent else web.HTTPUnauthorized
            raise refusal(headers={"X-Error-Code": "RepoNotFound"})
        return repo

    async def _model(self, request: web.Request) -> web.Response:
        repo = self._repo(request)
        siblings: list[dict[str, Any]] = []
        for name in repo.files:
            sibling: dict[str, Any] = {"rfilename": name}
            if self._blobs and "blobs" in request.query:
                told = repo.info(name)
                sibling |= {"size": told["size"], "blobId": told["oid"]}
                if lfs := told.get("lfs"):
                    sibling["lfs"] = {
                        "sha256": lfs["oid"],
                        "size": lfs["size"],
                        "pointerSize": lfs["pointerSize"],
                    }
            siblings.append(sibling)
        return web.json_response(
            {
                "id": repo.name,
                "modelId": repo.name,
                "sha": repo.commit,
                "private": repo.token is not None,
                "gated": "auto" if repo.gated else False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
        )

    async def _tree(self, request: web.Request) -> web.Response:
        repo = self._repo(request)
        return web.json_response(
            [{"type": "file", "path": name, **repo.info(name)} for name in repo.files]
        )

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        repo = self._repo(request)
        name = request.match_info["path"]
        if repo.gated:
            raise web.HTTPForbidden(headers={"X-Error-Code": "GatedRepo"})
        if name not in repo.files:
            raise web.HTTPNotFound(headers={"X-Error-Code": "EntryNotFound"})
        file = repo.files[name]
        headers = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if not (file.lfs and self._cdn):
            return await self._send(request, file, name, headers | {"ETag": _quoted(repo, name)})
        headers |= {"X-Linked-Etag": _quoted(repo, name), "X-Linked-Size": str(file.size)}
        location = f"{self.cdn_url}/{repo.name}/{name}?signature=a%2Fb%3D"
        return web.Response(status=302, headers=headers | {"Location": location})

    async def _from_cdn(self, request: web.Request) -> web.StreamResponse:
        self._record(request)
        assert request.raw_path.endswith("?signature=a%2Fb%3D"), "a signed address was rewritten"
        repo = self.repos[f"{request.match_info['org']}/{request.match_info['name']}".lower()]
        name = request.match_info["path"]
        return await self._send(request, repo.files[name], name, {"ETag": '"of-the-cdn"'})

    async def _send(
        self, request: web.Request, file: File, name: str, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        fault = None
        if request.method == "GET" and self._faults[name]:
            fault = self._faults[name].popleft()
        if isinstance(fault, Status):
            return web.Response(status=fault.status, headers=fault.headers)
        start, size = 0, file.size
        end = size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if asked and not isinstance(fault, IgnoreRange):
            start = int(asked[1])
            if isinstance(fault, WrongPart):
                start += fault.by
            if start >= size:
                return web.Response(status=416, headers={"Content-Range": f"bytes */{size}"})
            end = min(size, int(asked[2]) + 1) if asked[2] else size
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}
        response = web.StreamResponse(
            status=206 if start or end < size else 200, headers=dict(headers)
        )
        response.content_length = end - start
        await response.prepare(request)
        if request.method == "GET":
            await self._body(request, response, file, start, end, fault)
        return response

    async def _body(
        self,
        request: web.Request,
        response: web.StreamResponse,
        file: File,
        start: int,
        last: int,
        fault: Fault | None,
    ) -> None:
        end = last
        match fault:
            case Drop(after=after) | Stall(after=after) | IgnoreRange(drop_after=int(after)):
                end = min(end, start + after)
        at = start
        while at < end:
            count = min(CHUNK, end - at)
            if isinstance(fault, Gate):
                count = await fault.pass_through(count)
            chunk = file.read(at, count)
            if isinstance(fault, Corrupt):
                chunk = bytes(byte ^ 1 for byte in chunk)
            await response.write(chunk)
            at += len(chunk)
            if isinstance(fault, Gate):
                await fault.count(len(chunk))
        if isinstance(fault, Stall):
            await self._closing.wait()
        elif at < last and request.transport is not None:
            request.transport.close()


def _quoted(repo: Repo, name: str) -> str:
    return f'"{repo.etag(name)}"'


def noise(count: int, seed: int = 0) -> bytes:
    """Bytes that no two places of have in common, quickly: for files whose content is no matter."""
    block = hashlib.shake_128(seed.to_bytes(8, "little")).digest(min(count, 2**16))
    pieces = [
        zlib.crc32(i.to_bytes(4, "little")).to_bytes(4, "little") + block[4:]
        for i in range(-(-count // 2**16) if count else 0)
    ]
    return b"".join(pieces)[:count]
