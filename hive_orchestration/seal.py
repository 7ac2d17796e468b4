"""Secrets of tasks, encrypted where they are kept."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Final, Self

from cryptography.fernet import Fernet, InvalidToken

from operations.errors import HiveError

KEY_BYTES: Final = 32
PURPOSE: Final = "secrets of tasks"


class Sealer:
    """Fernet (AES-128-CBC and HMAC-SHA256), under one key for all queens of a cluster."""

    def __init__(self, key: bytes) -> None:
        """:param key: 32 bytes"""
        self._fernet = Fernet(base64.urlsafe_b64encode(key))

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """With the key in a file, which is made where there is none, for its owner alone."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return cls(path.read_bytes())
        with os.fdopen(descriptor, "wb") as file:
            file.write(key := os.urandom(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        return cls(key)

    def seal(self, secrets: dict[str, str]) -> str | None:
        """None where there is nothing to hide."""
        return self._fernet.encrypt(json.dumps(secrets).encode()).decode() if secrets else None

    def unseal(self, sealed: str | None) -> dict[str, str]:
        """:raises HiveError: they were sealed under another key"""
        if sealed is None:
            return {}
        try:
            opened: dict[str, str] = json.loads(self._fernet.decrypt(sealed.encode()))
        except InvalidToken:
            raise HiveError(
                "This task's secrets were encrypted under another key than this queen's. Start "
                "her with the cluster secret that she had then.",
                code="secrets_sealed",
            ) from None
        return opened
