"""OpenAI-compatible servers that somebody else started: where they are, and what they tell.

Ollama, llama-server, vLLM and most others answer ``GET /v1/models``. Some have ``/health`` and some
Prometheus metrics; nothing else is expected of them.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp
import msgspec

from operations.errors import (
    Conflict,
    HiveError,
    InvalidRequest,
    NotFound,
    Unavailable,
    WorkerBroke,
)
from wire.addresses import url_at
from wire.door.lines import HttpLine
from wire.http1.client import Pool, tcp, unix

ANSWER_S = 5.0  # what a server gets for each question that is asked about it
ANSWER_LIMIT = 4 * 2**20  # bytes
LONGEST_SOCKET = 107  # bytes of a unix socket's path, see unix(7)
LONGEST_NAME = 1024
NAMED = 20  # models that a message lists
LONGEST_CONTEXT = 2**30  # tokens; what claims more is not believed
MOST_REQUESTS = 1_000_000  # that a server is believed to have
LATEST = ":latest"  # Ollama's name for a model without a tag
LOADS = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "llamacpp:requests_processing",
    "llamacpp:requests_deferred",
    "scripted:requests_processing",
}
"""The gauges of ``/metrics`` whose sum is the number of requests that a server has."""

_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)*/?")


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    :param base_url: what comes before ``/v1/…``
    :param socket: the unix socket on which it listens, if it does
    """

    base_url: str
    socket: str | None = None

    def __str__(self) -> str:
        return self.base_url if self.socket is None else f"unix:{self.socket}"


@dataclass(frozen=True)
class Served:
    """A model that a server lists; ``context_length`` in tokens, where it says so."""

    id: str
    context_length: int | None = None


def parse_address(url: str) -> Address:
    """Read ``http://host:port``, ``https://host/prefix`` or ``unix:/path``.

    A ``/v1`` at the end of a URL is dropped: the routes bring their own.

    :raises InvalidRequest: it is none of them, or says more
    """
    if not url.isprintable() or any(c.isspace() for c in url):
        raise _wrong("The URL holds spaces or characters that cannot be printed")
    if url.lower().startswith("unix:"):
        return _unix(url[5:])
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode()
    except (ValueError, UnicodeError):
        raise _wrong("The URL has no host or port that can be dialled") from None
    if parts.scheme not in ("http", "https"):
        raise _wrong("The URL begins with none of http:, https: and unix:")
    if "@" in parts.netloc:
        raise _wrong("The URL holds a name or password; a key goes into 'api_key'")
    if "?" in url or "#" in url:
        raise _wrong("The URL holds a query or a fragment")
    if not host or port == 0:
        raise _wrong("The URL has no host or port that can be dialled")
    path = parts.path.rstrip("/").removesuffix("/v1")
    if not _PREFIX.fullmatch(path) or {".", ".."} & set(path.split("/")):
        raise _wrong("The path of the URL is not plain")
    return Address(url_at(parts.scheme, host, port) + path)


def _unix(path: str) -> Address:
    path = path.removeprefix("//") if path.startswith("///") else path
    if not path.startswith("/") or path.startswith("//"):
        raise _wrong("The socket's path is not absolute")
    if len(path.encode()) > LONGEST_SOCKET:
        raise _wrong(f"The socket's path is longer than {LONGEST_SOCKET} bytes")
    return Address("http://localhost", path)


def _wrong(what: str) -> InvalidRequest:
    return InvalidRequest(
        f"{what}. Write http://host:port or unix:/path/to/socket.",
        code="invalid_url",
        param="options.url",
    )


# -- what it tells ---------------------------------------------------------------------------


class _Meta(msgspec.Struct):
    n_ctx: int | None = None


class _Model(msgspec.Struct):
    id: str
    owned_by: str | None = None
    max_model_len: int | None = None
    meta: _Meta | None = None

    def context_length(self) -> int | None:
        told = self.max_model_len or (self.meta.n_ctx if self.meta else None)
        return told if told is not None and 0 < told <= LONGEST_CONTEXT else None


class _Models(msgspec.Struct):
    data: list[_Model] | None = None


_MODELS = msgspec.json.Decoder(_Models)


def read_models(raw: bytes, where: str) -> list[Served]:
    """The models of an answer to ``GET /v1/models``, each once, in their order.

    vLLM tells its context as ``max_model_len``, llama.cpp as ``meta.n_ctx``.

    :raises WorkerBroke: it is no list of models
    :raises InvalidRequest: the server is a hive or a queen
    """
    try:
        told = _MODELS.decode(raw).data or []
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise WorkerBroke(
            f"{where} answers /v1/models with something else than a list of models. Is it an "
            "OpenAI-compatible server? Look at its URL.",
            code="engine_not_understood",
            retryable=False,
        ) from None
    if any(model.owned_by == "hive" for model in told):
        raise InvalidRequest(
            f"{where} is a Hive itself, and requests could run in circles. Hives find each other "
            "without being attached; 'hive queen --hive URL' names one that the LAN hides.",
            param="options.url",
        )
    models = {
        model.id: Served(model.id, model.context_length())
        for model in told
        if 0 < len(model.id) <= LONGEST_NAME and model.id.isprintable()
    }
    return list(models.values())


