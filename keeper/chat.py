"""A conversation in the terminal, or turn by turn out of a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from keeper.answer import Answer
from keeper.exits import WrongUsage
from operations import operations as ops
from operations.errors import HiveError

if TYPE_CHECKING:
    from keeper.command import Run
    from keeper.session import Session

PROMPT = ">>> "
HISTORY_LINES = 1000
HELP = "/clear forgets the conversation, /system TEXT instructs the model, /bye or Ctrl-D ends."


@dataclass(frozen=True)
class Settings:
    """How each turn is asked; what is None is left to the engine."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None


@dataclass
class Conversation:
    """What has been said. A turn counts once it has been answered in full."""

    system: str | None = None
    turns: list[ops.Message] = field(default_factory=list)

    def asking(self, text: str) -> list[ops.Message]:
        """The messages of the next request."""
        first = [ops.Message(role="system", content=self.system)] if self.system else []
        return [*first, *self.turns, ops.Message(role="user", content=text)]

    def answered(self, text: str, answer: str) -> None:
        self.turns.append(ops.Message(role="user", content=text))
        self.turns.append(ops.Message(role="assistant", content=answer))


@dataclass(frozen=True)
class Command:
    """A line that is meant for the chat, not for the model."""

    name: Literal["clear", "system", "bye", "help", "unknown"]
    text: str = ""


def parse_command(line: str) -> Command | None:
    """``/clear``, ``/system TEXT``, ``/bye``, ``/help``; None for what is meant for the model."""
    if not line.startswith("/"):
        return None
    name, _, rest = line[1:].partition(" ")
    match name.lower():
        case "clear" | "system" | "help" as known:
            return Command(known, rest.strip())
        case "bye" | "exit" | "quit":
            return Command("bye")
    return Command("unknown", line.split()[0])


class Chat:
    """:param run: runs one turn; Ctrl-C meanwhile raises KeyboardInterrupt"""

    def __init__(
        self,
        session: Session,
        settings: Settings,
        run: Run,
        *,
        system: str | None = None,
        show_reasoning: bool | None = None,
    ) -> None:
        self._session = session
        self._out = session.out
        self._settings = settings
        self._run = run
        self._said = Conversation(system)
        self._show_reasoning = show_reasoning
        self._live = sys.stdin.isatty()

    def talk(self) -> None:
        """Until the input ends or somebody says goodbye.

        :raises HiveError: a turn failed; at a terminal it is shown instead, and the chat goes on
        """
        if self._live:
            self._out.note(f"Talking with {self._settings.model}. {HELP}")
        for line in terminal_lines() if self._live else piped_lines():
            command = parse_command(line)
            if command is None:
                self._turn(line)
            elif command.name == "bye":
                return
            else:
                self._obey(command)

    def _turn(self, text: str) -> None:
        answer = Answer(self._out, self._show_reasoning)
        try:
            operation = ops.Infer(
                hive_id=self._session.hive_id,
                messages=self._said.asking(text),
                **vars(self._settings),
            )
            answer.wait()
            try:
                outcome = self._run(self._session.stream(operation, answer.take))
            finally:
                answer.close()
            outcome.value()
        except KeyboardInterrupt:
            if not self._live:
                raise
            self._out.note("cancelled; this turn is forgotten")
        except HiveError as error:
            if not self._live:
                raise
            self._out.error(error)
        else:
            self._finished(text, answer)

    def _finished(self, text: str, answer: Answer) -> None:
        if answer.end is not None:
            self._said.answered(text, answer.end.text)
            if self._out.as_json:
                self._out.json_line(answer.end.model_dump())
        if self._live and self._out.rich_err:
            self._out.note(answer.figures())

    def _obey(self, command: Command) -> None:
        match command.name:
            case "clear":
                self._said.turns.clear()
                self._out.note("Forgotten.")
            case "system":
                self._said.system = command.text or None
                self._out.note("Noted." if command.text else "No system message any more.")
            case "help":
                self._out.note(HELP)
            case _:
                self._out.note(f"There is no command '{command.text}'. {HELP}")


def piped_lines() -> Iterator[str]:
    """Lines of stdin that say something. :raises WrongUsage: not UTF-8"""
    for raw in sys.stdin.buffer:
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise WrongUsage(
                "The chat on stdin is not UTF-8. Pipe UTF-8 text, a line a turn."
            ) from None
        if line:
            yield line


def terminal_lines() -> Iterator[str]:
    """Lines typed, with the editing and the history of readline; Ctrl-C empties the line."""
    history = _load_history()
    try:
        while True:
            try:
                line = input(PROMPT).strip()
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /bye ends)")
                continue
            except EOFError:
                print()
                return
            if line:
                yield line
    finally:
        _save_history(history)


def _load_history() -> Path | None:
    """Where earlier lines are kept, readable by their writer only."""
    try:
        import readline
    except ImportError:  # a Python built without it: plain input
        return None
    import platformdirs

    path = platformdirs.user_state_path("hive") / "chat_history"
    readline.set_auto_history(True)
    with suppress(OSError):
        readline.read_history_file(path)
    return path


def _save_history(path: Path | None) -> None:
    if path is None:
        return
    import readline

    with suppress(OSError):  # a chat without a home is still a chat
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        os.chmod(path, 0o600)
        readline.set_history_length(HISTORY_LINES)
        readline.write_history_file(path)
