"""What a caller would like, and can do without (RFC 7240)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache


def preferences(headers: Mapping[str, str]) -> Mapping[str, str]:
    """What ``Prefer`` says: by name, in lower case; of one that is named twice, the first value.

    :param headers: by names in lower case
    """
    said = headers.get("prefer")
    return _NONE if said is None else _read(said)


@lru_cache(maxsize=64)
def _read(said: str) -> Mapping[str, str]:
    read: dict[str, str] = {}
    for part in said.split(","):
        name, _, value = part.partition(";")[0].partition("=")
        read.setdefault(name.strip().lower(), value.strip().strip('"'))
    return read


_NONE: Mapping[str, str] = {}
