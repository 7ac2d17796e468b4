"""The clients that people have, through the queen: the official ones of Python and Node, LangChain.

The bodies are recorded in the client, as it writes and reads them, and compared byte for byte with
those of the engine: the scripted engine gives back what it was asked, and its answers are known.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import aiohttp
import openai
import pytest
from filelock import FileLock
from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict, Field

from tests.cluster import served, spawn_scripted
from tests.conftest import Room
from wire.keys import Keys

CLIENTS = Path(__file__).parent / "clients"
INSTALL_S = 90
NODE_S = 30

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
AWKWARD = [
    {"role": "system", "content": 'Say "yes"\\no\r\n\ttwice \u0000 \u2028 </script>'},
    {"role": "user", "content": "Zürich, 東京, 🐝🏳️‍🌈, e\u0301, \ufeff, 1e400, \\u0041"},
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells today's weather.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Zürich"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CHOICE = {"type": "function", "function": {"name": "weather"}}
TOLD = [
    *FRANCE,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Zürich"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": '{"sky":"föhn"}'},
]

# Spelt as no serializer would, so that whoever writes it anew is found out.
RAW_ANSWER = """\
{ "id":"chatcmpl-7", "object" : "chat.completion","created":1e9, "model":"smith", "choices":[ {
"finish_reason":"tool_calls", "index":0, "message":{"content":null,"role":"assistant","tool_calls":
[{"id":"call_1","type":"function","function":{"name":"weather",
  "arguments":"{\\"city\\": \\"Paris\\"}"}},
 {"id":"call_2","type":"function","function":{
  "arguments":"{\\"city\\":\\"Z\\\\u00fcrich\\"}","name":"weather"}}
]}}],   "x_engine":{"rate":1.50,"\\u0061":"föhn 🐝"}
}

"""
_CHUNK = '"id":"chatcmpl-8","object":"chat.completion.chunk","created":1,"model":"smith"'
_CALL = '{"index":%d,"id":"call_%d","type":"function","function":{"name":"weather","arguments":""}}'
_MORE = '{"index":%d,"function":{"arguments":"%s"}}'


def _chunk(delta: str, reason: str = "null") -> str:
    choice = f'{{ "index":0, "delta":{delta},"finish_reason":{reason}}}'
    return f'data: {{{_CHUNK}, "choices":[{choice}],"x_rate":1.50}}\n\n'


_STREAM = "".join(
    [
        ": a word to keep the connection open\n\n",
        _chunk('{"role":"assistant","content":null}'),
        _chunk(f'{{"tool_calls":[{_CALL % (0, 1)}]}}'),
        _chunk('{"tool_calls":[%s]}' % (_MORE % (0, '{\\"city\\": '))),
        _chunk('{"tool_calls":[%s]}' % (_MORE % (0, '\\"Paris\\"}'))),
        _chunk(f'{{"tool_calls":[{_CALL % (1, 2)}]}}'),
        _chunk('{"tool_calls":[%s]}' % (_MORE % (1, '{\\"city\\":\\"Z\\u00fcrich\\"}'))),
        _chunk("{}", '"tool_calls"'),
        "data: [DONE]\n\n",
    ]
)
RAW_EVENTS = [_STREAM[i : i + 97] for i in range(0, len(_STREAM), 97)]  # cut where no event ends

WHAT_DIFFERS = re.compile(rb'(?<="id":)"[^"]*"|(?<="created":)\d+|(?<="timings":)\{[^{}]*\}')
"""What two answers of llama.cpp to one request may not share."""


class City(BaseModel):
    """A JSON schema, and who checks what came of it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(max_length=12)
    size: Literal["small", "large"]
    rivers: int = Field(ge=0, le=9)


PARIS = City(name="Paris", size="large", rivers=1)
SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "city", "strict": True, "schema": City.model_json_schema()},
}

REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {"messages": FRANCE},
    "awkward": {"messages": AWKWARD, "stop": ["\n", "🐝"], "temperature": 0.1, "seed": 2**53 - 1},
    "tools": {"messages": FRANCE, "tools": [WEATHER], "tool_choice": CHOICE},
    "tool result": {"messages": TOLD, "tools": [WEATHER]},
    "schema": {"messages": FRANCE, "response_format": SCHEMA},
}


@dataclass(frozen=True)
class Exchange:
    """One request and its answer as a client had them.

    :param asked: the request's body, as the client wrote it
    :param heard: the answer's body, as the client read it
    :param calls: the tools that the client says are to be called, with their arguments
    :param pieces: in how many parts the text came; 0 for a whole answer
    """

    asked: bytes
    heard: bytes
    text: str
    calls: list[tuple[str, dict[str, Any]]]
    pieces: int


Ask = Callable[..., Awaitable[Exchange]]
"""Sends chat parameters by one of the clients."""


