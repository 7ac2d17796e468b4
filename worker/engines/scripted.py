"""A scripted engine: a real worker process without a model, which behaves as it is told.

It serves the routes of the other engines, so that whatever stands before an engine (scheduling,
streaming, cancelling, restarting) can be tested, and shown, at any speed and with any failure.

An answer is the first entry of ``answers`` whose key stands in the last user message, else
``answer``, else as many words as ``max_tokens`` asks for. A token is a word with its space.

``GET /last_request`` gives back the body of the last request for an answer, byte for byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from worker.engines import arguments

SENTENCE = "the queen sends each question to the hive that knows and the answer flows back"
WORDS = SENTENCE.split(" ")
DEFAULT_TOKENS = 32
EMBEDDING_SIZE = 16


class Script(BaseModel):
    """What the engine does. Times are seconds, rates are tokens a second.

    :param raw_answer: the body of every answer that is asked for whole, as it is
    :param raw_events: the body of every streamed answer, as it is, sent piece by piece
    :param tokens_per_second: of each request; 0 is as fast as possible
    :param load_seconds: how long it takes to become healthy
    :param fail_load: do not start: say this and exit
    :param crash_after_tokens: kill -9 itself after so many tokens of a request
    :param hang_after_tokens: say nothing more after so many tokens of a request
    :param error_status: refuse every generation with this status and ``error_message``
    :param unhealthy: answer the health check with 503 once it has been ready
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    answer: str | None = None
    answers: dict[str, str] = Field(default_factory=dict)
    raw_answer: str | None = None
    raw_events: tuple[str, ...] | None = None
    tokens_per_second: float = Field(default=0, ge=0)
    first_token_seconds: float = Field(default=0, ge=0)
    load_seconds: float = Field(default=0, ge=0)
    fail_load: str | None = None
    crash_after_tokens: int | None = Field(default=None, ge=0)
    hang_after_tokens: int | None = Field(default=None, ge=0)
    error_status: int | None = Field(default=None, ge=400, le=599)
    error_message: str = "the script says so"
    unhealthy: bool = False


