"""What a GGUF file says about itself: its header, read without loading the model.

The format is that of ggml's ``docs/gguf.md``, versions 2 and 3, little endian: a magic number, the
counts of tensors and of metadata entries, the entries (key, type, value), one description per
tensor, then the tensors' data. The file may be anybody's, so nothing it says is believed: every
count and length is held against the file's size and against limits that no real model comes near.
Arrays such as a vocabulary of 250,000 words are passed over in milliseconds.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Final

from operations.errors import InvalidRequest
from operations.hosts import Pooling

MAGIC: Final = b"GGUF"
MAX_ENTRIES: Final = 65_536
MAX_TENSORS: Final = 262_144
MAX_KEY_BYTES: Final = 1024
MAX_TEXT_BYTES: Final = 16 * 2**20
MAX_ARRAY_STRINGS: Final = 8_000_000
"""In all lists of one file together; bounds the time that a hostile file can cost."""

MAX_NUMBERS: Final = 65_536
"""Numbers kept from all lists of one file together: they hold one value per layer."""

MAX_LAYERS: Final = 4096
"""Blocks whose weights are counted apart; what claims to lie beyond counts among the rest."""

WINDOW_BYTES: Final = 2**20

QUANTIZATIONS: Final = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
    40: "Q1_0",
}
"""``general.file_type`` (``llama_ftype`` in llama.h) as text."""

TENSOR_TYPES: Final = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""``ggml_type``: name, elements in a block, bytes of a block. Unknown types are not measured."""

POOLINGS: Final[Mapping[int, Pooling]] = {1: "mean", 2: "cls", 3: "last", 4: "rank"}
"""``<architecture>.pooling_type`` (``llama_pooling_type`` in llama.h) as text; 0 is none."""

_STRING, _ARRAY = 8, 9
_SCALARS: Final = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32 = _SCALARS[4]
_U64 = _SCALARS[10]
_MIN_ENTRY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8

_ENCODERS = ("bert", "t5encoder", "gemma-embedding")
_BLOCK = re.compile(r"blk\.(\d{1,4})\.")
_ARCHITECTURE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TEXTS = frozenset(
    {
        "adapter.type",
        "general.architecture",
        "general.name",
        "general.type",
        "tokenizer.chat_template",
    }
)
_NUMBERS = frozenset(
    {"general.alignment", "general.file_type", "split.no", "split.count", "split.tensors.count"}
)
_NUMBERS_OF_ARCHITECTURE = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.key_length_mla",
        "attention.key_length_swa",
        "attention.shared_kv_layers",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "attention.value_length",
        "attention.value_length_mla",
        "attention.value_length_swa",
        "block_count",
        "context_length",
        "embedding_length",
        "expert_count",
        "expert_feed_forward_length",
        "expert_shared_count",
        "expert_shared_feed_forward_length",
        "expert_used_count",
        "feed_forward_length",
        "leading_dense_block_count",
        "pooling_type",
        "ssm.inner_size",
        "ssm.state_size",
    }
)

Scalar = int | float | bool | str
Value = Scalar | list[int | float | bool]


@dataclass(frozen=True)
class TensorBytes:
    """Where the weights of one file lie, in bytes. Tensors of unknown types are not measured.

    :param layers: of each block, as far as this file holds any of it
    :param embedding: the table of token embeddings
    :param output: the output head; 0 where it is the embedding's table
    :param other: all else, such as the last norm
    :param data: the part of the file after its header, known types or not
    :param vocabulary: rows of the embedding's table; 0 where this file does not hold it
    """

    layers: tuple[int, ...] = ()
    embedding: int = 0
    output: int = 0
    other: int = 0
    data: int = 0
    vocabulary: int = 0


@dataclass(frozen=True)
class GGUFHeader:
    """What the agent wants to know of a GGUF.

    :param kind: ``general.type``: ``model``, ``adapter``, ``mmproj``, …
    :param adapter: ``adapter.type``: ``lora``
    :param context_length: tokens that the model was trained for
    :param quantization: ``Q8_0`` etc., from ``general.file_type``, else the commonest type
    :param is_embedding: it pools its output, so it serves ``/v1/embeddings`` and not chat
    :param pooling: how, where it says so
    :param split_index: which part of a split model this is, from 0
    :param split_count: how many parts there are; 1 if it is whole
    :param split_tensors: tensors in all parts together, where it is one of several
    :param tensor_count: tensors in this file
    :param parameters: weights in the tensors of this file
    :param layers: transformer blocks
    :param kv_bytes_per_token: KV cache of one token of context at 16 bits, bytes; None where the
        header does not say enough
    :param numbers: whole numbers about the architecture, under their keys without its name, such
        as ``attention.sliding_window``; a tuple where each layer has its own
    """

    version: int
    kind: str
    architecture: str
    name: str | None
    context_length: int | None
    quantization: str | None
    chat_template: str | None
    is_embedding: bool
    pooling: Pooling | None
    split_index: int
    split_count: int
    parameters: int
    layers: int | None
    embedding_length: int | None
    kv_bytes_per_token: int | None
    numbers: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    tensors: TensorBytes = TensorBytes()
    adapter: str | None = None
    tensor_count: int = 0
    split_tensors: int | None = None


