"""An OpenAI-compatible server as others run it: a process with a key, a port and moods of its own.

``python -m tests.foreign_server '{"models": ["Llama3:latest"]}'`` listens until its standard input
closes, and prints its port. Unlike Hive's own engines it answers only to names that it knows.
``POST /mood`` changes it, ``GET /seen`` tells what came.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import (
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

WORDS = ["It", " is", " answered", " elsewhere", "."]


class Server:
    """Its routes. ``mood`` is what it was started with, and what it was told since."""

    def __init__(self, mood: dict[str, Any]) -> None:
        self.mood: dict[str, Any] = {
            "models": ["Llama3:latest"],
            "owned_by": "library",
            "key": None,
            "health": None,  # a status; None is no such route
            "load": None,  # requests of others, as the metrics tell it
            "pace_s": 0.0,  # between tokens
            "times": 1,  # how often it says its words
            "padding": 0,  # bytes that each word is longer
            "redirect": None,  # where everybody who asks something is sent
            **mood,
        }
        self.bodies: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.queries: list[str] = []
        self.asked: list[str] = []
        self.answering = 0
        self.hung_up = 0

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/mood", self.change, methods=["POST"]),
                Route("/seen", self.seen),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/embeddings", self.embed, methods=["POST"]),
            ]
        )

    async def change(self, request: Request) -> Response:
        self.mood |= await request.json()
        return JSONResponse(self.mood)

    async def seen(self, request: Request) -> Response:
        told = {"bodies": self.bodies, "headers": self.headers, "queries": self.queries}
        told |= {"asked": self.asked}
        return JSONResponse({**told, "answering": self.answering, "hung_up": self.hung_up})

    async def health(self, request: Request) -> Response:
        self.asked.append("/health")
        return Response(status_code=self.mood["health"] or 404)

    async def metrics(self, request: Request) -> Response:
        self.asked.append("/metrics")
        if self.mood["load"] is None:
            return Response(status_code=404)
        running = self.mood["load"] + self.answering
        return PlainTextResponse(
            "# TYPE vllm:num_requests_running gauge\n"
            f'vllm:num_requests_running{{engine="0",model_name="m"}} {running}.0\n'
            'vllm:num_requests_waiting{engine="0",model_name="m"} 0.0\n'
        )

    async def models(self, request: Request) -> Response:
        self.asked.append("/v1/models")
        if refused := self._refused(request):
            return refused
        owner = self.mood["owned_by"]
        data = [{"id": name, "object": "model", "owned_by": owner} for name in self.mood["models"]]
        return JSONResponse({"object": "list", "data": data})

    async def chat(self, request: Request) -> Response:
        body = await self._taken(request)
        if isinstance(body, Response):
            return body
        if not body.get("stream"):
            text = "".join([word async for word in self._words(request)])
            choice = {"index": 0, "message": {"role": "assistant", "content": text}}
            usage = {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}
            whole = {"model": body["model"], "choices": [{**choice, "finish_reason": "stop"}]}
            answer = JSONResponse({**whole, "usage": usage})
            answer.set_cookie("caller", "one")
            answer.headers.update({"x-hive-id": "another", "x-worker-id": "w-another"})
            return answer
        return StreamingResponse(self._events(request), media_type="text/event-stream")

    async def embed(self, request: Request) -> Response:
        body = await self._taken(request)
        if isinstance(body, Response):
            return body
        data = [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}]
        return JSONResponse({"object": "list", "model": body["model"], "data": data})

    async def _taken(self, request: Request) -> dict[str, Any] | Response:
        raw = await request.body()
        self.bodies.append(raw.decode())
        self.headers.append(dict(request.headers))
        self.queries.append(request.url.query)
        if (place := self.mood["redirect"]) is not None:
            return RedirectResponse(place, 307, {"x-secret-place": "yes"})
        if refused := self._refused(request):
            return refused
        body: dict[str, Any] = json.loads(raw)
        if body["model"] not in self.mood["models"]:
            message = f"The model `{body['model']}` does not exist."
            return JSONResponse({"error": {"message": message}}, 404)
        return body

    def _refused(self, request: Request) -> Response | None:
        key = self.mood["key"]
        if key is None or request.headers.get("authorization") == f"Bearer {key}":
            return None
        given = request.headers.get("authorization")
        message = f"Incorrect API key provided: {given}."
        return JSONResponse({"error": {"message": message, "code": "invalid_api_key"}}, 401)

    async def _words(self, request: Request) -> AsyncIterator[str]:
        """The words of an answer at its pace, for as long as somebody listens."""
        self.answering += 1
        try:
            for word in WORDS * self.mood["times"]:
                if await request.is_disconnected():
                    self.hung_up += 1
                    return
                yield word + "x" * self.mood["padding"]
                await asyncio.sleep(self.mood["pace_s"])
        except (asyncio.CancelledError, GeneratorExit):
            self.hung_up += 1
            raise
        finally:
            self.answering -= 1

    async def _events(self, request: Request) -> AsyncIterator[str]:
        async with contextlib.aclosing(self._words(request)) as words:  # type: ignore[type-var]
            async for word in words:
                choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        yield f"data: {json.dumps(end)}\n\ndata: [DONE]\n\n"


def main() -> None:
    mood = json.loads(sys.argv[1])
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", mood.pop("port", 0)))
    listening.listen()
    print(listening.getsockname()[1], flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    config = uvicorn.Config(Server(mood).app(), log_level="warning", ws="none", lifespan="off")
    asyncio.run(uvicorn.Server(config).serve([listening]))


if __name__ == "__main__":
    main()