class Generation(BaseModel):
    """The fields of a request that the script obeys; others are accepted and ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    temperature: float | None = Field(default=None, ge=0)
    logprobs: bool = False


class Engine:
    """The routes, and what is counted about them."""

    def __init__(self, script: Script, served_name: str, slots: int) -> None:
        self.script = script
        self.served_name = served_name
        self.free = asyncio.Semaphore(slots)
        self.busy = 0
        self.generated = 0
        self.healthy_checks = 0
        self.last_request = b""

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/metrics", self.metrics),
                Route("/v1/models", self.models),
                Route("/last_request", self.last),
                Route("/v1/chat/completions", self.generate, methods=["POST"]),
                Route("/v1/completions", self.generate, methods=["POST"]),
                Route("/v1/embeddings", self.embed, methods=["POST"]),
                Route("/v1/rerank", self.rerank, methods=["POST"]),
            ]
        )

    async def health(self, request: Request) -> Response:
        self.healthy_checks += 1
        sick = self.script.unhealthy and self.healthy_checks > 1
        return JSONResponse({"status": "sick" if sick else "ok"}, 503 if sick else 200)

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(
            f"scripted:requests_processing {self.busy}\n"
            f"scripted:tokens_predicted_total {self.generated}\n"
        )

    async def models(self, request: Request) -> Response:
        model = {"id": self.served_name, "object": "model", "created": 0, "owned_by": "scripted"}
        return JSONResponse({"object": "list", "data": [model]})

    async def last(self, request: Request) -> Response:
        return Response(self.last_request, media_type="application/octet-stream")

    async def embed(self, request: Request) -> Response:
        self.last_request = await request.body()
        body = await request.json()
        if not isinstance(body, dict) or "input" not in body:
            return _error(400, "input: this field is missing")
        inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = [
            {"object": "embedding", "index": i, "embedding": embedding(str(text))}
            for i, text in enumerate(inputs)
        ]
        usage = {"prompt_tokens": len(inputs), "total_tokens": len(inputs)}
        return JSONResponse(
            {"object": "list", "model": self.served_name, "data": data, "usage": usage}
        )

    async def rerank(self, request: Request) -> Response:
        """Documents by how many of the query's words they hold."""
        self.last_request = await request.body()
        body = await request.json()
        if not isinstance(body, dict) or not isinstance(body.get("documents"), list):
            return _error(400, "documents: this field is missing")
        words = set(str(body.get("query", "")).split())
        scores = [float(len(words & set(str(text).split()))) for text in body["documents"]]
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        results = [{"index": index, "relevance_score": scores[index]} for index in order]
        return JSONResponse({"object": "list", "model": self.served_name, "results": results})

    async def generate(self, request: Request) -> Response:
        self.last_request = await request.body()
        try:
            asked = Generation.model_validate_json(self.last_request)
        except ValidationError as error:
            first = error.errors()[0]
            return _error(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        if (asked.messages is None) == (asked.prompt is None):
            return _error(400, "give either 'messages' or 'prompt'")
        if self.script.error_status is not None:
            return _error(self.script.error_status, self.script.error_message)
        chat = request.url.path.endswith("/chat/completions")
        return _Answer(self, asked, chat=chat)


class _Answer(Response):
    """One generation, streamed or whole; a caller that hangs up frees the slot at once."""

    def __init__(self, engine: Engine, asked: Generation, *, chat: bool) -> None:
        super().__init__()
        self._engine = engine
        self._asked = asked
        self._chat = chat
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        speaking = asyncio.create_task(self._speak(send))
        listening = asyncio.create_task(_hung_up(receive))
        await asyncio.wait((speaking, listening), return_when=asyncio.FIRST_COMPLETED)
        for task in (speaking, listening):
            task.cancel()
        await asyncio.gather(speaking, listening, return_exceptions=True)

    async def _speak(self, send: Send) -> None:
        engine = self._engine
        async with engine.free:
            engine.busy += 1
            try:
                raw = recorded(engine.script, self._asked)
                await (self._improvise(send) if raw is None else self._recite(raw, send))
            finally:
                engine.busy -= 1

    async def _improvise(self, send: Send) -> None:
        """An answer of the engine's own making."""
        engine, asked = self._engine, self._asked
        tokens, reason = plan(engine.script, asked)
        if asked.stream:
            await self._head(send)
            if self._chat:
                await self._event(send, self._choice({"role": "assistant"}, None))
        async for token in self._paced(tokens):
            if asked.stream:
                await self._event(send, self._choice(self._piece(token), None))
        usage = self._usage(len(tokens))
        if not asked.stream:
            whole = json.dumps(self._whole(tokens, reason, usage)).encode()
            await self._head(send)
            await send({"type": "http.response.body", "body": whole})
            return
        await self._event(send, self._choice({} if self._chat else "", reason))
        if (asked.stream_options or {}).get("include_usage"):
            await self._event(send, {**self._frame(), "choices": [], "usage": usage})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _recite(self, pieces: Sequence[str], send: Send) -> None:
        """An answer that the script holds ready."""
        await self._head(send)
        async for piece in self._paced(pieces):
            body = piece.encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _head(self, send: Send) -> None:
        kind = b"text/event-stream" if self._asked.stream else b"application/json"
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _paced(self, tokens: Sequence[str]) -> AsyncIterator[str]:
        """The tokens at the script's pace, with its misfortunes."""
        script = self._engine.script
        await asyncio.sleep(script.first_token_seconds)
        loop = asyncio.get_running_loop()
        began = loop.time()
        for count, token in enumerate(tokens):
            if script.crash_after_tokens == count:
                os.kill(os.getpid(), signal.SIGKILL)
            if script.hang_after_tokens == count:
                await asyncio.Event().wait()
            due = began + count / script.tokens_per_second if script.tokens_per_second else 0
            await asyncio.sleep(max(0, due - loop.time()))  # even 0 lets a hang-up be seen
            self._engine.generated += 1
            yield token

    def _piece(self, token: str) -> dict[str, str] | str:
        return {"content": token} if self._chat else token

    def _frame(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._engine.served_name,
        }

    def _choice(self, said: dict[str, str] | str, reason: str | None) -> dict[str, Any]:
        what = "delta" if self._chat else "text"
        return {**self._frame(), "choices": [{"index": 0, what: said, "finish_reason": reason}]}

    def _whole(self, tokens: list[str], reason: str, usage: dict[str, int]) -> dict[str, Any]:
        text = "".join(tokens)
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        )
        if self._asked.logprobs and self._chat:
            said["logprobs"] = {"content": [certain(token) for token in tokens]}
        kind = "chat.completion" if self._chat else "text_completion"
        choice = {"index": 0, **said, "finish_reason": reason}
        return {**self._frame(), "object": kind, "choices": [choice], "usage": usage}

    def _usage(self, generated: int) -> dict[str, int]:
        prompt = len(question(self._asked).split())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        }

    @staticmethod
    async def _event(send: Send, payload: dict[str, Any]) -> None:
        body = b"data: " + json.dumps(payload).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})


