"""Packages for tests: small wheels made by hand, and one whose build can be held."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import tarfile
import zipfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from aiohttp import web

# Its build says who it is, then waits until it may go on. It is an in-tree backend (PEP 517), so
# that nothing else has to be installed for it.
BACKEND = """
import os, pathlib, time, zipfile

folder = pathlib.Path({folder!r})

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    with (folder / "builds").open("a") as file:
        file.write(f"{{os.getpid()}}\\n")
    while not (folder / "go").exists():
        time.sleep(0.02)
    data = (folder / {wheel!r}).read_bytes()
    (pathlib.Path(wheel_directory) / {wheel!r}).write_bytes(data)
    return {wheel!r}

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    with zipfile.ZipFile(folder / {wheel!r}) as wheel:
        info = [name for name in wheel.namelist() if ".dist-info/" in name]
        wheel.extractall(metadata_directory, info)
    return info[0].split("/")[0]
"""


@dataclass(frozen=True)
class Shelf:
    """A folder that pip is pointed to instead of an index."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """Variables by which pip finds this folder and nothing else."""
        return pip_finds(str(self.folder))

    @contextlib.asynccontextmanager
    async def served(self, slow: str, go_on: asyncio.Event) -> AsyncIterator[dict[str, str]]:
        """Serve the folder over HTTP; variables by which pip finds that and nothing else.

        :param slow: this file comes in halves, the second once ``go_on`` is set
        """

        async def page(request: web.Request) -> web.Response:
            names = sorted(path.name for path in self.folder.glob("*.whl"))
            links = "".join(f'<a href="{name}">{name}</a>' for name in names)
            return web.Response(text=f"<!DOCTYPE html>{links}", content_type="text/html")

        async def file(request: web.Request) -> web.StreamResponse:
            name = request.match_info["name"]
            data = (self.folder / name).read_bytes()
            response = web.StreamResponse(headers={"Content-Length": str(len(data))})
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            if name == slow:
                await go_on.wait()
            await response.write(data[len(data) // 2 :])
            return response

        app = web.Application()
        app.add_routes([web.get("/", page), web.get("/{name}", file)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            host, port = runner.addresses[0][:2]
            yield pip_finds(f"http://{host}:{port}/")
        finally:
            await runner.cleanup()

    def wheel(
        self,
        name: str,
        version: str,
        *,
        requires: Sequence[str] = (),
        python: str = ">=3.8",
        padding: int = 0,
        into: Path | None = None,
    ) -> Path:
        """Put a wheel there: a module of the same name with ``VERSION`` in it.

        :param padding: bytes by which it is larger
        """
        module = name.replace("-", "_")
        info = f"{module}-{version}.dist-info"
        headers = [
            *("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"),
            f"Requires-Python: {python}",
            *(f"Requires-Dist: {one}" for one in requires),
        ]
        files = {
            f"{module}/__init__.py": f"VERSION = {version!r}\n",
            f"{module}/weights.txt": "0" * padding,
            f"{module}/kernels.py": "".join(f"# kernel {n}\n" for n in range(1000)),
            f"{info}/METADATA": "\n".join(headers) + "\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = "".join(f"{path},{_digest(text)},{len(text)}\n" for path, text in files.items())
        path = (into or self.folder) / f"{module}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as file:
            for name_inside, text in {
                **files,
                f"{info}/RECORD": f"{record}{info}/RECORD,,\n",
            }.items():
                file.writestr(name_inside, text)
        return path

    def held(self, name: str, version: str, *, requires: Sequence[str] = ()) -> Held:
        """Put a source distribution there whose build waits until it may go on."""
        folder = self.folder / f"held-{name}-{version}"
        folder.mkdir()
        wheel = self.wheel(name, version, requires=requires, into=folder)
        top = f"{name}-{version}"
        files = {
            "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\n'
            'backend-path = ["."]\n',
            "backend.py": BACKEND.format(folder=str(folder), wheel=wheel.name),
            "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        }
        with tarfile.open(self.folder / f"{top}.tar.gz", "w:gz") as file:
            for path, text in files.items():
                entry = tarfile.TarInfo(f"{top}/{path}")
                entry.size = len(text)
                file.addfile(entry, io.BytesIO(text.encode()))
        return Held(folder)


@dataclass(frozen=True)
class Held:
    """A build that waits."""

    folder: Path

    def builds(self) -> list[int]:
        """The process ids of the builds that have begun."""
        try:
            return [int(line) for line in (self.folder / "builds").read_text().splitlines()]
        except FileNotFoundError:
            return []

    def pip(self) -> psutil.Process:
        """The pip that waits for the last build."""
        return next(
            parent
            for parent in psutil.Process(self.builds()[-1]).parents()
            if "install" in parent.cmdline()
        )

    def release(self) -> None:
        (self.folder / "go").touch()


def pip_finds(links: str) -> dict[str, str]:
    """Variables by which pip finds packages at one place and nowhere else."""
    return {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": links,
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_CACHE_DIR": "1",
    }


def _digest(text: str) -> str:
    raw = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
