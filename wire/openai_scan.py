"""Reading the few fields that routing needs out of a JSON object too large to be decoded at once.

The object is fed in pieces as it comes. At its top level every token is read; what stands within a
field's value is only searched for the value's end, many bytes at a time: strings and the depth of
brackets are followed, the rest is left for the engine to judge.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Literal

import msgspec

from operations.errors import InvalidRequest

KEPT_BYTES: Final = 16 * 1024  # of a name, a number, or a string whose text is wanted
MAX_DEPTH: Final = 512
MAX_FIELDS: Final = 1024  # of the object; each costs more time than its bytes do

_WALKED: Final = 64  # bytes of a value that are read one by one where it begins and where it ends
_ROUNDS: Final = 8  # of cancelling brackets against each other

_LONG: Final = b'"%b"' % (b"x" * 2048)  # stands for a string that was not kept

_SPACE = re.compile(rb"[ \t\n\r]*+")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_WORD = re.compile(rb"[-+.0-9A-Za-z]*+")
_SCALAR = re.compile(
    rb"-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][-+]?+[0-9]++)?+|true|false|null"
)
_QUOTE, _BACKSLASH = b'"\\'
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_NO_MARK = bytes(set(range(256)) - set(b'"[]{}'))
_STEP = [1 if byte in b"[{" else -1 if byte in b"]}" else 0 for byte in range(256)]

State = Literal["begin", "first", "name", "colon", "value", "within", "next", "end"]


@dataclass(frozen=True, slots=True)
class Scanned:
    """What was found.

    :param values: the wanted fields, the last of each name, as JSON; lists and objects are empty
        here, and strings of over :data:`KEPT_BYTES` are another long one
    :param spans: where the value of each begins and ends in the object, bytes
    """

    values: dict[str, bytes]
    spans: dict[str, tuple[int, int]]

    @property
    def fields(self) -> bytes:
        """A JSON object of them."""
        return b"{%b}" % b",".join(
            msgspec.json.encode(name) + b":" + raw for name, raw in self.values.items()
        )


class Scanner:
    """Scans one object, cut anywhere. Raises :class:`InvalidRequest` as soon as it is none.

    Pieces of some 100 KiB are best: each feed may look again at :data:`KEPT_BYTES` of the last one.

    :param wanted: names of the top-level fields to keep
    """

    __slots__ = (
        "_at",
        "_begin",
        "_decoder",
        "_depth",
        "_escaped",
        "_fed",
        "_fields",
        "_held",
        "_name",
        "_quoted",
        "_spans",
        "_state",
        "_values",
        "_wanted",
    )

    def __init__(self, wanted: frozenset[str]) -> None:
        self._wanted = wanted
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._state: State = "begin"
        self._held = b""  # the beginning of a token
        self._at = 0  # where that is in the object
        self._fed = 0
        self._fields = 0
        self._name = ""
        self._begin = 0  # of the present value
        self._depth = 0  # brackets that the present value has open
        self._quoted = False  # within a string of it
        self._escaped = False  # behind a backslash there
        self._values: dict[str, bytes] = {}
        self._spans: dict[str, tuple[int, int]] = {}

    def feed(self, data: bytes) -> None:
        """More of it."""
        self._check_text(data)
        data = self._held + data if self._held else data
        self._held = b""
        at = 0
        while at < len(data):
            if self._state == "within":
                at = self._skip(data, at)
                continue
            at = _end(_SPACE, data, at)
            if at == len(data):
                break
            then = self._token(data, at)
            if then is None:
                if len(data) - at > KEPT_BYTES:
                    raise self._malformed(
                        at, f"a name or a number is longer than {KEPT_BYTES} bytes"
                    )
                self._held = data[at:]
                break
            at = then
        self._at += at

    def end(self) -> Scanned:
        """There is no more."""
        if self._state != "end" or self._decoder.getstate()[0]:
            raise self._malformed(len(self._held), "it ends before its object does")
        return Scanned(self._values, self._spans)

    def _check_text(self, data: bytes) -> None:
        held = self._decoder.getstate()[0]
        try:
            if held or not data.isascii():
                self._decoder.decode(data)
        except UnicodeDecodeError as error:
            at = self._fed - len(held) + error.start
            raise InvalidRequest(
                f"The body is not UTF-8 (byte {at}). Send UTF-8 JSON.", code="invalid_utf8"
            ) from None
        self._fed += len(data)

    # -- the object itself -------------------------------------------------------------------

    def _token(self, data: bytes, at: int) -> int | None:
        """Read the token at ``at``; where it ends, None if that has not come."""
        byte = data[at : at + 1]
        match self._state:
            case "begin" if byte == b"{":
                self._state = "first"
            case "begin" if byte in b'["':
                got = "array" if byte == b"[" else "str"
                raise InvalidRequest(
                    f"In this request, the body is wrong: Expected `object`, got `{got}`."
                )
            case "first" | "next" if byte == b"}":
                self._state = "end"
            case "first" | "name" if byte == b'"':
                return self._read_name(data, at)
            case "colon" if byte == b":":
                self._state = "value"
            case "value":
                return self._read_value(data, at, byte)
            case "next" if byte == b",":
                self._state = "name"
            case _:
                raise self._malformed(at, _EXPECTED[self._state])
        return at + 1

    def _read_name(self, data: bytes, at: int) -> int | None:
        found = _STRING.match(data, at, at + KEPT_BYTES)
        if found is None:
            return None
        self._fields += 1
        if self._fields > MAX_FIELDS:
            raise self._malformed(at, f"it has more than {MAX_FIELDS} fields")
        try:
            self._name = msgspec.json.decode(found[0], type=str)
        except msgspec.DecodeError:
            raise self._malformed(at, "a name is no string") from None
        self._state = "colon"
        return found.end()

    def _read_value(self, data: bytes, at: int, byte: bytes) -> int | None:
        """Read a value that is short; of one that is not, its beginning."""
        self._begin = self._at + at
        if byte in b"[{":
            self._keep(b"[]" if byte == b"[" else b"{}")
            self._depth = 1
            self._state = "within"
            return at + 1
        if byte == b'"':
            found = _STRING.match(data, at, at + KEPT_BYTES)
            if found is None and len(data) - at < KEPT_BYTES:
                return None
            if found is None:
                self._keep(_LONG)
                self._quoted = True
                self._state = "within"
                return at + 1
            end = found.end()
        else:
            end = _end(_WORD, data, at)
            if end == len(data) or end - at > KEPT_BYTES:
                return None
            if _SCALAR.fullmatch(data, at, end) is None:
                raise self._malformed(at, _EXPECTED["value"])
        self._keep(data[at:end])
        self._end_value(end)
        return end

    def _keep(self, raw: bytes) -> None:
        if self._name in self._wanted:
            self._values[self._name] = raw

    def _end_value(self, at: int) -> None:
        self._state = "next"
        if self._name in self._wanted:
            self._spans[self._name] = (self._begin, self._at + at)

    # -- within a value ----------------------------------------------------------------------

    def _skip(self, data: bytes, at: int) -> int:
        """Go on to where the present value ends, or to the end of ``data``.

        Ever longer stretches are tried; where one has the end in it, ever shorter ones.
        """
        at = self._walk(data, at, min(at + _WALKED, len(data)))
        stretch, longer = 4 * _WALKED, True
        while at < len(data) and self._state == "within":
            end = min(at + stretch, len(data))
            if self._passes(data[at:end], at):
                at = end
                stretch *= 4 if longer else 1
            elif stretch > _WALKED:
                stretch, longer = stretch // 4, False
            else:
                at = self._walk(data, at, end)
        return at

    def _passes(self, stretch: bytes, at: int) -> bool:
        """Take in a stretch, unless the value ends in it."""
        plain = stretch[1:] if self._escaped else stretch
        if b"\\" in plain:
            plain = plain.replace(b"\\\\", b"").replace(b'\\"', b"")
        marks = plain.translate(_ONE_KIND, _NO_MARK).replace(b'""', b"")
        parts = marks.split(b'"')  # by turns outside of strings and within
        ends_quoted = self._quoted ^ (len(parts) % 2 == 0)
        if self._depth:
            brackets = b"".join(parts[1 if self._quoted else 0 :: 2])
            depth = self._depth_behind(brackets, at)
            if not depth:
                return False
            self._depth = depth
        elif b'"' in plain:
            return False  # it is a string, and here it ends
        self._quoted = ends_quoted
        self._escaped = plain.endswith(b"\\")
        return True

    def _depth_behind(self, brackets: bytes, at: int) -> int:
        """The depth behind these, all of one kind; 0 if the value ends among them."""
        for _ in range(_ROUNDS):
            shorter = brackets.replace(b"[]", b"")
            if len(shorter) == len(brackets):
                break
            brackets = shorter
        closing = brackets.count(b"]")
        highest = behind = self._depth + len(brackets) - 2 * closing
        if closing >= self._depth or highest + closing > MAX_DEPTH:
            depths = list(accumulate(map(_STEP.__getitem__, brackets), initial=self._depth))
            highest, behind = max(depths), depths[-1] if min(depths) > 0 else 0
        self._check_depth(highest, at)
        return behind

    def _walk(self, data: bytes, at: int, end: int) -> int:
        """Go byte by byte to where the value ends, or to ``end``."""
        for place in range(at, end):
            byte = data[place]
            if self._escaped:
                self._escaped = False
            elif byte == _BACKSLASH:
                self._escaped = True
            elif byte == _QUOTE:
                self._quoted = not self._quoted
            elif not self._quoted:
                self._depth += _STEP[byte]
            if not (self._quoted or self._depth):
                self._end_value(place + 1)
                return place + 1
        self._check_depth(self._depth, at)
        return end

    def _check_depth(self, depth: int, at: int) -> None:
        if depth > MAX_DEPTH:
            raise self._malformed(at, f"it nests deeper than {MAX_DEPTH} levels")

    def _malformed(self, at: int, why: str) -> InvalidRequest:
        return InvalidRequest(
            f"The body is not JSON that can be routed: {why} (byte {self._at + at}). "
            "Send one JSON object.",
            code="invalid_json",
        )


def _end(pattern: re.Pattern[bytes], data: bytes, at: int) -> int:
    found = pattern.match(data, at)
    assert found is not None  # it may match nothing
    return found.end()


_EXPECTED: Final[dict[State, str]] = {
    "begin": "it does not begin with '{'",
    "first": "'}' or a name in quotes should follow",
    "name": "a name in quotes should follow",
    "colon": "':' should follow",
    "value": "a value should follow",
    "next": "',' or '}' should follow",
    "end": "something follows its object",
}