def find(name: str, there: Sequence[Served], where: str) -> Served:
    """The model that a server has under a name: exact, then in another case, then ``:latest``.

    :raises NotFound: it has none; lists those that it has
    :raises Conflict: several names differ from it in case alone
    """
    forms: tuple[Callable[[str], str], ...] = (str, str.lower, untagged)
    for form in forms:
        found = [model for model in there if form(model.id) == form(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise Conflict(
                f"{where} has more than one model '{name}': {names(found)}. Use one of these.",
                code="model_ambiguous",
                param="model",
            )
    raise NotFound(
        f"{where} has no model '{name}'. It has: {names(there)}. Name one of these, with "
        "'served_as' (--model) if it shall be called otherwise here.",
        code="model_not_found",
        param="model",
    )


def untagged(name: str) -> str:
    """A model's name in lower case, and without Ollama's ``:latest``."""
    return name.lower().removesuffix(LATEST)


def names(models: Sequence[Served]) -> str:
    """The first models by name, and how many more there are."""
    shown = ", ".join(model.id for model in models[:NAMED]) or "none"
    more = len(models) - NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def read_load(metrics: str) -> int:
    """How many requests a server has, running and waiting, as its Prometheus metrics tell it.

    Never more than :data:`MOST_REQUESTS`.
    """
    return min(MOST_REQUESTS, sum(_gauges(metrics.splitlines())))


def _gauges(lines: Iterable[str]) -> Iterable[int]:
    for line in lines:
        name, _, value = line.rpartition(" ")
        if name.partition("{")[0] in LOADS:
            try:
                yield max(0, int(float(value)))
            except (ValueError, OverflowError):
                continue


# -- asking it -------------------------------------------------------------------------------


def session(address: Address, api_key: str | None) -> aiohttp.ClientSession:
    """A session with a server. It sends the server's own key, and keeps no cookie: what the server
    sets for one caller must not come back with the next one's request."""
    headers = {"Accept-Encoding": "identity"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    connector: aiohttp.BaseConnector
    if address.socket is not None:
        connector = aiohttp.UnixConnector(address.socket, limit=0)
    else:
        connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(
        connector=connector,
        headers=headers,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,  # a few KB of it could unfold to any size
        timeout=aiohttp.ClientTimeout(total=None),
    )


def line(address: Address, api_key: str | None, name: str) -> HttpLine:
    """The way that requests take to a server, with its own key. It is asked not to compress: what
    it says is read here, and passed on to callers who may not know how to unfold it."""
    parts = urlsplit(address.base_url)
    if address.socket is not None:
        connect = unix(address.socket)
    else:
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if tls else 80)
        connect = tcp(parts.hostname or "", port, tls=tls)
    headers = [(b"accept-encoding", b"identity")]
    if api_key:
        headers.append((b"authorization", f"Bearer {api_key}".encode()))
    pool = Pool(connect, host=parts.netloc.encode(), name=name, hop="worker")
    return HttpLine(pool, headers, prefix=parts.path)


async def ask(http: aiohttp.ClientSession, address: Address, path: str) -> tuple[int, bytes]:
    """The status and body of a GET.

    :raises Unavailable: nothing listens there (``engine_unreachable``), or no answer came
    :raises WorkerBroke: the answer has no end
    """
    try:
        async with http.get(
            address.base_url + path,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=ANSWER_S),
        ) as answer:
            body = bytearray()
            async for chunk in answer.content.iter_any():
                body += chunk
                if len(body) > ANSWER_LIMIT:
                    raise WorkerBroke(
                        f"{address} answers {path} with more than {ANSWER_LIMIT >> 20} MiB. Is it "
                        "an OpenAI-compatible server? Look at its URL.",
                        code="engine_not_understood",
                        retryable=False,
                    )
            return answer.status, bytes(body)
    except aiohttp.ClientConnectorError as error:
        raise Unavailable(
            f"Nothing answers at {address}: {_reason(error)}. Start the server there, or correct "
            "the URL; it is dialled from the hive's machine.",
            code="engine_unreachable",
            param="options.url",
        ) from None
    except TimeoutError:
        raise Unavailable(
            f"{address} did not answer {path} within {ANSWER_S:g} s. Look at that server.",
            code="engine_silent",
        ) from None
    except (aiohttp.ClientError, OSError) as error:
        raise Unavailable(
            f"{address} broke off its answer to {path} ({type(error).__name__}). Is it an HTTP "
            "server? Look at it and at its URL.",
            code="engine_silent",
        ) from None


async def models(http: aiohttp.ClientSession, address: Address) -> list[Served]:
    """The models that a server lists.

    :raises InvalidRequest: it wants another key (``engine_key_refused``), or is a Hive
    :raises HiveError: nothing answers, or not as an OpenAI-compatible server would
    """
    status, raw = await ask(http, address, "/v1/models")
    if status == 200:
        return read_models(raw, str(address))
    raise refusal(status, address, keyed="Authorization" in http.headers)


def refusal(status: int, address: Address, *, keyed: bool) -> HiveError:
    """Why a server does not tell its models. What it says itself may quote the key, and is dropped.

    :param keyed: it was given a key
    """
    if status in (401, 403):
        what = "does not take the key that it was given" if keyed else "asks for a key"
        return InvalidRequest(
            f"{address} {what} ({status}). Give the server's own key as 'api_key' "
            "(--api-key-file FILE, or HIVE_ENGINE_KEY).",
            code="engine_key_refused",
            param="options.api_key",
        )
    if status >= 500:
        return Unavailable(
            f"{address} answers /v1/models with {status}: it is loading, or broken. Look at that "
            "server, and try again.",
            code="engine_unwell",
        )
    return WorkerBroke(
        f"{address} answers /v1/models with {status}. Is it an OpenAI-compatible server? Look at "
        "its URL.",
        code="engine_not_understood",
        retryable=False,
    )


def _reason(error: aiohttp.ClientConnectorError) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its certificate is not trusted here"
    if error.errno and error.errno > 0:
        return os.strerror(error.errno).lower()
    return (error.strerror or type(error).__name__).lower()