@dataclass
class Tape:
    """Records the bodies that pass through a Python client."""

    asked: bytes = b""
    heard: list[bytes] = field(default_factory=list)

    def http(self) -> openai.DefaultAsyncHttpxClient:
        hooks = {"request": [self._request], "response": [self._response]}
        return openai.DefaultAsyncHttpxClient(event_hooks=hooks)

    async def _request(self, request: Any) -> None:
        self.asked = request.content

    async def _response(self, response: Any) -> None:
        read = response.aiter_raw

        async def recorded(*args: Any) -> AsyncIterator[bytes]:
            async with aclosing(read(*args)) as chunks:
                async for chunk in chunks:
                    self.heard.append(chunk)
                    yield chunk

        response.aiter_raw = recorded

    def exchange(
        self, text: str | None, calls: list[tuple[str, dict[str, Any]]], pieces: int
    ) -> Exchange:
        return Exchange(self.asked, b"".join(self.heard), text or "", calls, pieces)


async def by_python(url: str, key: str, *, stream: bool = False, **params: Any) -> Exchange:
    tape, pieces = Tape(), 0
    async with AsyncOpenAI(
        base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=tape.http()
    ) as client:
        if stream:
            async with client.chat.completions.stream(**params) as events:
                async for event in events:
                    pieces += event.type == "content.delta"
                completion = await events.get_final_completion()
        else:
            completion = await client.chat.completions.create(**params)
    message = completion.choices[0].message
    called = [call.function for call in message.tool_calls or []]
    calls = [(function.name, json.loads(function.arguments)) for function in called]
    return tape.exchange(message.content, calls, pieces)


async def by_langchain(
    url: str, key: str, *, model: str, messages: Any, stream: bool = False, **params: Any
) -> Exchange:
    from langchain_openai import ChatOpenAI

    tape = Tape()
    async with tape.http() as http:
        chat = ChatOpenAI(
            model=model, base_url=f"{url}/v1", api_key=key, max_retries=0, http_async_client=http
        )
        asking = chat.bind(**params)
        if stream:
            parts = [part async for part in asking.astream(messages)]
            answer = parts[0]
            for part in parts[1:]:
                answer += part
        else:
            parts, answer = [], await asking.ainvoke(messages)
    calls = [(call["name"], call["args"]) for call in answer.tool_calls]
    return tape.exchange(answer.content, calls, sum(bool(part.content) for part in parts))


