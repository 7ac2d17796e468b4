"""The queen's settings: flags, then ``HIVE_*`` variables, then these defaults."""

from __future__ import annotations

from typing import Annotated

from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from queen.targets import Targets
from wire.addresses import checked_url
from wire.settings import DaemonSettings, split_list


class QueenSettings(DaemonSettings):
    """
    :param hives: URLs of hives that do not announce themselves (``HIVE_HIVES``, with commas)
    :param trunks: keep one connection to each hive for all requests; else each goes by HTTP
    :param processes: that share the port and relay inference; all else is done by one of them
    :param database: where the durable queue is kept, ``postgresql://…``; without it in
        ``<state_dir>/queue.db``
    :param max_queue: tickets of a tenant that may wait, further ones are refused by ``/enqueue``
        (also ``MAX_QUEUE``)
    :param task_jobs: how many tasks that are operations the queen runs at a time
    :param internal_token: asked for, as bearer token, by ``/enqueue``, and elsewhere than on
        loopback by ``/claim`` (also ``INTERNAL_API_TOKEN``)
    :param callback_secret: opens ``/callback``, and signs what goes out (also ``CALLBACK_SECRET``)
    :param callback_url: of tickets that name none
    :param callback_allow: where else callbacks may go (``HIVE_CALLBACK_ALLOW``, with commas); see
        :class:`queen.targets.Targets`
    """

    port: int = Field(default=7833, ge=0, le=65535)
    hives: Annotated[tuple[str, ...], NoDecode] = ()
    trunks: bool = True
    processes: int = Field(default=1, ge=1, le=64)
    database: str | None = Field(default=None, repr=False)
    max_queue: int = Field(
        default=1000,
        ge=1,
        le=1_000_000,
        validation_alias=AliasChoices("HIVE_MAX_QUEUE", "MAX_QUEUE"),
    )
    task_jobs: int = Field(default=4, ge=1, le=64)
    internal_token: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("HIVE_INTERNAL_TOKEN", "INTERNAL_API_TOKEN")
    )
    callback_secret: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("HIVE_CALLBACK_SECRET", "CALLBACK_SECRET")
    )
    callback_url: str | None = None
    callback_allow: Annotated[tuple[str, ...], NoDecode] = ()

    @field_validator("hives", "callback_allow", mode="before")
    @classmethod
    def _split_lists(cls, words: object) -> object:
        return split_list(words)

    @field_validator("hives")
    @classmethod
    def _urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(checked_url(url) for url in urls)

    @field_validator("database", "internal_token", "callback_secret", "callback_url", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("callback_url")
    @classmethod
    def _can_be_called(cls, url: str | None) -> str | None:
        Targets((), url)
        return url

    @field_validator("callback_allow")
    @classmethod
    def _can_be_allowed(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        Targets(words)
        return words

    def targets(self) -> Targets:
        """Where callbacks may go."""
        return Targets(self.callback_allow, self.callback_url)
