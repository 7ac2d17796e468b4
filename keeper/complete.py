"""What the shell completes: names that the daemon knows. Asked briefly; silent if it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from job_client.client import JobClient

PATIENCE_S = 1.5


def models(ctx: typer.Context, incomplete: str) -> list[str]:
    """Models on disk, and what is loaded."""
    return _starting(incomplete, _ask(ctx, "model_list", "models", "id"))


def workers(ctx: typer.Context, incomplete: str) -> list[str]:
    return _starting(incomplete, _ask(ctx, "worker_process_list", "workers", "worker_id"))


def engines(ctx: typer.Context, incomplete: str) -> list[str]:
    """Engines that are there."""
    return _starting(incomplete, _ask(ctx, "engine_list", "engines", "engine"))


def recipes(incomplete: str) -> list[str]:
    """Engines that can be installed."""
    from hive_agent.engines.recipes import RECIPES

    return _starting(incomplete, (recipe.name for recipe in RECIPES))


def hives(ctx: typer.Context, incomplete: str) -> list[str]:
    return _starting(incomplete, _ask(ctx, "/v1/hives", "hives", "hive_id", straight=False))


def jobs(ctx: typer.Context, incomplete: str) -> list[str]:
    return _starting(incomplete, _ask(ctx, "/v1/jobs", "jobs", "job_id"))


def tasks(ctx: typer.Context, incomplete: str) -> list[str]:
    return _starting(incomplete, _ask(ctx, "/v1/tasks", "tasks", "id"))


def running_jobs(ctx: typer.Context, incomplete: str) -> list[str]:
    def runs(job: dict[str, Any]) -> bool:
        return job.get("status") in ("queued", "running")

    return _starting(incomplete, _ask(ctx, "/v1/jobs", "jobs", "job_id", runs))


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    lower = incomplete.lower()
    fit = (name for name in names if name.isprintable() and name.lower().startswith(lower))
    return sorted(set(fit))


def _ask(
    ctx: typer.Context,
    question: str,
    among: str,
    key: str,
    keep: Callable[[dict[str, Any]], bool] = lambda found: True,
    *,
    straight: bool = True,
) -> list[str]:
    """Names out of a daemon's answer to a path or an operation; none if anything goes wrong."""
    options = {**((ctx.parent and ctx.parent.params) or {}), **ctx.params}
    hive = options.get("hive") if straight else None

    async def ask(client: JobClient) -> Any:
        if question.startswith("/"):
            return await client.get(question, timeout_s=PATIENCE_S)
        return await client.run({"operation": question})

    async def converse() -> Any:
        from keeper import connect

        async with asyncio.timeout(PATIENCE_S):
            daemon = await connect.connect(options.get("url"), hive)
            async with connect.client(daemon.url) as client:
                return await ask(client)

    try:
        answer = asyncio.run(converse())
        return [str(found[key]) for found in answer[among] if keep(found)]
    except Exception:  # noqa: BLE001  a shell that completes must never see an error; it completes nothing
        return []
