"""A model's answer on its way to the reader, token by token."""

from __future__ import annotations

from typing import assert_never

from keeper.output import Output
from keeper.progress import Narrator
from operations.events import End, Line, Reasoning, Result, Started, Token, parse_line


class Answer:
    """Takes the lines of an ``infer`` and writes the answer as it comes.

    :param show_reasoning: write what the model thinks first, to stderr; None: in a terminal only
    """

    def __init__(self, out: Output, show_reasoning: bool | None = None) -> None:
        self.started: Started | None = None
        self.end: End | None = None
        self._out = out
        self._narrator = Narrator(out, passing=True)
        reads_along = out.rich_out and out.rich_err
        self._show_reasoning = reads_along if show_reasoning is None else show_reasoning
        self._thinking = False
        self._last = ""  # what stdout ends in

    def wait(self) -> None:
        """Show that the answer is being waited for."""
        self._narrator.start()

    def take(self, line: str) -> None:
        """One line of the job's stream."""
        event = parse_line(line)
        match event:
            case Started():
                self.started = event
            case Reasoning(t=text):
                if self._show_reasoning:
                    self._narrator.stop()
                    self._thinking = True
                    self._out.aside(text)
            case Token(t=text):
                self._write(text)
            case End(text=text):
                self.end = event
                if not self._last:  # not streamed
                    self._write(text)
            case Line():
                self._narrator.take(line)
            case Result():
                pass
            case _:
                assert_never(event)

    def close(self) -> None:
        """End what has been written with a line break."""
        self._narrator.stop()
        if self._thinking:
            self._out.aside("\n")
        if self._last and not self._last.endswith("\n") and not self._out.as_json:
            self._out.write("\n")

    def figures(self) -> str:
        """Who answered and how fast: ``w-3f9a1c on gpu-0, first token after 12 ms, …``."""
        if self.end is None:
            return ""
        tokens, milliseconds = self.end.tokens_out, self.end.decode_time_ms
        parts = [
            f"{self.started.worker_id} on {self.started.hive_id}" if self.started else "",
            f"first token after {self.end.ttft_ms} ms",
            f"{tokens} token{'' if tokens == 1 else 's'}",
            f"{tokens * 1000 / milliseconds:.0f} tokens/s" if tokens and milliseconds else "",
            "cut off by the token limit" if self.end.stop_reason == "length" else "",
        ]
        return ", ".join(part for part in parts if part)

    def _write(self, text: str) -> None:
        if self._out.as_json or not text:
            return
        self._narrator.stop()
        if self._thinking:
            self._thinking = False
            self._out.aside("\n\n")
        self._out.write(text)
        self._last = text
