"""Secrets of tasks, encrypted where they are kept; and the keys of a queue."""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from operations.errors import HiveError
from operations.tasks import NewTask
from wire.files import read_file

if TYPE_CHECKING:
    from wire.secret import Secret

KEY_BYTES: Final = 32

Purpose = Literal["secrets of tasks", "callbacks"]


def key_for(purpose: Purpose, secret: Secret | None, file: Path) -> bytes:
    """A queue's key for one purpose, 32 bytes: the same in all queens of a cluster.

    :param secret: of the cluster; without one the keys come from the file, this queue's own,
        which is made where there is none, for its owner alone
    :raises OSError: the file cannot be read or made
    :raises ValueError: it holds no key
    """
    if secret is not None:
        return secret.derive(purpose)
    return hmac.digest(_own(file), purpose.encode(), "sha256")


def _own(file: Path) -> bytes:
    if not file.exists():
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.") as made:
            made.write(os.urandom(KEY_BYTES))
            made.flush()
            os.fsync(made.fileno())
            with contextlib.suppress(FileExistsError):  # somebody else was first
                os.link(made.name, file)
    key = read_file(file, KEY_BYTES)
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes")
    return key


def sealer_for(secret: Secret | None, file: Path) -> Sealer:
    """A queue's. What was sealed before the cluster had a secret, it still unseals.

    Parameters and errors are those of :func:`key_for`.
    """
    older = [None] if secret is not None and file.exists() else []
    return Sealer(*(key_for("secrets of tasks", one, file) for one in (secret, *older)))


class Sealer:
    """Fernet (AES-128-CBC and HMAC-SHA256), under one key for all queens of a cluster."""

    def __init__(self, key: bytes, *older: bytes) -> None:
        """:param key: 32 bytes, as ``older``, which only unseal"""
        self._fernet = MultiFernet([Fernet(base64.urlsafe_b64encode(one)) for one in (key, *older)])
        self._veil = hmac.digest(key, b"digests of secrets", "sha256")

    def seal(self, secrets: dict[str, str]) -> str | None:
        """None where there is nothing to hide."""
        return self._fernet.encrypt(json.dumps(secrets).encode()).decode() if secrets else None

    def veiled(self, new: NewTask) -> NewTask:
        """The same task with keyed digests for its secrets: they tell only which are the same.

        Its own digest is kept beside its idempotency key, where a plain one would let short
        secrets be guessed.
        """
        if not new.secrets:
            return new
        veiled = {
            name: hmac.digest(self._veil, value.encode("utf-8", "surrogatepass"), "sha256").hex()
            for name, value in new.secrets.items()
        }
        return new.model_copy(update={"secrets": veiled})

    def unseal(self, sealed: str | None) -> dict[str, str]:
        """:raises HiveError: they were sealed under another key"""
        if sealed is None:
            return {}
        try:
            opened: dict[str, str] = json.loads(self._fernet.decrypt(sealed.encode()))
        except InvalidToken:
            raise HiveError(
                "This task's secrets were encrypted under another key than this queen's. Start "
                "her with the cluster secret that she had then, or put back the queue.key with "
                "which she had none.",
                code="secrets_sealed",
            ) from None
        return opened
