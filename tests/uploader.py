"""Sends one large chat request as fast as it is taken: ``python -m tests.uploader URL MODEL SIZE``.

A process of its own, so that its work is not measured. Prints the body of the answer.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit

CHAT = "/v1/chat/completions"
LINE = json.dumps('He said "hello", and \\ then: ü\n', ensure_ascii=False)[1:-1].encode()


@dataclass(frozen=True)
class Large:
    """A chat request of many bytes, made as it is sent.

    :param size: of its text, about, bytes
    :param end: what it ends with
    """

    model: str
    size: int
    end: str = "}"

    def pieces(self) -> Iterator[bytes]:
        yield f'{{"model":"{self.model}","messages":[{{"role":"user","content":"'.encode()
        text = LINE * (256 * 1024 // len(LINE))
        for _ in range(self.size // len(text)):
            yield text
        yield b'"}],"max_tokens":5' + self.end.encode()

    def __len__(self) -> int:
        return sum(map(len, self.pieces()))

    @cached_property
    def sha256(self) -> str:
        hashed = hashlib.sha256()
        for piece in self.pieces():
            hashed.update(piece)
        return hashed.hexdigest()


def main() -> None:
    url, model, size = sys.argv[1:]
    parts = urlsplit(url)
    body = Large(model, int(size))
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    connection.request("POST", CHAT, body=body.pieces(), headers=headers)
    print(connection.getresponse().read().decode(), flush=True)


if __name__ == "__main__":
    main()
