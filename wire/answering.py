"""An answer as those who write it see it, whether it goes to a caller or over a trunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from wire.http1.body import chunk
from wire.http1.head import Header


class Answering(ABC):
    """The answer to one request.

    Bytes of the body are given as they go over the wire, chunk framing included where the answer
    is chunked. ``between`` says whether what was written so far ends between two chunks; whoever
    writes bytes that may be cut elsewhere sets it.
    """

    __slots__ = ("between", "chunked", "ended", "gone", "on_gone", "on_writable", "started")

    def __init__(self) -> None:
        self.chunked = False
        self.started = False
        self.ended = False
        self.gone = False
        self.on_gone: Callable[[], None] = _nothing
        self.on_writable: Callable[[bool], None] = _ignored
        self.between: Callable[[], bool] = _always

    @property
    @abstractmethod
    def writable(self) -> bool:
        """Whether more is taken now; :attr:`on_writable` is told when that changes."""

    @abstractmethod
    def head(self, status: int, headers: Sequence[Header], *, length: int | None) -> None:
        """Begin.

        :param headers: but for those that frame the body, and ``x-request-id``; a tuple where the
            same come again and again
        :param length: of the body, bytes; None for one whose chunks follow
        """

    @abstractmethod
    def write(self, data: bytes) -> None:
        """More of the body."""

    def chunk(self, data: bytes) -> None:
        """More of a chunked body, not framed yet."""
        self.write(chunk(data) if self.chunked else data)

    @abstractmethod
    def whole(self, status: int, headers: Sequence[Header], body: bytes) -> None:
        """All of it."""

    @abstractmethod
    def end(self) -> None:
        """It is complete."""

    @abstractmethod
    def abort(self) -> None:
        """It cannot be completed. Fine when it has ended."""

    def unwatched(self) -> None:
        """Whoever wrote it writes no more that may be cut, and need not hear of the flow."""
        self.on_writable = _ignored
        self.between = _always

    def unheard(self) -> None:
        """Whoever wrote it need not hear that its caller has gone."""
        self.on_gone = _nothing


def _always() -> bool:
    return True


def _nothing() -> None:
    pass


def _ignored(writable: bool) -> None:
    pass
