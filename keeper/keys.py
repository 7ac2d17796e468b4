"""``hive keys …``: API keys, made where the secret is, revoked at any daemon."""

from __future__ import annotations

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict, ValidationError

from keeper import words
from keeper.command import Json, command, given
from keeper.exits import WrongUsage
from keeper.output import Column, Output, Table
from keeper.session import Session
from operations.errors import Conflict, HiveError, NotFound, Unavailable
from wire.keys import TENANT, Scope

FILE = "keys.jsonl"
DAY_S = 86_400


class ScopeName(StrEnum):
    """:data:`wire.keys.Scope`, in the form in which Typer takes several of them."""

    INFER = "infer"
    QUEUE = "queue"
    DRONE = "drone"
    ADMIN = "admin"


class Made(BaseModel):
    """What is kept of a key on the machine that made it. The key itself is not."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    key_id: str
    name: str
    tenant: str
    scopes: list[str]
    rpm: int | None = None
    made_at: float
    expires_at: float | None = None
    cluster_id: str


def declare(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("new")(new)
    command(app, "ls")(ls)
    command(app, "revoke")(revoke)


def new(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is, for 'keys ls'.")],
    scope: Annotated[
        list[ScopeName] | None,
        typer.Option(help="What it may do; may be repeated.", show_default="infer"),
    ] = None,
    rpm: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=10**6,
            help="Requests a minute, at each daemon.",
            show_default="no limit",
        ),
    ] = None,
    days: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            min=0.0001,
            max=36500,
            help="How long it holds.",
            show_default="until revoked",
        ),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose work it is, in the queue.", show_default="NAME"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it; it is kept nowhere. Needs the cluster's secret on this machine."""
    from keeper.connect import own_secret
    from wire.keys import Keys

    for value in (name, tenant or name):
        if not TENANT.fullmatch(value):
            raise WrongUsage(f"'{value}' is no name. Use up to 63 letters, digits and . _ @ -")
    secret = own_secret()
    if secret is None:
        raise HiveError(
            "There is no cluster secret on this machine, and keys are signed with it. Make one "
            "with 'hive secret new', or run this where it is.",
            code="no_secret",
        )
    now = time.time()
    scopes: tuple[Scope, ...] = tuple(one.value for one in scope or (ScopeName.INFER,))
    key, key_id = Keys(secret).make(
        scopes=scopes,
        tenant=tenant or name,
        rpm=rpm,
        seconds=None if days is None else days * DAY_S,
    )
    made = Made(
        key_id=key_id,
        name=name,
        tenant=tenant or name,
        scopes=list(scopes),
        rpm=rpm,
        made_at=now,
        expires_at=None if days is None else now + days * DAY_S,
        cluster_id=secret.cluster_id,
    )
    _keep(made)
    out = Output(as_json or given(ctx).as_json)
    out.result({**made.model_dump(exclude_none=True), "key": key}, key)
    out.hint(f"It is shown this once. Revoke it with 'hive keys revoke {key_id}'.")


async def ls(session: Session) -> None:
    """List the keys made on this machine, and which of them hold."""
    revoked = set((await session.get("/v1/keys/revoked"))["key_ids"])
    rows = [
        {**made.model_dump(exclude_none=True), "state": _state(made, revoked)} for made in kept()
    ]
    session.out.result({"keys": rows, "revoked": sorted(revoked)}, _table(rows))


async def revoke(
    session: Session,
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="A key's id, its name, or the key itself.")
    ],
) -> None:
    """End a key, on every hive within seconds; one that is away learns of it when it is back."""
    key_id = _meant(key)
    await session.client.post("/v1/keys/revoked", {"key_ids": [key_id]})
    session.out.result({"key_id": key_id, "state": "revoked"}, f"{key_id} is revoked.")


def _meant(key: str) -> str:
    """The id that somebody means.

    :raises NotFound: none of that name was made here
    :raises Conflict: several were
    """
    from wire.keys import KEY_ID, PREFIX

    if KEY_ID.fullmatch(key):
        return key
    if key.startswith(PREFIX):
        return _id_of(key)
    found = [made.key_id for made in kept() if made.name == key]
    if not found:
        raise NotFound(
            f"No key of the name '{key}' was made on this machine. 'hive keys ls' shows those "
            "that were; give the id or the key itself otherwise.",
            param="key",
        )
    if len(found) > 1:
        raise Conflict(f"There are several: {', '.join(found)}. Give the id of one.", param="key")
    return found[0]


def _id_of(key: str) -> str:
    """The id in a key; its signature is not checked, so that also a strange key can be ended."""
    import jwt

    from wire.keys import KEY_ID, PREFIX

    try:
        claims: dict[str, Any] = jwt.decode(
            key.removeprefix(PREFIX), options={"verify_signature": False}
        )
        key_id = str(claims["jti"])
    except (jwt.InvalidTokenError, KeyError):
        key_id = ""
    if not KEY_ID.fullmatch(key_id):
        raise WrongUsage("This is no key of Hive's, or not a whole one. Give its id instead.")
    return key_id


def kept() -> list[Made]:
    """The keys made on this machine, oldest first; a broken line is skipped."""
    try:
        lines = _file().read_text().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Unavailable(f"{_file()} cannot be read: {error.strerror}.") from None
    found = []
    for line in lines:
        try:
            found.append(Made.model_validate(json.loads(line)))
        except (ValidationError, ValueError):
            continue
    return found


def _keep(made: Made) -> None:
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.open("a") as file:
            file.write(made.model_dump_json(exclude_none=True) + "\n")
    except OSError as error:
        raise HiveError(
            f"The key was not made: {path} cannot be written: {error.strerror}.",
            code="not_written",
        ) from None


def _file() -> Path:
    from keeper.connect import state_dir

    return state_dir() / FILE


def _state(made: Made, revoked: set[str]) -> str:
    if made.key_id in revoked:
        return "revoked"
    if made.expires_at is not None and made.expires_at < time.time():
        return "expired"
    return "holds"


def _table(rows: list[dict[str, Any]]) -> Table:
    now = time.time()
    return Table(
        [
            Column("KEY", "id"),
            Column("NAME"),
            Column("SCOPES"),
            Column("TENANT", if_differs=True),
            Column("LIMIT", "number"),
            Column("STATE", "state"),
            Column("AGE", "number"),
            Column("EXPIRES", "number"),
        ],
        [
            [
                row["key_id"],
                row["name"],
                ", ".join(row["scopes"]),
                row["tenant"],
                f"{row['rpm']}/min" if "rpm" in row else "",
                row["state"],
                words.age(now - row["made_at"]),
                f"in {words.duration(row['expires_at'] - now)}" if _ends(row, now) else "",
            ]
            for row in rows
        ],
        "No keys were made on this machine. Make one with 'hive keys new NAME'.",
    )


def _ends(row: dict[str, Any], now: float) -> bool:
    return row["state"] == "holds" and float(row.get("expires_at", 0)) > now