async def by_node(folder: Path, url: str, key: str, **params: Any) -> Exchange:
    process = await asyncio.create_subprocess_exec(
        *("node", "ask.mjs"),
        cwd=folder,
        env={**os.environ, "BASE_URL": f"{url}/v1", "API_KEY": key},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(NODE_S):
            out, err = await process.communicate(json.dumps(params).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    said = json.loads(out)
    return Exchange(
        asked=base64.b64decode(said["asked"]),
        heard=base64.b64decode(said["heard"]),
        text=said["text"],
        calls=[(name, arguments) for name, arguments in said["calls"]],
        pieces=said["pieces"],
    )


@pytest.fixture(scope="session")
def api_key(room: Room) -> str:
    return Keys(room.secret).make(scopes=("infer",))[0]


@pytest.fixture(scope="session")
def node_folder(request: pytest.FixtureRequest) -> Path:
    """A folder with the Node client installed, kept between runs."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not both here; the Node client is tested where they are")
    folder = Path(request.config.cache.mkdir("node-client"))
    with FileLock(folder / "lock"):
        installed = folder / "installed.json"
        wanted = (CLIENTS / "package.json").read_text()
        if not installed.exists() or installed.read_text() != wanted:
            shutil.copy(CLIENTS / "package.json", folder)
            _npm_install(folder)
            installed.write_text(wanted)
        shutil.copy(CLIENTS / "ask.mjs", folder)
    return folder


def _npm_install(folder: Path) -> None:
    quiet = ("--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts")
    try:
        ran = subprocess.run(
            ["npm", "install", "--fetch-retries=1", *quiet],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=INSTALL_S,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm install took over {INSTALL_S} s; the Node client is not tested")
    if ran.returncode != 0:
        said = next((s for s in ran.stderr.splitlines() if s.startswith("npm error")), "npm error")
        pytest.skip(f"npm install failed ({said}); the Node client is not tested")


@pytest.fixture(params=["python", "node", "langchain"])
def ask(request: pytest.FixtureRequest, room: Room, api_key: str) -> Ask:
    """Each client in turn, at the queen."""
    match request.param:
        case "node":
            return partial(by_node, request.getfixturevalue("node_folder"), room.queen.url, api_key)
        case "langchain":
            pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
            return partial(by_langchain, room.queen.url, api_key)
    return partial(by_python, room.queen.url, api_key)


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@asynccontextmanager
async def scripted(room: Room, model: str, **script: Any) -> AsyncIterator[dict[str, Any]]:
    worker = await spawn_scripted(room.hive, model, **script)
    await served(room.queen.client, model)
    yield worker
    await room.hive.client.run(
        {"operation": "worker_process_delete", "worker_id": worker["worker_id"]}
    )


@pytest.fixture(scope="session")
async def clerk(room: Room) -> AsyncIterator[dict[str, Any]]:
    """A worker whose answers suit every request; even the schema, which new clients check."""
    async with scripted(room, "clerk", answer=PARIS.model_dump_json()) as worker:
        yield worker


@pytest.fixture(scope="session")
async def smith(room: Room) -> AsyncIterator[str]:
    """A model whose every answer is ``RAW_ANSWER`` or, streamed, ``RAW_EVENTS``."""
    raw = {"raw_answer": RAW_ANSWER, "raw_events": RAW_EVENTS}
    async with scripted(room, "smith", **raw, tokens_per_second=200):
        yield "smith"


def at_engine(worker: Mapping[str, object]) -> aiohttp.ClientSession:
    """A session with the engine itself, past queen and hive."""
    return aiohttp.ClientSession(
        "http://engine", connector=aiohttp.UnixConnector(str(worker["socket"]))
    )


async def last_request(worker: Mapping[str, object]) -> bytes:
    """The last body that came to a scripted engine."""
    async with at_engine(worker) as http, http.get("/last_request") as answer:
        assert answer.status == 200
        return await answer.read()


# -- untouched ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REQUESTS)
async def test_a_request_reaches_the_engine_byte_for_byte(
    ask: Ask, clerk: dict[str, Any], case: str, stream: bool
) -> None:
    exchange = await ask(model="clerk", stream=stream, **REQUESTS[case])
    arrived = await last_request(clerk)
    assert arrived == exchange.asked
    said = json.loads(arrived)
    assert bool(said.get("stream")) == stream
    assert {name: said[name] for name in REQUESTS[case]} == REQUESTS[case]


@pytest.mark.parametrize(
    "body",
    [
        b'\n{ "model" :"parrot" ,"messages":[{"role":"user","content":"\\ud83d\\udc1d"}]\t}\r\n ',
        b'{"x":1.50,"x":1e3,"":null,"model":"Parrot","messages":[],"y":[1E-7,-0,12345678901234567890]}',
        '{"messages":[{"content":"🐝","role":"user","name":null}],"mod\\u0065l":"parrot"}'.encode(),
        b'{"model":"parrot","prompt":"%s"}' % (b"so much to say " * 100_000),
    ],
    ids=["spaces and escapes", "odd numbers", "an escaped key", "1.5 MB"],
)
async def test_nobody_on_the_way_writes_a_body_anew(room: Room, api_key: str, body: bytes) -> None:
    headers = {"content-type": "application/json", "authorization": f"Bearer {api_key}"}
    path = "/v1/completions" if b"prompt" in body else "/v1/chat/completions"
    async with aiohttp.ClientSession(room.queen.url) as http:
        async with http.post(path, data=io.BytesIO(body), headers=headers) as answer:
            assert answer.status == 200, await answer.text()
    assert await last_request(room.parrot) == body


async def test_an_answer_reaches_the_client_byte_for_byte(
    ask: Ask, smith: str, stream: bool
) -> None:
    exchange = await ask(model=smith, stream=stream, **REQUESTS["tools"])
    sent = "".join(RAW_EVENTS) if stream else RAW_ANSWER
    assert exchange.heard == sent.encode()


async def test_llama_cpp_is_heard_through_the_queen_as_on_its_own_socket(
    ask: Ask, room: Room, stream: bool
) -> None:
    async def both() -> tuple[bytes, bytes]:
        exchange = await ask(model="hive-tiny", stream=stream, messages=FRANCE, temperature=0)
        headers = {"content-type": "application/json"}
        async with at_engine(room.tiny) as http:
            async with http.post(
                "/v1/chat/completions", data=exchange.asked, headers=headers
            ) as answer:
                assert answer.status == 200
                return exchange.heard, await answer.read()

    await both()  # from now on the prompt is cached, and answers say so alike
    through, straight = await both()
    assert WHAT_DIFFERS.sub(b"", through) == WHAT_DIFFERS.sub(b"", straight)


# -- understood --------------------------------------------------------------------------------


async def test_a_question_is_answered(ask: Ask, stream: bool) -> None:
    exchange = await ask(model="hive-tiny", stream=stream, messages=FRANCE, temperature=0)
    assert "Paris" in exchange.text
    assert (exchange.pieces > 1) == stream


async def test_tool_calls_are_understood(ask: Ask, smith: str, stream: bool) -> None:
    exchange = await ask(model=smith, stream=stream, **REQUESTS["tools"])
    assert exchange.calls == [("weather", {"city": "Paris"}), ("weather", {"city": "Zürich"})]
    assert exchange.text == ""


async def test_an_answer_keeps_to_the_json_schema(ask: Ask, stream: bool) -> None:
    exchange = await ask(
        model="hive-tiny", stream=stream, messages=FRANCE, response_format=SCHEMA, max_tokens=100
    )
    City.model_validate_json(exchange.text)


async def test_langchain_turns_an_answer_into_an_object(room: Room, api_key: str) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    async with Tape().http() as http:
        chat = langchain.ChatOpenAI(
            model="hive-tiny",
            base_url=f"{room.queen.url}/v1",
            api_key=api_key,
            max_retries=0,
            http_async_client=http,
            max_tokens=100,
        )
        found = await chat.with_structured_output(City, method="json_schema").ainvoke(FRANCE)
    assert isinstance(found, City)
