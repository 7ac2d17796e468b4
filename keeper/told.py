"""Reading what daemons tell."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError

from operations.errors import HiveError, from_validation
from operations.hosts import Told

T = TypeVar("T", bound=Told)


def told(model: type[T], value: Any) -> T:
    """One thing that a daemon told.

    :raises HiveError: it is not what this version of ``hive`` understands
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        reason = from_validation(error, model.__name__).message
        raise _not_understood(reason.rstrip(".")) from None


def each(model: type[T], answer: Any, among: str) -> list[T]:
    """The things that stand under the name ``among`` in an answer.

    :raises HiveError: as :func:`told`
    """
    values = answer.get(among) if isinstance(answer, dict) else None
    if not isinstance(values, list):
        raise _not_understood(f"it has no list of {among}")
    return [told(model, value) for value in values]


def _not_understood(reason: str) -> HiveError:
    return HiveError(
        f"The daemon's answer is not understood ({reason}). Is it of another version? "
        "'hive --version' and 'hive status' tell.",
        code="answer_not_understood",
    )