def read_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file and check that the file is whole.

    :raises InvalidRequest: the file is missing, unreadable, no regular file, no GGUF, of a version
        unknown here, damaged or shorter than its header says
    """
    with _opened(path) as (fd, size):
        source = _Source(lambda count, offset: os.pread(fd, count, offset), size, path)
        try:
            return _parse(source)
        except OSError as error:
            raise unreadable(path, error) from None


def read_beginning(data: bytes, size: int, name: str) -> GGUFHeader | None:
    """The header of a GGUF file of which only the beginning is here; None where that is too little.

    :param size: of the whole file, bytes
    :param name: of the file, for messages
    :raises InvalidRequest: it is no GGUF, of a version unknown here, or damaged
    """

    def read(count: int, offset: int) -> bytes:
        if offset >= len(data) and offset < size:
            raise _NotHere
        return data[offset : offset + count]

    try:
        return _parse(_Source(read, size, name))
    except _NotHere:
        return None


class _NotHere(Exception):
    """What lies beyond the beginning was asked for."""


def _parse(source: _Source) -> GGUFHeader:
    magic = source.take(4) if source.size >= 4 else b""
    if magic != MAGIC:
        begins = f"it begins with {source.beginning()!r}" if source.size else "it is empty"
        raise InvalidRequest(
            f"{source.path} is no GGUF file: {begins}; give a .gguf file.",
            code="not_gguf",
            param="model",
        )
    version = source.u32()
    if version not in (2, 3):
        swapped = version & 0xFFFF == 0
        what = "is big endian" if swapped else f"has version {version}"
        raise source.broken(f"{what}, and only little-endian versions 2 and 3 are known")
    tensors = source.count(MAX_TENSORS, _MIN_TENSOR_BYTES, "tensors")
    entries = source.count(MAX_ENTRIES, _MIN_ENTRY_BYTES, "metadata entries")
    metadata: dict[str, Value] = {}
    for _ in range(entries):
        key = source.text(MAX_KEY_BYTES)
        value = source.value(source.u32(), key)
        if value is not None:
            metadata.setdefault(key, value)
    parameters, types, weights = _tensors(source, tensors, metadata)
    header = _header(version, metadata, parameters, types, weights, source)
    return replace(header, tensor_count=tensors)


def _tensors(
    source: _Source, count: int, metadata: dict[str, Value]
) -> tuple[int, Counter[str], TensorBytes]:
    """Weights in all tensors, by type and by place; refuses a file that ends before their data."""
    parameters = 0
    types: Counter[str] = Counter()
    places: Counter[int | str] = Counter()
    vocabulary = 0
    data_bytes = 0
    for _ in range(count):
        tensor = source.text(MAX_KEY_BYTES)
        dimensions = source.u32()
        if dimensions > 4:
            raise source.broken(f"describes a tensor with {dimensions} dimensions")
        shape = [source.u64() for _ in range(dimensions)]
        elements = prod(shape)
        kind = source.u32()
        offset = source.u64()
        parameters += elements
        name, block, block_bytes = TENSOR_TYPES.get(kind, ("", 1, 0))
        if name:
            types[name] += elements
        tensor_bytes = -(-elements // block) * block_bytes
        places[_place(tensor)] += tensor_bytes
        if tensor == "token_embd.weight" and dimensions == 2:
            vocabulary = shape[1]
        data_bytes = max(data_bytes, offset + tensor_bytes)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise source.broken("has an impossible alignment")
    start = -(-source.position // alignment) * alignment
    if count and start + data_bytes > source.size:
        missing = start + data_bytes - source.size
        raise source.broken(f"is cut off: {missing:,} bytes are missing at its end")
    blocks = 1 + max((place for place in places if isinstance(place, int)), default=-1)
    return (
        parameters,
        types,
        TensorBytes(
            layers=tuple(places[block] for block in range(blocks)),
            embedding=places["token_embd"],
            output=places["output"],
            other=places["other"],
            data=max(0, source.size - start) if count else 0,
            vocabulary=vocabulary,
        ),
    )


def _place(tensor: str) -> int | str:
    """A tensor's block, or which part outside all blocks it belongs to."""
    block = _BLOCK.match(tensor)
    if block is not None and int(block[1]) < MAX_LAYERS:
        return int(block[1])
    first = tensor.partition(".")[0]
    return first if first in ("token_embd", "output") else "other"


