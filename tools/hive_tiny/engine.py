"""llama.cpp in this process, asked greedily."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import xllamacpp

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """What the model said and why it ended: "stop" by itself, "length" at the limit."""

    text: str
    stop_reason: str


class LlamaCpp:
    """One GGUF file behind llama.cpp's server; it ends with the process."""

    def __init__(self, path: Path, context: int, threads: int = 1) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        params.verbosity = 0
        self._server = xllamacpp.Server(params)

    def ask(self, messages: Messages, max_tokens: int) -> Answer:
        """The greedy answer to the conversation."""
        request = {"messages": messages, "max_tokens": max_tokens, "temperature": 0.0}
        choice = self._server.handle_chat_completions(request)["choices"][0]
        return Answer(choice["message"]["content"], choice["finish_reason"])

    def tokenize(self, text: str) -> list[int]:
        """The ids of the text as llama.cpp splits it, special tokens included."""
        body = json.dumps({"content": text, "parse_special": True, "add_special": False})
        url = f"{self._server.listening_address}/tokenize"
        with urllib.request.urlopen(url, body.encode()) as response:
            ids: list[int] = json.load(response)["tokens"]
        return ids
