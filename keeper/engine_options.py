"""How options of an engine are written on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from keeper.exits import WrongUsage
from operations.operations import FlagValue, Lora
from wire.files import read_file

LONGEST_TEMPLATE = 2**20  # bytes


def adapters(written: Iterable[str]) -> list[Lora] | None:
    """The adapters that ``NAME=PATH`` or ``NAME=PATH@SCALE`` mean; None if there are none.

    :raises WrongUsage: one is written otherwise
    """
    return [_adapter(text) for text in written] or None


def flags(written: Iterable[str]) -> dict[str, FlagValue] | None:
    """The flags that ``NAME=VALUE`` means, or ``NAME`` alone for one that takes no value.

    A value is a number or true or false where it reads as one, else text.

    :raises WrongUsage: one has no name, or is given twice
    """
    found: dict[str, FlagValue] = {}
    for text in written:
        name, equals, value = text.removeprefix("--").partition("=")
        if not name or name in found:
            raise WrongUsage(f"--flag {text}: give each flag once, as NAME=VALUE.")
        found[name] = _value(value) if equals else True
    return found or None


def text_of(path: Path | None) -> str | None:
    """The text of a file on this machine.

    :raises WrongUsage: it cannot be read, is too long, or is no regular file with text in it
    """
    if path is None:
        return None
    try:
        return read_file(path, LONGEST_TEMPLATE).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise WrongUsage(f"{path} cannot be read: {why}. Give a file of text.") from None


def _adapter(text: str) -> Lora:
    name, _, path = text.partition("=")
    path, scale = _scaled(path)
    try:
        return Lora(name=name, path=path, scale=scale)
    except ValidationError:
        raise WrongUsage(
            f"--lora {text}: write NAME=PATH or NAME=PATH@SCALE; PATH is absolute, on the hive."
        ) from None


def _scaled(path: str) -> tuple[str, float]:
    """A path, and the number behind its last ``@``, if there is one."""
    before, at, after = path.rpartition("@")
    try:
        return (before, float(after)) if at else (path, 1.0)
    except ValueError:
        return path, 1.0


def _value(text: str) -> FlagValue:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text
