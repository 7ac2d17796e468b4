"""The cluster secret: what the daemons of one cluster share, and nobody ever sends.

Everything else is derived from it (HKDF's expand step, RFC 5869 §2.3, for one block): the
cluster's public id, the key that signs API keys, the key under which daemons prove themselves.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Self

from wire.files import write_whole

PREFIX = "hive1-"
FILE = "secret"  # in the state folder
BYTES = 32


class BadSecret(ValueError):
    """It is no cluster secret, or its file may not be trusted; the message never quotes it."""


class Secret:
    """32 random bytes. ``repr`` and ``str`` show only the cluster's id."""

    __slots__ = ("_bytes", "cluster_id")

    def __init__(self, raw: bytes) -> None:
        if len(raw) != BYTES:
            raise BadSecret(f"a secret has {BYTES} bytes")
        self._bytes = raw
        self.cluster_id = self.derive("cluster id")[:6].hex()
        """12 hex digits, public: which cluster a daemon belongs to."""

    @classmethod
    def new(cls) -> Self:
        return cls(secrets.token_bytes(BYTES))

    @classmethod
    def parse(cls, text: str) -> Self:
        """:raises BadSecret: mistyped, cut off, or chosen by hand"""
        try:
            if not text.startswith(PREFIX):
                raise ValueError
            raw = base64.b32decode(text.removeprefix(PREFIX).upper().encode("ascii"))
            if not hmac.compare_digest(raw[BYTES:], _check(raw[:BYTES])):
                raise ValueError
            return cls(raw[:BYTES])
        except (ValueError, binascii.Error):
            raise BadSecret(
                "this is no cluster secret, or not a whole one. Copy what 'hive secret show' "
                "prints on a machine that has it"
            ) from None

    @property
    def text(self) -> str:
        """What a person copies to the next machine: prefix, 32 bytes and a checksum in base32."""
        return PREFIX + base64.b32encode(self._bytes + _check(self._bytes)).decode().lower()

    def derive(self, label: str) -> bytes:
        """A 32-byte key of its own for each purpose."""
        info = b"hive " + label.encode() + b"\x01"
        return hmac.digest(self._bytes, info, "sha256")

    def __repr__(self) -> str:
        return f"<secret of cluster {self.cluster_id}>"


def find(text: str | None, path: Path) -> Secret | None:
    """The secret that the environment gives (``HIVE_SECRET``), else the one in a file.

    :raises BadSecret: there is one, and it cannot be used
    """
    if not text:
        return load(path)
    try:
        return Secret.parse(text.strip())
    except BadSecret as error:
        raise BadSecret(f"HIVE_SECRET: {error}") from None


def load(path: Path) -> Secret | None:
    """The secret in a file; None if there is no file.

    :raises BadSecret: others may read or write the file, or it holds no secret
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise BadSecret(f"{path} is no file")
            text = file.read(256)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadSecret(f"{path} cannot be read: {error.strerror}") from None
    if found.st_uid not in (0, os.geteuid()):
        raise BadSecret(f"{path} belongs to another user. Take it over with 'chown'")
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise BadSecret(f"{path} is open to other users. Close it with 'chmod 600 {path}'")
    try:
        return Secret.parse(text.decode("ascii", "replace").strip())
    except BadSecret as error:
        raise BadSecret(f"{path}: {error}") from None


def save(secret: Secret, path: Path) -> None:
    """Write a secret for its owner's eyes only; whole or not at all.

    :raises OSError: the file cannot be written
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_whole(path, f"{secret.text}\n".encode())


def _check(raw: bytes) -> bytes:
    return hashlib.sha256(b"hive secret" + raw).digest()[:3]
