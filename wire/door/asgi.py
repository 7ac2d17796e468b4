"""The ASGI server's protocol object, behind a door that shares its connection with it.

uvicorn's object believes that it owns the connection. It gets the bytes of its requests and no
others, one request at a time, and tells when it has answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

NEVER_S = 10**6  # the door keeps the time


class Asgi(HttpToolsProtocol):
    """One caller's requests to the ASGI application."""

    def __init__(
        self,
        config: Config,
        state: ServerState,
        app_state: dict[str, Any],
        transport: Lent,
        answered: Callable[[], None],
    ) -> None:
        """:param answered: called when the answer to the last request has been written"""
        super().__init__(config, state, app_state)
        self.timeout_keep_alive = NEVER_S
        self._answered = answered
        self.connection_made(transport)
        state.connections.discard(self)  # the door stands for it there

    @property
    def answering(self) -> bool:
        """Whether anything of the present answer has been written."""
        return self.cycle is None or self.cycle.response_started

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()
        self._answered()


class Lent(asyncio.Transport):
    """The door's transport, lent to somebody who may write, and close it when he is done."""

    def __init__(
        self, transport: asyncio.Transport, close: Callable[[], None] | None = None
    ) -> None:
        """:param close: closes the connection; None: its own way of doing that will do"""
        super().__init__()
        self._transport = transport
        self._close = close or transport.close

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._transport.write(data)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self._transport.writelines(list_of_data)

    def close(self) -> None:
        self._close()

    def abort(self) -> None:
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()
