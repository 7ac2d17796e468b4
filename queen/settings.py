"""The queen's settings: flags, then ``HIVE_*`` variables, then these defaults."""

from __future__ import annotations

from pydantic import Field, field_validator

from wire.settings import DaemonSettings


class QueenSettings(DaemonSettings):
    """:param hives: URLs of hives that do not announce themselves (``HIVE_HIVES``, a JSON list)"""

    port: int = Field(default=7833, ge=0, le=65535)
    hives: tuple[str, ...] = ()

    @field_validator("hives")
    @classmethod
    def _urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"'{url}' is no URL; give e.g. --hive http://127.0.0.1:7835")
        return tuple(url.rstrip("/") for url in urls)
