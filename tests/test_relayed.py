"""What is read of an engine's errors."""

from __future__ import annotations

import pytest

from wire.relayed import engine_is_dead


@pytest.mark.parametrize(
    ("message", "dead"),
    [
        (
            "EngineCore encountered an issue. See stack trace (above) for the root cause.",
            True,
        ),
        (
            "The worker answered with 500: EngineCore encountered an issue. See stack trace "
            "(above) for the root cause.",
            True,
        ),
        ("EngineCore has no such adapter.", False),
        ("Internal Server Error", False),
        ("", False),
    ],
)
def test_vllms_word_for_a_lost_engine_is_told_from_errors_of_one_request(
    message: str, dead: bool
) -> None:
    assert engine_is_dead(message) is dead
