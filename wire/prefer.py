"""What a caller would like, and can do without (RFC 7240)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache


@lru_cache(maxsize=64)
def preferences(said: str) -> Mapping[str, str]:
    """What ``Prefer`` says: by name, in lower case; of one that is named twice, the first value.

    :param said: the header's value; of several such headers, joined by commas
    """
    read: dict[str, str] = {}
    for part in said.split(","):
        name, _, value = part.partition(";")[0].partition("=")
        value = value.strip()
        quoted = len(value) > 1 and value[0] == value[-1] == '"'
        read.setdefault(name.strip().lower(), value[1:-1] if quoted else value)
    return read
