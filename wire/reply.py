"""JSON answers from pydantic models and plain values."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic_core import to_json
from starlette.responses import Response


def reply(
    value: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """``value`` as JSON; fields that are None are left out."""
    return Response(
        to_json(value, exclude_none=True),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )
