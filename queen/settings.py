"""The queen's settings: flags, then ``HIVE_*`` variables, then these defaults."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from wire.addresses import checked_url
from wire.settings import DaemonSettings, split_list


class QueenSettings(DaemonSettings):
    """
    :param hives: URLs of hives that do not announce themselves (``HIVE_HIVES``, with commas)
    :param trunks: keep one connection to each hive for all requests; else each goes by HTTP
    :param processes: that share the port and relay inference; all else is done by one of them
    """

    port: int = Field(default=7833, ge=0, le=65535)
    hives: Annotated[tuple[str, ...], NoDecode] = ()
    trunks: bool = True
    processes: int = Field(default=1, ge=1, le=64)

    @field_validator("hives", mode="before")
    @classmethod
    def _split_hives(cls, urls: object) -> object:
        return split_list(urls)

    @field_validator("hives")
    @classmethod
    def _urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(checked_url(url) for url in urls)
