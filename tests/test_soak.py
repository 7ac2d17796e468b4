"""The short form of ``make soak``: minutes of mixed load leave queen and hive as they were."""

from __future__ import annotations

import pytest
from rich.console import Console

from bench.soak import Sample, growth_mb, soak

MINUTES = 5.0


def test_a_slope_is_seen_through_what_goes_up_and_down() -> None:
    flat = [Sample(second, 100.0 + second % 7, 0) for second in range(700)]
    rising = [Sample(second, 100.0 + second % 7 + 0.02 * second, 0) for second in range(700)]
    assert abs(growth_mb(flat)) < 0.5
    assert 13 < growth_mb(rising) < 15


@pytest.mark.long
@pytest.mark.timeout(MINUTES * 60 + 300)
async def test_five_minutes_of_mixed_load_leave_nothing_behind() -> None:
    assert await soak(MINUTES, Console(width=120)) == []
