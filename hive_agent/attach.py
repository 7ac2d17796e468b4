"""How a server that somebody else started becomes a worker: asked what it serves, and taken in."""

from __future__ import annotations

from typing import Any

from hive_agent.models.catalog import Catalog
from hive_agent.workers import external, foreign
from hive_agent.workers.pool import WorkerPool
from hive_agent.workers.spec import WorkerSpec
from operations.errors import Conflict, HiveError
from operations.hosts import ModelInfo
from operations.names import taken_by
from operations.operations import EngineModels, WorkerSpawn
from wire.jobs import Job, Runner


async def attach(operation: WorkerSpawn, pool: WorkerPool, catalog: Catalog) -> Runner:
    """Check a request for an external engine; the runner that attaches it.

    :raises HiveError: it does not answer, has no such model or wants another key; an option is
        for other engines; or the name is taken
    """
    external.check_options(operation.options)
    address = foreign.parse_address(operation.options.url or "")
    there = await _models(address, operation.options.api_key)
    served = foreign.find(operation.options.served_as or operation.model, there, str(address))
    spec = external.decide(operation, address, served, worker_id=pool.new_id())
    await _check_name(spec.model, pool, catalog)

    async def run(job: Job) -> Any:
        return await _attached(job, spec, pool)

    return run


async def look(operation: EngineModels) -> Runner:
    """Ask a server what it serves.

    :raises HiveError: it does not answer, wants another key, or is no OpenAI-compatible server
    """
    try:
        there = await _models(foreign.parse_address(operation.url), operation.api_key)
    except HiveError as error:
        if error.param is not None:  # named as an attachment has it
            error.param = error.param.removeprefix("options.")
        raise

    async def run(job: Job) -> Any:
        return {"models": [{"id": m.id, "context_length": m.context_length} for m in there]}

    return run


async def _models(address: foreign.Address, api_key: str | None) -> list[foreign.Served]:
    async with foreign.session(address, api_key) as http:
        return await foreign.models(http, address)


async def _check_name(model: ModelInfo, pool: WorkerPool, catalog: Catalog) -> None:
    """:raises Conflict: the name means another model here"""
    known = pool.answers_for() + [(m.id, m.digest) for m in await catalog.list()]
    if (other := taken_by(model.id, model.digest, known)) is not None:
        raise Conflict(
            f"'{model.id}' is a name of another model on {pool.hive_id}: {other}. Attach the "
            "server's under a name of its own (--as NAME, or 'model' beside 'served_as').",
            code="model_name_taken",
            param="model",
        )


async def _attached(job: Job, spec: WorkerSpec, pool: WorkerPool) -> Any:
    worker = pool.spawn(spec)
    job.info(f"Attaching {spec.options.served_as} at {worker.url} as worker {spec.worker_id}")
    await pool.came_up(worker)
    return worker.info()
