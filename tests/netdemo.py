"""The README's tour on two machines, its very lines, on hosts made of network namespaces.

``python -m tests.netdemo``, or ``make netdemo``: root and iproute2 are needed. The test of the same
name runs it, so what the README shows is what works.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import clean_env, hive_command
from tests.lan import Lan, unavailable

README = Path(__file__).resolve().parent.parent / "README.md"
HOSTS = {"first": "10.77.0.1", "second": "10.77.0.2", "anywhere": "10.77.0.3"}
START_S = 30.0
STOP_S = 60.0
FOUND_S = 10.0

_BLOCK = re.compile(r"```sh\n# (?P<where>[^\n]+)\n(?P<lines>.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """Shell lines, and the host that they belong to."""

    host: str
    lines: list[str]


def tour(readme: str) -> list[Step]:
    """The blocks of the section, in order; a line that ends in a backslash goes on."""
    section = readme.split("## A tour on two machines", 1)[1].split("\n## ", 1)[0]
    steps = []
    for block in _BLOCK.finditer(section):
        host = next((h for h in ("first", "second") if f"the {h} " in f"{block['where']} "), None)
        lines = block["lines"].replace("\\\n", " ").strip().splitlines()
        steps.append(Step(host or "anywhere", lines))
    return steps


class Stage:
    """The hosts, each with an empty home, and what runs on them."""

    def __init__(self, lan: Lan, folder: Path, say: Callable[[str], None]) -> None:
        self._lan = lan
        self._folder = folder
        self._say = say
        self._daemons: list[asyncio.subprocess.Process] = []
        self.key = ""
        for name, address in HOSTS.items():
            lan.host(name, address)
            (folder / name / "run").mkdir(parents=True, mode=0o700)
        self._bin = folder / "bin"
        self._bin.mkdir()
        self._script("hive", f'exec {shlex.join(hive_command())} "$@"')
        self._script("ssh", self._ssh())

    async def run(self, host: str, line: str, *, shown: bool = True) -> str:
        """Run a line to its end; what it printed. :raises AssertionError: it failed"""
        say = self._say if shown else lambda text: None
        say(f"{host}$ {line}")
        process = await self._begin(host, line)
        out, err = await process.communicate()
        say((err + out).decode().rstrip())
        assert process.returncode == 0, f"{line}: {err.decode()}"
        return out.decode()

    async def keep(self, host: str, line: str, ready: str) -> None:
        """Start a daemon, and wait until it says that it listens."""
        self._say(f"{host}$ {line}")
        process = await self._begin(host, f"exec {line}")
        self._daemons.append(process)
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            while said := (await process.stdout.readline()).decode():
                self._say(said.rstrip())
                if ready in said:
                    return
        raise AssertionError(f"{line} did not start")

    async def close(self) -> None:
        for process in self._daemons:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in self._daemons:
            await asyncio.wait_for(process.communicate(), STOP_S)

    async def _begin(self, host: str, line: str) -> asyncio.subprocess.Process:
        home = self._folder / host
        line = line.replace("//first:", f"//{HOSTS['first']}:")
        env = {
            **clean_env(),
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home / "run"),
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "KEY": self.key,
            "COLUMNS": "80",
        }
        env.pop("XDG_STATE_HOME", None)
        return await asyncio.create_subprocess_exec(
            *self._lan.command(host, ["bash", "-o", "pipefail", "-c", line]),
            env=env,
            cwd=home,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE if not line.startswith("exec") else None,
        )

    def _script(self, name: str, body: str) -> None:
        path = self._bin / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def _ssh(self) -> str:
        """``ssh HOST COMMAND``, for hosts that have no sshd: a step over into the namespace."""
        namespace = shlex.join(self._lan.command("@", [])).replace("@", "$host")
        return f'host=$1; shift; HOME={self._folder}/$host exec {namespace} "$@"'


async def play(say: Callable[[str], None]) -> str:
    """Run the tour; the answer that the caller got."""
    answer = ""
    async with stage(say) as on:
        for step in tour(README.read_text()):
            for line in step.lines:
                command = line.partition("  #")[0].strip() if "curl" not in line else line
                if command.startswith(("hive up", "hive agent")):
                    ready = "listens" if "agent" in command else "Ctrl-C"
                    await on.keep(step.host, command, ready)
                    continue
                if command == "hive status":
                    await found(on, step.host)
                answer = await on.run(step.host, command)
                if command.startswith("hive keys new"):
                    on.key = answer.strip()
    return answer


async def found(on: Stage, host: str) -> None:
    """Wait until the queen shows both hives: what a person does by looking again."""
    async with asyncio.timeout(FOUND_S):
        status = ""
        while status.count('"state": "online"') < 2:
            status = await on.run(host, "hive --json status", shown=False)


@contextlib.asynccontextmanager
async def stage(say: Callable[[str], None]) -> AsyncIterator[Stage]:
    with Lan() as lan, tempfile.TemporaryDirectory(prefix="hive-net-") as folder:
        made = Stage(lan, Path(folder), say)
        try:
            yield made
        finally:
            await made.close()


def main() -> int:
    if (why := unavailable()) is not None:
        print(f"No LAN can be made here: {why}.", file=sys.stderr)
        return 1
    asyncio.run(play(lambda text: print(text, flush=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
