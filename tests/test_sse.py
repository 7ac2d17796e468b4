"""Server-sent events survive any cut of the byte stream."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from operations.errors import WorkerBroke
from wire import sse


def decoded(chunks: list[bytes]) -> list[sse.Event]:
    decoder = sse.Decoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


def cut(raw: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(raw), *(place % (len(raw) + 1) for place in places)})
    return [raw[a:b] for a, b in itertools.pairwise(edges)]


lines = st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8"), max_size=20)
events = st.builds(
    sse.Event,
    data=st.lists(lines, min_size=1, max_size=3).map("\n".join),
    event=st.just("message"),
    id=st.none() | st.text("0123456789abcdef:", min_size=1, max_size=8),
)


@given(st.lists(events, max_size=5), st.lists(st.integers(0, 10_000), max_size=20))
def test_events_come_back_however_the_bytes_are_cut(
    sent: list[sse.Event], places: list[int]
) -> None:
    raw = b"".join(event.encode() for event in sent)
    assert decoded(cut(raw, places)) == sent


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
@given(places=st.lists(st.integers(0, 200), max_size=10))
def test_every_line_ending_of_the_standard_is_read(ending: bytes, places: list[int]) -> None:
    raw = b": hi\nid: 7\nevent: x\ndata: a\ndata:b\nretry: 5\n\ndata: c\n\n".replace(b"\n", ending)
    assert decoded(cut(raw, places)) == [sse.Event("a\nb", "x", "7"), sse.Event("c")]


def test_an_event_without_end_is_cut_off() -> None:
    with pytest.raises(WorkerBroke):
        decoded([b"x" * 1024 * 1024] * 40)


def test_an_event_of_endless_lines_is_cut_off() -> None:
    with pytest.raises(WorkerBroke):
        decoded([b"data: " + b"x" * 1024 * 1024 + b"\n"] * 40)
