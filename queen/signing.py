"""The key that signs callbacks, as Standard Webhooks has it.

It is the operator's ``HIVE_CALLBACK_SECRET``; without that the cluster secret gives it, and
without a cluster the file with the queue's own key.
"""

from __future__ import annotations

import base64
from typing import Final

from hive_orchestration.seal import key_for
from operations.tasks import QUEUE_KEY_FILE
from queen.settings import QueenSettings
from wire.secret import Secret

PREFIX: Final = "whsec_"


def signing_key(settings: QueenSettings, secret: Secret | None) -> bytes:
    """What a queen with these settings signs with.

    A secret as Standard Webhooks writes it is decoded, any other is taken as it is.

    :param secret: of her cluster
    :raises OSError: the file with the key cannot be read or made
    :raises ValueError: it holds no key
    """
    given = settings.callback_secret
    if given is None:
        return key_for("callbacks", secret, settings.state_dir / QUEUE_KEY_FILE)
    text = given.get_secret_value()
    return _decoded(text) or text.encode()


def written(key: bytes) -> str:
    """As libraries for Standard Webhooks take it."""
    return PREFIX + base64.b64encode(key).decode()


def _decoded(text: str) -> bytes:
    """Empty: it is not written so."""
    if not text.startswith(PREFIX):
        return b""
    try:
        return base64.b64decode(text.removeprefix(PREFIX) + "==")
    except ValueError:
        return b""
