"""The front door of a daemon: one protocol object for each caller's connection, which serves the
inference routes itself and hands every other request to the ASGI server."""

from wire.door.answer import Answer
from wire.door.door import Door, Doorway, Front, Request, Serve

__all__ = ["Answer", "Door", "Doorway", "Front", "Request", "Serve"]
