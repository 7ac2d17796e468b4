"""An ``infer`` on this hive: the engine's OpenAI stream becomes the events of a job."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import aiohttp
import msgspec

from hive_agent.workers.base import BaseWorker
from hive_agent.workers.pool import Wanted, WorkerPool
from operations.errors import InvalidRequest, WorkerBroke, from_envelope
from operations.events import End, Reasoning, Started, Token
from operations.operations import Infer
from wire import sse
from wire.jobs import Job
from wire.metrics import Metrics
from wire.relayed import engine_is_dead, redirects, unless_about_the_key
from wire.retry import NoAnswer, head, until_answered


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct):
    delta: Delta = msgspec.field(default_factory=Delta)
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    """What is read of a ``chat.completion.chunk``; the engine's other fields are skipped."""

    choices: list[Choice] = []
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


_CHUNK = msgspec.json.Decoder(Chunk)


def request_body(operation: Infer, served_name: str) -> dict[str, Any]:
    """The operation as an OpenAI chat request; what the caller left out, the engine decides."""
    sampling = {
        "max_tokens": operation.max_tokens,
        "temperature": operation.temperature,
        "top_p": operation.top_p,
        "top_k": operation.top_k,
        "stop": operation.stop,
        "seed": operation.seed,
    }
    return {
        "model": served_name,
        "messages": operation.chat(),
        "stream": True,
        "stream_options": {"include_usage": True},
        **{name: value for name, value in sampling.items() if value is not None},
    }


async def infer(
    job: Job, operation: Infer, wanted: Wanted, pool: WorkerPool, metrics: Metrics
) -> End:
    """Run one ``infer`` on a worker of this hive, writing its events to the job.

    :raises Unavailable: no worker came up
    :raises InvalidRequest: the engine refused the request
    :raises WorkerBroke: the engine died before the answer was whole
    """
    asked = time.monotonic()
    name, again = "The worker", ""
    failed: set[str] = set()

    async def attempt() -> End:
        nonlocal name, again
        async with pool.lease(replace(wanted, avoid=frozenset(failed))) as worker:
            name = f"Worker {worker.spec.worker_id}"
            again = "" if worker.url else "It is being started again. "
            failed.add(worker.spec.worker_id)
            end = await _stream(job, operation, worker, pool.hive_id, asked)
            metrics.tokens(worker.spec.model.id, end.tokens_out)
            return end

    try:
        return await until_answered(attempt)
    except (aiohttp.ClientError, TimeoutError, OSError):
        raise WorkerBroke(
            f"{name} on {pool.hive_id} died before the answer was whole. {again}Send the request "
            "again.",
            hop="worker",
        ) from None


async def _stream(
    job: Job, operation: Infer, worker: BaseWorker, hive_id: str, asked: float
) -> End:
    name = f"worker {worker.spec.worker_id}"
    body = request_body(operation, worker.name_for(operation.model) or worker.spec.model.id)
    url = f"{worker.base_url}/v1/chat/completions"
    async with await head(worker.http, "POST", url, json=body) as answer:
        if 300 <= answer.status < 400:
            raise redirects(answer.status, "worker", name)
        if answer.status != 200:
            payload = await _json_or_none(answer)
            error = from_envelope(answer.status, payload, hop="worker", where=name)
            if error.status >= 500 and engine_is_dead(error.message):
                raise NoAnswer(f"The {name} broke.")
            raise unless_about_the_key(error, name)
        started = Started(
            job_id=job.id,
            model=worker.spec.model.id,
            hive_id=hive_id,
            worker_id=worker.spec.worker_id,
            started_at=time.time(),
        )
        job.emit(started.line())
        text: list[str] = []
        thoughts = 0
        usage: dict[str, Any] = {}
        stop_reason: str | None = None
        first: float | None = None
        async for event in sse.decode(answer.content.iter_any()):
            if event.data == "[DONE]":
                break
            chunk = _decoded(event.data, name)
            usage = chunk.usage or usage
            for choice in chunk.choices:
                stop_reason = choice.finish_reason or stop_reason
                thought = choice.delta.reasoning_content or choice.delta.reasoning
                said = choice.delta.content
                if (thought or said) and first is None:
                    first = time.monotonic()
                if thought and operation.stream:
                    job.emit(Reasoning(t=thought, i=thoughts).line())
                    thoughts += 1
                if said:
                    if operation.stream:
                        job.emit(Token(t=said, i=len(text)).line())
                    text.append(said)
    if stop_reason is None:
        raise WorkerBroke(
            f"The {name} ended its answer without a reason. Send the request again.", hop="worker"
        )
    now = time.monotonic()
    return End(
        text="".join(text),
        tokens_out=int(usage.get("completion_tokens") or len(text)),
        decode_time_ms=int((now - (first or now)) * 1000),
        ttft_ms=int(((first or now) - asked) * 1000),
        stop_reason=stop_reason,
        usage=usage,
    )


def _decoded(data: str, name: str) -> Chunk:
    try:
        chunk = _CHUNK.decode(data)
    except msgspec.DecodeError:
        raise WorkerBroke(f"The {name} sent an event that is no chat chunk.") from None
    if chunk.error is not None:
        status = chunk.error.get("code")
        kind = InvalidRequest if isinstance(status, int) and 400 <= status < 500 else WorkerBroke
        raise kind(str(chunk.error.get("message") or "the engine failed"), hop="worker")
    return chunk


async def _json_or_none(answer: aiohttp.ClientResponse) -> Any:
    try:
        async with asyncio.timeout(10):
            return msgspec.json.decode(await answer.read())
    except (msgspec.DecodeError, TimeoutError):
        return None
