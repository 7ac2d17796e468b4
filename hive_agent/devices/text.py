"""Names that drivers and strangers chose, made fit to be shown and sent."""

from __future__ import annotations

LONGEST = 96


def readable(value: bytes | str | None, otherwise: str) -> str:
    """One line of printable text, of 96 characters at most.

    :param value: bytes are UTF-8; what is not shows as ``\ufffd``
    :param otherwise: stands for a value that is missing or empty
    """
    text = value.decode(errors="replace") if isinstance(value, bytes) else value or ""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text[:LONGEST] or otherwise
