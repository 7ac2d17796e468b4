"""The same service for requests that come over a trunk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from operations.errors import HiveError, NotFound
from wire import errors
from wire.door.door import Request, Serve
from wire.keys import Caller
from wire.trunk.messages import Open
from wire.trunk.server import Answer

log = logging.getLogger(__name__)

QUEEN = Caller("daemon", "queen")


Server = Callable[[str, str], Serve | None]
"""Who serves a request of this method and path, if anybody does (:meth:`Doorway.server`)."""


def over_trunks(server: Server) -> Callable[[Open, bytes, Answer], None]:
    """Who serves the requests of trunks, which the trunk has let in."""
    tasks: set[asyncio.Task[None]] = set()

    def begin(head: Open, body: bytes, answer: Answer) -> None:
        serve = server(head.method, head.path)
        if serve is None:
            answer.fail(NotFound(f"Nothing is served at {head.path} over a trunk. Use HTTP."))
            return
        request = Request(
            head.method, head.path, head.target, head.headers, body, head.request_id, QUEEN
        )
        serving = serve(request, answer)
        if serving is None:
            return
        task = asyncio.get_running_loop().create_task(_run(serving, request, answer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        answer.on_gone = partial(_cancel, task)

    return begin


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


async def _run(serving: Awaitable[None], request: Request, answer: Answer) -> None:
    try:
        await serving
    except HiveError as error:
        answer.fail(error)
    except Exception:  # the queen is told, and the trunk goes on
        log.exception("serving %s broke", request.path)
        answer.fail(HiveError(errors.BROKEN))
    finally:
        answer.abort()
