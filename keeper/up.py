"""``hive up``: a queen and an agent on this machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from keeper import ports, words
from keeper.child import Child, environment, running
from keeper.command import Json, endings, given
from keeper.daemons import (
    PANEL,
    Database,
    DrainSeconds,
    HiveId,
    Host,
    Interface,
    LogLevel,
    Processes,
    StateDir,
    TlsCert,
    TlsKey,
)
from keeper.interrupts import Interrupts, interrupts
from keeper.output import Fields, Output
from keeper.told import each
from operations.errors import HiveError
from operations.hosts import HiveInfo
from wire.addresses import on_loopback

ONLINE_S = 10.0
POLL_S = 0.05
LOUD = ("WARNING", "ERROR", "CRITICAL")


def declare(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("up", rich_help_panel=PANEL)(up)


def up(
    ctx: typer.Context,
    queen_port: Annotated[
        int, typer.Option(metavar="PORT", help="0 takes any free one.")
    ] = ports.QUEEN,
    agent_port: Annotated[
        int, typer.Option(metavar="PORT", help="0 takes any free one.")
    ] = ports.HIVE,
    host: Host = None,
    hive_id: HiveId = None,
    processes: Processes = None,
    database: Database = None,
    state_dir: StateDir = None,
    drain_seconds: DrainSeconds = None,
    log_level: LogLevel = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    interface: Interface = None,
    logs: Annotated[
        bool, typer.Option("--logs", metavar="", help="Show the daemons' logs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Start a queen and an agent on this machine; Ctrl-C stops both."""
    out = Output(as_json or given(ctx).as_json)
    common = options(
        host=host,
        state_dir=state_dir and state_dir.absolute(),
        drain_seconds=drain_seconds,
        log_level=log_level,
        tls_cert=tls_cert and tls_cert.absolute(),
        tls_key=tls_key and tls_key.absolute(),
    )
    common += [f"--interface={name}" for name in interface or ()]
    queen = options(port=queen_port, processes=processes, database=database)
    agent = options(port=agent_port, hive_id=hive_id)
    with endings():
        asyncio.run(_up(out, ["queen", *queen, *common], ["agent", *agent, *common], logs=logs))


async def _up(out: Output, queen: Sequence[str], agent: Sequence[str], *, logs: bool) -> None:
    def heard(name: str, line: str) -> None:
        if logs or is_loud(line):
            out.note(f"{name:5} | {line}", style="dim" if logs else "yellow")

    with interrupts() as signals:
        try:
            async with pair(queen, agent, environment(), signals, heard=heard) as (first, second):
                hive = await online(first.url, second.id)
                _announce(out, first, hive)
                ended = await _first_to_end(first, second)
                if ended.process.returncode != 0:
                    raise ended.died()
                out.note(f"The {ended.name} was asked to stop; stopping the rest.")
        except asyncio.CancelledError:
            if not signals.count:
                raise
    out.note("Stopped.")


@asynccontextmanager
async def pair(
    queen: Sequence[str],
    agent: Sequence[str],
    env: dict[str, str],
    signals: Interrupts,
    **how: Any,
) -> AsyncIterator[tuple[Child, Child]]:
    """A queen, and an agent that joins it; both listen. The agent stops first."""
    async with running("queen", queen, env=env, port_flag="--queen-port", **how) as first:
        signals.children.append(first)
        joined = [*agent, *options(queen_url=first.url)]
        async with running("agent", joined, env=env, port_flag="--agent-port", **how) as second:
            signals.children.append(second)
            yield first, second


async def online(queen_url: str, hive_id: str) -> HiveInfo:
    """Wait until the queen hears from the hive.

    :raises HiveError: it does not within 10 s
    """
    from keeper import connect

    loop = asyncio.get_running_loop()
    deadline = loop.time() + ONLINE_S
    async with connect.client(queen_url) as queen:
        while True:
            answer = await queen.get("/v1/hives")
            for hive in each(HiveInfo, answer, "hives"):
                if hive.hive_id == hive_id and hive.state == "online":
                    return hive
            if loop.time() > deadline:
                raise HiveError(
                    f"The queen does not hear from the hive '{hive_id}'. Start again with --logs "
                    "to see why.",
                    code="cannot_start",
                )
            await asyncio.sleep(POLL_S)


def options(**values: object) -> list[str]:
    """``queen_url="x"`` as ``--queen-url=x``; what is None is left out."""
    return [
        f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None
    ]


def is_loud(line: str) -> bool:
    """Whether a line of a daemon's log is a warning or worse."""
    return any(word in LOUD for word in line.split(maxsplit=2)[1:2])


def describe_devices(hive: HiveInfo) -> str:
    """``cuda:0 NVIDIA H200 (139.8 GB), cpu 16 cores``."""
    return ", ".join(
        f"{device.id} {device.name} ({words.memory(device.vram_total_mb)})"
        for device in hive.devices
    )


async def _first_to_end(*children: Child) -> Child:
    ends = {asyncio.ensure_future(child.ended()): child for child in children}
    done, pending = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in pending:
        end.cancel()
    return ends[done.pop()]


def _announce(out: Output, queen: Child, hive: HiveInfo) -> None:
    if out.as_json:
        out.json_line(
            {
                "queen": {"id": queen.id, "url": queen.url},
                "hive": {"id": hive.hive_id, "url": hive.hive_url},
            }
        )
        return
    out.fields(
        Fields(
            [
                ("queen", queen.url),
                ("hive", f"{hive.hive_id} at {hive.hive_url}"),
                ("devices", describe_devices(hive)),
                ("OpenAI", f"{_seen_from_outside(queen.url, hive.hive_url)}/v1"),
            ]
        )
    )
    out.say("")
    out.say("In another terminal:")
    if not queen.url.endswith(f":{ports.QUEEN}"):
        out.say(f"  export HIVE_QUEEN_URL={queen.url}")
    for line in (*NEXT, *(() if on_loopback(hive.hive_url) else OPEN)):
        out.say(f"  {line}")
    out.say("")
    out.say("Ctrl-C stops both.")


def _seen_from_outside(queen_url: str, hive_url: str) -> str:
    """The queen's URL at the address under which her own machine's hive is known to her."""
    if on_loopback(hive_url):
        return queen_url
    queen, hive = urlsplit(queen_url), urlsplit(hive_url)
    host = f"[{hive.hostname}]" if ":" in (hive.hostname or "") else hive.hostname
    return f"{queen.scheme}://{host}:{queen.port}"


NEXT = (
    "hive workers spawn hive-tiny",
    'hive infer hive-tiny "What is Hive?"',
    "hive models pull Qwen/Qwen3-0.6B-GGUF:Q8_0",
    "hive status",
)
OPEN = ("hive keys new NAME",)
"""What else there is to do where others are to call."""