def recorded(script: Script, asked: Generation) -> Sequence[str] | None:
    """The pieces of the body that the script holds ready for this request, if it does."""
    if asked.stream:
        return script.raw_events
    return None if script.raw_answer is None else (script.raw_answer,)


def plan(script: Script, asked: Generation) -> tuple[list[str], str]:
    """The tokens of an answer, and why it ends: ``stop`` or ``length``."""
    said = question(asked)
    answer = next((text for key, text in script.answers.items() if key in said), script.answer)
    limit = asked.max_tokens
    if answer is None:
        tokens = list(_words(limit or DEFAULT_TOKENS))
        reason = "length" if limit else "stop"
    else:
        words = answer.split(" ")
        tokens = [word if i == 0 else f" {word}" for i, word in enumerate(words)]
        reason = "stop"
        if limit is not None and len(tokens) > limit:
            tokens, reason = tokens[:limit], "length"
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    whole = "".join(tokens)
    found = [whole.index(stop) for stop in stops if stop in whole]
    if not found:
        return tokens, reason
    kept: list[str] = []
    room = min(found)
    for token in tokens:
        if room <= 0:
            break
        kept.append(token[:room])
        room -= len(token)
    return kept, "stop"


def certain(token: str) -> dict[str, Any]:
    """The logprobs of a token that nothing else could have been."""
    one = {"token": token, "logprob": 0.0, "bytes": list(token.encode())}
    return {**one, "top_logprobs": [one]}


def question(asked: Generation) -> str:
    """The last user message, or the prompt."""
    if asked.prompt is not None:
        return asked.prompt
    spoken = [m.get("content") for m in asked.messages or [] if m.get("role") == "user"]
    return str(spoken[-1]) if spoken else ""


def embedding(text: str) -> list[float]:
    """A unit vector that depends on the text's bytes alone."""
    raw = [0.0] * EMBEDDING_SIZE
    for place, byte in enumerate(text.encode()):
        raw[place % EMBEDDING_SIZE] += byte / 255
    length = sum(x * x for x in raw) ** 0.5 or 1.0
    return [x / length for x in raw]


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal comes; 1 if the script says that loading fails, or makes no sense."""
    flags = arguments.parser("a scripted engine on a unix socket")
    flags.add_argument("--script", default="{}", help="its behaviour, as JSON")
    given = arguments.parse(flags, argv)
    try:
        script = Script.model_validate_json(given.script)
    except ValidationError as error:
        first = error.errors()[0]
        print(f"error: script: {'.'.join(map(str, first['loc']))}: {first['msg']}", file=sys.stderr)
        return 1
    time.sleep(script.load_seconds)
    if script.fail_load is not None:
        print(f"error: {script.fail_load}", file=sys.stderr)
        return 1
    asyncio.run(_serve(Engine(script, given.served_name, given.slots), str(given.socket)))
    return 0


async def _serve(engine: Engine, socket: str) -> None:
    config = uvicorn.Config(
        engine.app(), uds=socket, log_level="warning", access_log=False, ws="none", lifespan="off"
    )
    server = uvicorn.Server(config)
    with contextlib.suppress(KeyboardInterrupt):
        await server.serve()


def _words(count: int) -> Iterator[str]:
    for i in range(count):
        yield WORDS[0] if i == 0 else f" {WORDS[i % len(WORDS)]}"


def _error(status: int, message: str) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"code": status, "message": message, "type": kind}}, status)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


if __name__ == "__main__":
    sys.exit(main())
