"""The body of an inference request: small ones as they are, large ones in pieces.

Nearly all bodies are small: one ``bytes``, decoded once. A large one is hashed and scanned while it
comes, and never joined, decoded or copied as a whole, so that nobody beside it waits.
"""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

from wire.http1.pieces import Pieces
from wire.openai import ROUTING_FIELDS, renamed, routed_model
from wire.openai_scan import Scanned, Scanner

SMALL_BYTES: Final = 1024 * 1024
WORKED_BYTES: Final = 64 * 1024  # of a large body that are hashed and scanned without a break


class LargeBody:
    """A body of over :data:`SMALL_BYTES`, whole.

    Of its fields those that routing reads are checked, as in a small body; whether the rest is JSON
    is for the engine to tell (:mod:`wire.openai_scan`).
    """

    __slots__ = ("_digest", "_scanned", "pieces")

    def __init__(self, pieces: Pieces, scanned: Scanned, digest: str | None) -> None:
        """:param digest: SHA-256 in hex; None: it is computed where somebody asks"""
        self.pieces = pieces
        self._scanned = scanned
        self._digest = digest

    def __len__(self) -> int:
        return self.pieces.size

    @property
    def digest(self) -> str:
        """SHA-256, in hex."""
        if self._digest is None:
            hashed = hashlib.sha256()
            for piece in self.pieces:
                hashed.update(piece)
            self._digest = hashed.hexdigest()
        return self._digest

    def routed_model(self) -> str:
        """:raises InvalidRequest: there is none, or a field that routing reads is wrong"""
        return routed_model(self._scanned.fields)

    def renamed(self, model: str) -> LargeBody:
        """The same with another ``model`` (of several the last one), sharing all other bytes."""
        if self.routed_model() == model:
            return self
        name = msgspec.json.encode(model)
        begin, end = self._scanned.spans["model"]
        scanned = Scanned(
            {**self._scanned.values, "model": name}, {"model": (begin, begin + len(name))}
        )
        return LargeBody(self.pieces.spliced(begin, end, name), scanned, None)


Body = bytes | LargeBody


def model_of(body: Body) -> str:
    """The model that a body asks for.

    :raises InvalidRequest: no UTF-8, no JSON object, no model, or a field that is read is wrong
    """
    return routed_model(body) if isinstance(body, bytes) else body.routed_model()


def with_model(body: Body, model: str) -> Body:
    """A body with another ``model``.

    :raises InvalidRequest: it is no JSON object
    """
    return renamed(body, model) if isinstance(body, bytes) else body.renamed(model)


def digest_of(body: Body) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(body).hexdigest() if isinstance(body, bytes) else body.digest


class Incoming:
    """A body that is being received; ``size`` is what has come, bytes.

    A large one is to be worked through beside its coming, and at its end: :meth:`work`.
    """

    __slots__ = ("_ended", "_few", "_hash", "_pieces", "_scanner", "_worked", "size")

    def __init__(self, length: int | None = None) -> None:
        """:param length: as declared; None where the body is chunked"""
        self.size = 0
        self._few: list[bytes] = []
        self._pieces: Pieces | None = None
        self._scanner: Scanner
        self._hash: hashlib._Hash
        self._worked = 0  # bytes of a large one that are hashed and scanned
        self._ended = False
        if length is not None and length > SMALL_BYTES:
            self._begin_large()

    def add(self, data: bytes) -> None:
        """More of it."""
        self.size += len(data)
        if self._pieces is not None:
            self._pieces.add(data)
            return
        self._few.append(data)
        if self.size > SMALL_BYTES:
            pieces = self._begin_large()
            few, self._few = self._few, []
            for piece in few:
                pieces.add(piece)

    def end(self) -> None:
        """All of it has come."""
        self._ended = True

    def work(self) -> bool:
        """Hash and scan the next :data:`WORKED_BYTES`; whether there is more to do now.

        :raises InvalidRequest: it is no JSON object
        """
        if self._pieces is None or not self._behind:
            return False
        part = self._pieces.part(self._worked, WORKED_BYTES)
        self._hash.update(part)
        self._scanner.feed(part)
        self._worked += len(part)
        return self._behind

    def whole(self) -> Body:
        """The body, when all is done.

        :raises InvalidRequest: it is large, and no JSON object
        """
        if self._pieces is None:
            return self._few[0] if len(self._few) == 1 else b"".join(self._few)
        return LargeBody(self._pieces, self._scanner.end(), self._hash.hexdigest())

    def _begin_large(self) -> Pieces:
        self._pieces = Pieces()
        self._scanner = Scanner(ROUTING_FIELDS)
        self._hash = hashlib.sha256()
        return self._pieces

    @property
    def _behind(self) -> bool:
        left = self.size - self._worked
        return left >= WORKED_BYTES or (self._ended and left > 0)
