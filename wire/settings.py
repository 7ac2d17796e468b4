"""What every daemon's settings have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import platformdirs
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from wire.guard import MAX_BODY_BYTES
from wire.serve import CannotStart


class DaemonSettings(BaseSettings):
    """Frozen. A field ``x`` is its flag, else the variable ``HIVE_X``, else its default.

    :param max_body: largest request body, bytes
    :param drain_seconds: what running work gets to finish when the daemon stops
    :param state_dir: records, logs and locks; survives restarts
    """

    model_config = SettingsConfigDict(
        env_prefix="HIVE_", frozen=True, extra="forbid", populate_by_name=True
    )

    host: str = "127.0.0.1"
    port: int
    state_dir: Path = Field(default_factory=lambda: platformdirs.user_state_path("hive"))
    max_body: int = Field(default=MAX_BODY_BYTES, ge=1024, le=2**40)
    drain_seconds: float = Field(default=30, ge=0, le=3600)
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @classmethod
    def load(cls, **flags: Any) -> Self:
        """Settings from the flags given (None: not given) and the environment.

        :raises CannotStart: one of them is wrong; names the flag and the variable
        """
        try:
            return cls(**{name: value for name, value in flags.items() if value is not None})
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            name = str(first["loc"][0]) if first["loc"] else ""
            reason = first["msg"].removeprefix("Value error, ")
            field = "hive_id" if name.lower() == "hive_id" else name.lower().removeprefix("hive_")
            flag = {"hives": "hive"}.get(field, field)
            variable = "HIVE_ID" if field == "hive_id" else f"HIVE_{field.upper()}"
            raise CannotStart(
                f"--{flag.replace('_', '-')} (or {variable}) is wrong: {reason}."
            ) from None