def _header(
    version: int,
    metadata: dict[str, Value],
    parameters: int,
    types: Counter[str],
    weights: TensorBytes,
    source: _Source,
) -> GGUFHeader:
    def text(key: str) -> str | None:
        value = metadata.get(key)
        return value if isinstance(value, str) and value else None

    def whole(key: str) -> int | None:
        value = metadata.get(key)
        if isinstance(value, list):  # one value per layer
            value = max((v for v in value if isinstance(v, int)), default=None)
        return value if type(value) is int and 0 <= value < 2**63 else None

    architecture = text("general.architecture")
    split_count = max(1, whole("split.count") or 1)
    split_index = whole("split.no") or 0
    if architecture is None and split_index > 0:
        architecture = "unknown"  # later parts of a split model carry no metadata
    if architecture is None or not _ARCHITECTURE.fullmatch(architecture):
        raise source.broken("does not name its architecture")
    arch = architecture
    file_type = whole("general.file_type")
    commonest = types.most_common(1)[0][0] if types else None
    pooling = whole(f"{arch}.pooling_type")
    return GGUFHeader(
        version=version,
        kind=text("general.type") or "model",
        architecture=arch,
        name=text("general.name"),
        context_length=whole(f"{arch}.context_length"),
        quantization=QUANTIZATIONS.get(-1 if file_type is None else file_type, commonest),
        chat_template=text("tokenizer.chat_template"),
        is_embedding=bool(pooling) or any(name in arch for name in _ENCODERS),
        pooling=POOLINGS.get(pooling or 0),
        split_index=split_index,
        split_count=split_count,
        parameters=parameters,
        layers=whole(f"{arch}.block_count"),
        embedding_length=whole(f"{arch}.embedding_length"),
        kv_bytes_per_token=_kv_bytes_per_token(arch, metadata, whole),
        numbers=_numbers(arch, metadata),
        tensors=weights,
        adapter=text("adapter.type"),
        split_tensors=whole("split.tensors.count"),
    )


def _numbers(arch: str, metadata: dict[str, Value]) -> dict[str, int | tuple[int, ...]]:
    """What the metadata says about the architecture in whole numbers that are not negative."""
    numbers: dict[str, int | tuple[int, ...]] = {}
    for key, value in metadata.items():
        owner, _, name = key.partition(".")
        if owner != arch or name not in _NUMBERS_OF_ARCHITECTURE:
            continue
        if isinstance(value, list):
            whole = tuple(int(v) for v in value if isinstance(v, int) and 0 <= v < 2**63)
            if len(whole) == len(value):
                numbers[name] = whole
        elif isinstance(value, int) and 0 <= value < 2**63:
            numbers[name] = int(value)
    return numbers


def _kv_bytes_per_token(
    arch: str, metadata: dict[str, Value], whole: Callable[[str], int | None]
) -> int | None:
    """16-bit keys and values of all layers; exact where each layer has its own number of heads."""
    layers = whole(f"{arch}.block_count")
    heads = whole(f"{arch}.attention.head_count")
    width = whole(f"{arch}.embedding_length")
    if not layers or not heads or not width:
        return None
    per_layer = metadata.get(f"{arch}.attention.head_count_kv")
    if isinstance(per_layer, list):
        kv_heads = sum(v for v in per_layer if type(v) is int and v >= 0)
    else:
        kv_heads = layers * (whole(f"{arch}.attention.head_count_kv") or heads)
    key = whole(f"{arch}.attention.key_length") or width // heads
    value = whole(f"{arch}.attention.value_length") or width // heads
    return kv_heads * (key + value) * 2


