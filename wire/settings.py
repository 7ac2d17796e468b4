"""What every daemon's settings have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import platformdirs
from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from operations.errors import reason
from wire.addresses import checked_url, hostname, is_address, is_loopback
from wire.gate import MAX_BODY_BYTES
from wire.proof import Role
from wire.revocations import FILE, Revocations
from wire.secret import FILE as SECRET_FILE
from wire.secret import BadSecret, Secret, find
from wire.serve import CannotStart, Certificate, Listening, bind, read_certificate
from wire.trust import Trust

_SIZE = TypeAdapter(ByteSize)


def _bytes(size: object) -> int:
    return int(_SIZE.validate_python(size))


class DaemonSettings(BaseSettings):
    """Frozen. A field ``x`` is its flag, else the variable ``HIVE_X``, else its default.

    :param max_body: largest request body, bytes, or with a unit: 1G, 64MiB
    :param drain_seconds: what running work gets to finish when the daemon stops
    :param state_dir: records, logs and locks; survives restarts
    :param secret: the cluster's (``HIVE_SECRET``; there is no flag, which everybody could read)
    :param secret_file: where the secret is kept instead of ``<state_dir>/secret``
    :param tls_cert: a PEM certificate, with ``tls_key``; both or neither
    :param advertise_url: how others reach this daemon where that is not the address they dial
    :param interface: names or addresses of the interfaces for discovery (``HIVE_INTERFACE``, with
        commas); empty leaves the choice to :mod:`wire.lan`
    """

    model_config = SettingsConfigDict(
        env_prefix="HIVE_", frozen=True, extra="forbid", populate_by_name=True
    )

    host: str = "127.0.0.1"
    port: int
    state_dir: Path = Field(default_factory=lambda: platformdirs.user_state_path("hive"))
    max_body: Annotated[int, BeforeValidator(_bytes)] = Field(
        default=MAX_BODY_BYTES, ge=1024, le=2**40
    )
    drain_seconds: float = Field(default=30, ge=0, le=3600)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    secret: SecretStr | None = None
    secret_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    advertise_url: str | None = None
    interface: Annotated[tuple[str, ...], NoDecode] = ()

    @field_validator("interface", mode="before")
    @classmethod
    def _split(cls, names: object) -> object:
        return split_list(names)

    @field_validator("advertise_url")
    @classmethod
    def _by_address(cls, url: str | None) -> str | None:
        if url is not None and not is_address(hostname(url)):
            raise ValueError("the host must be an address: a proof holds for no name")
        return url and checked_url(url)

    @classmethod
    def load(cls, **flags: Any) -> Self:
        """Settings from the flags that there are (None: not given) and the environment.

        :raises CannotStart: one of them is wrong; names the flag and the variable
        """
        try:
            return cls(**{name: value for name, value in flags.items() if value is not None})
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            name = str(first["loc"][0]) if first["loc"] else ""
            field = "hive_id" if name.lower() == "hive_id" else name.lower().removeprefix("hive_")
            flag = {"hives": "hive"}.get(field, field)
            variable = "HIVE_ID" if field == "hive_id" else f"HIVE_{field.upper()}"
            named = f"--{flag.replace('_', '-')} (or {variable})" if field in flags else variable
            raise CannotStart(f"{named} is wrong: {reason(first)}.") from None

    def listen(self, what: str, *, sockets: int = 1) -> Listening:
        """Bind the socket that the settings name.

        :param sockets: how many processes will share the port
        :raises CannotStart: it cannot be had; or others could reach it and there is no secret
        """
        certificate: Certificate | None = None
        if self.tls_cert is not None and self.tls_key is not None:
            certificate = read_certificate(self.tls_cert, self.tls_key)
        elif self.tls_cert is not None or self.tls_key is not None:
            raise CannotStart("--tls-cert and --tls-key belong together. Give both, or neither.")
        if not is_loopback(self.host) and self.cluster_secret() is None:
            raise CannotStart(
                f"{what} will not listen on {self.host} without a cluster secret: anybody there "
                "could use it. Make one with 'hive secret new', or bring that of your other "
                "machines with 'hive secret set'."
            )
        return bind(self.host, self.port, what, certificate, sockets=sockets)

    def cluster_secret(self) -> Secret | None:
        """:raises CannotStart: there is one, and it cannot be used"""
        try:
            text = None if self.secret is None else self.secret.get_secret_value()
            return find(text, self.secret_file or self.state_dir / SECRET_FILE)
        except BadSecret as error:
            raise CannotStart(f"The cluster secret cannot be used: {error}.") from None

    def trust(
        self, listening: Listening, *, role: Role, id: str, instance: str, kept: Path
    ) -> Trust:
        """Whom the daemon lets in.

        :param kept: the folder in which the daemon keeps which keys are revoked
        :raises CannotStart: secret or revocations cannot be read
        """
        try:
            revocations = Revocations(kept / FILE)
        except (OSError, ValueError) as error:
            raise CannotStart(
                f"{kept / FILE}, the list of revoked keys, cannot be read: {error}. Mend it, or "
                "remove it if no key was ever revoked."
            ) from None
        return Trust(
            self.cluster_secret(),
            revocations,
            role=role,
            id=id,
            instance=instance,
            listens_openly=not is_loopback(listening.host),
            fingerprint=listening.certificate.fingerprint if listening.certificate else "",
            advertised=(self.advertise_url,) if self.advertise_url else (),
        )


def split_list(value: object) -> object:
    """A variable's ``a,b`` as a tuple; anything else as it is."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value
