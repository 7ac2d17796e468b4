"""Asking again while no answer has begun: a generation that nobody has seen harms nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiohttp

TRIES = 8
FIRST_PAUSE_S, LAST_PAUSE_S = 0.02, 0.5

T = TypeVar("T")


class NoAnswer(aiohttp.ClientError):
    """The other side took the request and ended without a first byte of an answer."""


async def head(
    http: aiohttp.ClientSession, method: str, url: str, **options: Any
) -> aiohttp.ClientResponse:
    """Send a request, and return when the head of its answer is there.

    :raises aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError: nothing was sent
    :raises NoAnswer: it was sent, and the connection ended
    """
    try:
        return await http.request(method, url, allow_redirects=False, **options)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
        raise NoAnswer(str(error)) from None


async def until_answered(attempt: Callable[[], Awaitable[T]]) -> T:
    """Repeat ``attempt`` while it cannot connect, about 2 s in all, and once after a NoAnswer.

    A worker that has just died refuses connections, or takes them into its grave, a moment before
    its owner knows. Each attempt chooses anew whom to ask: the next one waits for the worker to be
    back, or goes elsewhere. A request that kills whoever takes it is not passed on for ever.

    :raises aiohttp.ClientConnectorError, NoAnswer: the last attempt failed so, too
    """
    pause = FIRST_PAUSE_S
    unanswered = False
    for _ in range(TRIES - 1):
        try:
            return await attempt()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            pass
        except NoAnswer:
            if unanswered:
                raise
            unanswered = True
        await asyncio.sleep(pause)
        pause = min(2 * pause, LAST_PAUSE_S)
    return await attempt()
