"""Scanning large bodies for what routing needs: whatever a body is and however it is cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operations.errors import HiveError, InvalidRequest
from wire.door.body import SMALL_BYTES, Body, Incoming, LargeBody, digest_of, model_of, with_model
from wire.http1.pieces import PART_BYTES, PIECE_BYTES, Pieces
from wire.openai import ROUTING_FIELDS, renamed, routed_model
from wire.openai_scan import KEPT_BYTES, MAX_DEPTH, MAX_FIELDS, Scanned, Scanner

WANTED = frozenset({"model", "n", "temperature", 'odd "name"'})

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.text(alphabet='\\"[]{},: é', max_size=300),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)
OBJECTS = st.dictionaries(st.sampled_from(sorted(WANTED)) | st.text(), VALUES)


def scan(body: bytes, cuts: list[int] | None = None) -> Scanned:
    """Scan a body cut at these places."""
    places = [0, *sorted(cut % (len(body) + 1) for cut in cuts or []), len(body)]
    scanner = Scanner(WANTED)
    for begin, end in itertools.pairwise(places):
        scanner.feed(body[begin:end])
    return scanner.end()


def stand_in(value: Any) -> Any:
    """What the scanner keeps of a short value."""
    return type(value)() if isinstance(value, list | dict) else value


@settings(max_examples=400)
@given(OBJECTS, st.lists(st.integers(0, 10**6)), st.sampled_from([None, 0, 3]), st.booleans())
def test_what_it_finds_is_what_a_parser_finds(
    fields: dict[str, Any], cuts: list[int], indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(fields, indent=indent, ensure_ascii=ascii_only)
    body = text.encode("utf-8", "surrogatepass" if ascii_only else "strict")
    found = scan(body, cuts)
    wanted = {name: value for name, value in fields.items() if name in WANTED}
    assert json.loads(found.fields) == {n: stand_in(v) for n, v in wanted.items()}
    assert set(found.spans) == set(wanted)
    for name, (begin, end) in found.spans.items():
        assert json.loads(body[begin:end]) == wanted[name]


@given(
    st.lists(st.tuples(st.sampled_from(["model", "mod\\u0065l", "n"]), st.integers()), min_size=1)
)
def test_of_several_fields_of_one_name_the_last_counts(pairs: list[tuple[str, int]]) -> None:
    body = ("{" + ",".join(f'"{name}":{value}' for name, value in pairs) + "}").encode()
    found = scan(body)
    assert json.loads(found.fields) == json.loads(body)
    assert {n: json.loads(body[b:e]) for n, (b, e) in found.spans.items()} == json.loads(body)


@given(st.integers(1, 400), st.integers(0, 3000), st.lists(st.integers(0, 10**6)))
def test_an_end_is_found_at_any_depth_and_distance(
    depth: int, length: int, cuts: list[int]
) -> None:
    text = '\\"]}' * (length // 4)
    nested: Any = f"{text}"
    for level in range(depth):
        nested = {"]": nested} if level % 2 else [nested, [], "}"]
    body = json.dumps({"x": nested, "model": "m", "y": text}).encode()
    assert json.loads(scan(body, cuts).fields) == {"model": "m"}


@given(st.binary(), st.lists(st.integers(0, 10**6)))
def test_no_bytes_break_it_and_no_cut_changes_what_it_says(body: bytes, cuts: list[int]) -> None:
    assert outcome(body, cuts) == outcome(body, [])


PIECES_OF_JSON = [
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b" ", b'"model"', b'"m"', b"1", b"-", b"e"),
    *(b"null", b"true", b'{"model":', b'"a":', "é".encode(), b"\xc3", b"\xff", b"\x00", b"[" * 600),
]


@settings(max_examples=400)
@given(st.lists(st.sampled_from(PIECES_OF_JSON)), st.lists(st.integers(0, 10**6)))
def test_what_looks_like_json_is_told_apart_however_it_is_cut(
    pieces: list[bytes], cuts: list[int]
) -> None:
    body = b"".join(pieces)
    told = outcome(body, cuts)
    assert told == outcome(body, [])
    try:
        whole = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    assert isinstance(told, Scanned)  # what a parser takes, it takes
    assert set(told.values) == set(whole) & WANTED


def outcome(body: bytes, cuts: list[int]) -> Scanned | None:
    """What was found; None if it was refused."""
    try:
        return scan(body, cuts)
    except InvalidRequest:
        return None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "ends before its object does"),
        (b'{"model":"m"', "ends before its object does"),
        (b'{"model":"m', "ends before its object does"),
        (b'{"x":[[1]', "ends before its object does"),
        (b"[1]", "Expected `object`, got `array`"),
        (b'"model"', "Expected `object`, got `str`"),
        (b"model", "does not begin with '{'"),
        (b'{"model":"m"}{', "something follows its object (byte 13)"),
        (b'{"model" "m"}', "':' should follow (byte 9)"),
        (b'{"model":"m",}', "a name in quotes should follow"),
        (b'{"model":"m" "x"}', "',' or '}' should follow"),
        (b'{model:"m"}', "'}' or a name in quotes"),
        (b'{"n":}', "a value should follow"),
        (b'{"n":01}', "a value should follow"),
        (b'{"n":NaN}', "a value should follow"),
        (b'{"\\x":1}', "a name is no string"),
        (b'{"n":' + b"1" * 3 * KEPT_BYTES + b"}", "or a number is longer than"),
        (b'{"' + b"n" * 3 * KEPT_BYTES + b'":1}', "a name or a number is longer than"),
        (b'{"n":' + b"[" * 2 * MAX_DEPTH + b"]" * 2 * MAX_DEPTH + b"}", "nests deeper than"),
        (b"{" + b'"x":1,' * (MAX_FIELDS + 1) + b'"n":1}', "has more than"),
        (b'{"model":"\xff"}', "not UTF-8 (byte 10)"),
        (b'{"model":"m"}\xc3', "something follows"),
        (b'{"x":"\xed\xa0\x80"}', "not UTF-8 (byte 6)"),
    ],
)
def test_what_is_no_object_is_refused_and_told_where(body: bytes, said: str) -> None:
    for cuts in ([], list(range(0, min(len(body), 3000), 7))):
        with pytest.raises(InvalidRequest) as refused:
            scan(body, cuts)
        assert said in refused.value.message


# -- whole bodies ------------------------------------------------------------------------------


def came(body: bytes, size: int = 100_000, *, declared: bool = True) -> Body:
    """A body that came in pieces of this size."""
    incoming = Incoming(len(body) if declared else None)
    for at in range(0, len(body), size):
        incoming.add(body[at : at + size])
        while incoming.work():
            pass
    incoming.end()
    while incoming.work():
        pass
    return incoming.whole()


def raw(body: Body) -> bytes:
    return body if isinstance(body, bytes) else b"".join(body.pieces)


def large(fields: str, *, before: bool = False) -> bytes:
    """A body over the limit with these fields behind a long text, or before it."""
    text = f'"prompt":"{"x" * 3 * SMALL_BYTES}"'
    return ("{" + (f"{fields},{text}" if before else f"{text},{fields}") + "}").encode()


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("size", [1000, 65536, 256_000, 10**7])
@pytest.mark.parametrize("before", [True, False])
def test_a_large_body_is_kept_hashed_and_routed(declared: bool, size: int, before: bool) -> None:
    sent = large('"model":"mine","n":2', before=before)
    body = came(sent, size, declared=declared)
    assert isinstance(body, LargeBody)
    assert raw(body) == sent
    assert len(body) == len(sent)
    assert body.digest == digest_of(sent)
    assert model_of(body) == "mine"
    assert max(map(len, body.pieces)) <= PART_BYTES
    assert isinstance(came(b'{"model":"m"}', declared=declared), bytes)


@pytest.mark.parametrize(
    "fields",
    [
        '"n":2',
        '"model":1',
        '"model":""',
        '"model":null',
        '"model":["m"]',
        f'"model":"{"m" * 1025}"',
        f'"model":"{"m" * 2 * KEPT_BYTES}"',
        '"model":"m","temperature":-1',
        '"model":"m","n":[1]',
        f'"model":"m","top_p":"{"1" * 2 * KEPT_BYTES}"',
        '"model":"m","max_tokens":1.5',
    ],
)
def test_a_large_body_is_refused_in_the_same_words_as_a_small_one(fields: str) -> None:
    with pytest.raises(HiveError) as small:
        model_of(f"{{{fields}}}".encode())
    with pytest.raises(HiveError) as refused:
        model_of(came(large(fields)))
    assert refused.value.message == small.value.message
    assert refused.value.param == small.value.param


@given(st.text(min_size=1, max_size=50), st.integers(0, 3 * PIECE_BYTES), st.booleans())
@settings(max_examples=30)
def test_a_large_body_is_renamed_where_its_model_stands(
    name: str, before: int, ascii_only: bool
) -> None:
    old = json.dumps("alter Name ü", ensure_ascii=ascii_only)
    text = "y" * before
    sent = f'{{"text":"{text}","model" : {old},"x":"{"z" * 2 * SMALL_BYTES}"}}'.encode()
    body = came(sent, PIECE_BYTES)
    changed = with_model(body, name)
    assert isinstance(changed, LargeBody)
    assert raw(changed) == sent.replace(old.encode(), msgspec.json.encode(name))
    assert len(changed) == len(raw(changed))
    assert changed.digest == digest_of(raw(changed))
    assert raw(body) == sent
    assert model_of(changed) == name
    assert raw(with_model(changed, "again")) == raw(with_model(body, "again"))
    assert with_model(changed, name) is changed


@settings(max_examples=60)
@given(
    st.sampled_from([10, PART_BYTES, PART_BYTES + 1, PIECE_BYTES, 2 * PIECE_BYTES + 7]),
    st.integers(1, 10**6),
    st.integers(0, 10**7),
    st.integers(0, 10**7),
    st.binary(max_size=9),
)
def test_pieces_hold_what_was_added_and_are_spliced_anywhere(
    size: int, cut: int, begin: int, end: int, between: bytes
) -> None:
    whole = bytes(i * 7 % 251 for i in range(1000)) * (size // 1000 + 1)
    whole = whole[:size]
    pieces = Pieces()
    for at in range(0, size, max(cut, size // 500)):
        pieces.add(whole[at : at + max(cut, size // 500)])
    assert pieces.size == size
    assert b"".join(pieces) == whole
    begin %= size
    end = begin + 1 + end % (size - begin)
    for count in (1, 100, PIECE_BYTES + 1):
        assert pieces.tail(count) == whole[-count:]
    part = pieces.part(begin, 1000)
    assert part
    assert whole[begin:].startswith(part)
    spliced = pieces.spliced(begin, end, between)
    assert b"".join(spliced) == whole[:begin] + between + whole[end:]
    assert spliced.size == size - (end - begin) + len(between)
    assert b"".join(pieces) == whole


def test_routing_and_renaming_agree_for_small_and_large() -> None:
    assert "model" in ROUTING_FIELDS
    sent = large('"model":"a","model":"b"')
    assert model_of(came(sent)) == routed_model(sent) == "b"
    changed = raw(with_model(came(sent), "c"))
    assert routed_model(changed) == routed_model(renamed(sent, "c")) == "c"