class _Source:
    """A file read forwards through one window of bounded size; knows where the file ends.

    Read rather than mapped: a mapped file that somebody shortens ends the process.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, path: Path | str) -> None:
        """:param read: the bytes of the file: at most so many, from an offset on"""
        self.size = size
        self.path = path
        self.position = 0
        self._read_at = read
        self._window = b""
        self._start = 0
        self._strings_left = MAX_ARRAY_STRINGS
        self._numbers_left = MAX_NUMBERS

    def beginning(self) -> bytes:
        return self._read_at(4, 0)

    def broken(self, what: str) -> InvalidRequest:
        return InvalidRequest(
            f"{self.path} {what}. Fetch or convert it again.", code="bad_gguf", param="model"
        )

    def left(self) -> int:
        return self.size - self.position

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        at = self._fill(count)
        self.position += count
        return self._window[at : at + count]

    def skip(self, count: int) -> None:
        self._check(count)
        self.position += count

    def u32(self) -> int:
        value: int = _U32.unpack(self.take(4))[0]
        return value

    def u64(self) -> int:
        value: int = _U64.unpack(self.take(8))[0]
        return value

    def count(self, limit: int, item_bytes: int, what: str) -> int:
        """A number of things of at least ``item_bytes`` bytes each that are still to come."""
        count = self.u64()
        if count > limit or count * item_bytes > self.left():
            raise self.broken(f"claims {count:,} {what}, which cannot be")
        return count

    def text(self, limit: int) -> str:
        length = self.u64()
        if length > limit:
            raise self.broken(f"holds a text of {length:,} bytes where {limit:,} are allowed")
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int, key: str) -> Value | None:
        """The value of an entry; None for one that nobody asks for, such as a vocabulary."""
        wanted = key in _NUMBERS or key.partition(".")[2] in _NUMBERS_OF_ARCHITECTURE
        if kind == _STRING and key in _TEXTS:
            return self.text(MAX_TEXT_BYTES)
        if kind == _STRING:
            self.skip(self.u64())
            return None
        if kind == _ARRAY:
            return self._list(wanted)
        if kind not in _SCALARS:
            raise self.broken(f"holds a value of the unknown type {kind}")
        number = self._number(kind)
        return number if wanted else None

    def _list(self, wanted: bool) -> Value | None:
        kind = self.u32()
        if kind == _STRING:
            self._skip_strings(self.count(self._strings_left, 8, "texts in a list"))
            return None
        if kind not in _SCALARS:
            raise self.broken(f"holds a list of the unknown type {kind}")
        size = _SCALARS[kind].size
        count = self.count(2**40, size, "numbers in a list")
        if not wanted or count > self._numbers_left:
            self.skip(count * size)
            return None
        self._numbers_left -= count
        return [self._number(kind) for _ in range(count)]

    def _number(self, kind: int) -> int | float | bool:
        scalar = _SCALARS[kind]
        value: int | float | bool = scalar.unpack(self.take(scalar.size))[0]
        return value

    def _skip_strings(self, count: int) -> None:
        """Pass over length-prefixed strings: one addition each while they lie in the window."""
        self._strings_left -= count
        unpack = _U64.unpack_from
        while count:
            at = self._fill(8)
            window = self._window
            last = len(window) - 8
            while count and at <= last:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self.skip(self._start + at - self.position)

    def _check(self, count: int) -> None:
        if count > self.left():
            raise self.broken("is cut off or damaged: its header runs past its end")

    def _fill(self, count: int) -> int:
        """Make the window hold the next ``count`` bytes; where in it they begin."""
        self._check(count)
        at = self.position - self._start
        if at + count > len(self._window):
            self._window = self._read(max(count, WINDOW_BYTES))
            self._start = self.position
            at = 0
            if len(self._window) < count:
                raise self.broken("became shorter while it was read")
        return at

    def _read(self, count: int) -> bytes:
        chunks = []
        offset = self.position
        while count > 0 and (chunk := self._read_at(count, offset)):
            chunks.append(chunk)
            offset += len(chunk)
            count -= len(chunk)
        return b"".join(chunks)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """A regular file's descriptor and size in bytes; opening a pipe or a device never blocks."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            what = "a folder" if stat.S_ISDIR(facts.st_mode) else "no regular file"
            raise InvalidRequest(
                f"{path} is {what}; give a .gguf file.", code="not_gguf", param="model"
            )
        yield fd, facts.st_size
    finally:
        os.close(fd)


def unreadable(path: Path, error: Exception) -> InvalidRequest:
    """What to tell somebody whose file could not be opened."""
    if isinstance(error, FileNotFoundError):
        reason = "it does not exist on this machine"
    elif isinstance(error, PermissionError):
        reason = "the hive agent has no permission to read it"
    else:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return InvalidRequest(
        f"{path} cannot be read: {reason}; give a .gguf file that can.",
        code="file_unreadable",
        param="model",
    )
