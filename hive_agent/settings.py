"""The agent's settings: flags, then ``HIVE_*`` variables, then these defaults."""

from __future__ import annotations

import re
import socket
from typing import Annotated

from pydantic import AfterValidator, AliasChoices, Field

from operations.patterns import HIVE_ID
from wire.addresses import checked_url
from wire.settings import DaemonSettings


def default_hive_id() -> str:
    """The host's name, as far as it makes a valid id."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname().partition(".")[0])[:63]
    return name if re.match(HIVE_ID, name) else "hive"


def _not_reserved(hive_id: str) -> str:
    if hive_id == "localhost":
        raise ValueError("'localhost' always means the hive that is asked; choose another id")
    return hive_id


class AgentSettings(DaemonSettings):
    """:param hive_id: the name of this machine among the hives (``HIVE_ID``)
    :param queen_url: the queen to announce this hive to (``HIVE_QUEEN_URL``)
    :param health_seconds: how often an engine's health is asked for; three silences end it
    """

    port: int = Field(default=7835, ge=0, le=65535)
    hive_id: Annotated[str, AfterValidator(_not_reserved)] = Field(
        default_factory=default_hive_id,
        pattern=HIVE_ID,
        validation_alias=AliasChoices("hive_id", "HIVE_ID"),
    )
    health_seconds: float = Field(default=10, gt=0, le=600)
    queen_url: Annotated[str, AfterValidator(checked_url)] = "http://127.0.0.1:7833"
