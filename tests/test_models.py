"""What models are called, what GGUF files say, and what the catalog finds on a disk."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import psutil
import pytest
from filelock import FileLock
from huggingface_hub import scan_cache_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hive_agent.models import cache
from hive_agent.models.catalog import AT_ONCE_BYTES, SHIPPED, SHIPPED_ID, Catalog
from hive_agent.models.derived import adapters
from hive_agent.models.digests import Digests, FileKey
from hive_agent.models.gguf import QUANTIZATIONS, TENSOR_TYPES, read_header
from hive_agent.models.hub import Hub
from hive_agent.models.references import parse_reference
from hive_agent.models.safetensors import PARSED_HEADER_BYTES, check_weights, read_config
from hive_agent.models.variants import Variant, choose, ids, label_of, variants
from operations.errors import Conflict, Forbidden, HiveError, InvalidRequest, NotFound
from operations.hosts import ModelInfo
from operations.names import taken_by
from operations.operations import Lora
from tests.gguf_files import write_gguf
from tests.hub import HubServer, noise

ANY_FILE = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# -- references -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Qwen/Qwen3-0.6B-GGUF", ("Qwen/Qwen3-0.6B-GGUF", None, None)),
        ("org/repo:Q4_K_M", ("org/repo", "Q4_K_M", None)),
        ("org/repo:UD-Q4_K_XL", ("org/repo", "UD-Q4_K_XL", None)),
        ("org/repo:file.gguf", ("org/repo", "file.gguf", None)),
        ("org/repo:a folder/File.GGUF", ("org/repo", "a folder/File.GGUF", None)),
        ("file:/models/x.gguf", (None, None, Path("/models/x.gguf"))),
        ("file:///models/x.gguf", (None, None, Path("/models/x.gguf"))),
        ("FILE:/models/a folder/", (None, None, Path("/models/a folder"))),
    ],
)
def test_a_reference_is_read(text: str, parts: tuple[str | None, str | None, Path | None]) -> None:
    reference = parse_reference(text)
    assert (reference.repo, reference.selector, reference.path) == parts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "repo",
        "a/b/c",
        "/repo",
        "org/",
        "../repo",
        "org/..",
        "org/a--b",
        "org/repo.git",
        "org/repo@main",
        "org/repo:",
        "org/repo:../x.gguf",
        "org/repo:/etc/x.gguf",
        "org/repo:a//x.gguf",
        "org/repo:a\\x.gguf",
        "org/repo:Q4 K",
        "org/repo:x\n.gguf",
        "org/repo\0",
        "file:",
        "file:/",
        "file:models/x.gguf",
        "file:~/x.gguf",
        "file:/models/../etc/passwd",
        "file:/models//x.gguf",
        "file:/models/\u202ex.gguf",
        "file:/" + "x" * 2000,
    ],
)
def test_what_is_no_reference_is_refused_with_the_forms_there_are(text: str) -> None:
    with pytest.raises(InvalidRequest, match="org/repo:Q4_K_M"):
        parse_reference(text)


@given(st.text(max_size=60) | st.from_regex(r"(file:)?[a-zA-Z./:_-]{1,40}", fullmatch=True))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    try:
        reference = parse_reference(text)
    except InvalidRequest:
        return
    assert parse_reference(str(reference)) == reference
    assert (reference.repo is None) != (reference.path is None)
    if reference.path is not None:
        assert reference.path.is_absolute()
        assert ".." not in reference.path.parts
    if reference.selects_file:
        assert os.path.normpath(reference.selector or "") == reference.selector


# -- variants -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("Qwen3-0.6B-Q8_0.gguf", "Q8_0"),
        ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("mistral-7b-v0.1.Q4_K_M.gguf", "Q4_K_M"),
        ("model.i1-IQ3_XXS.gguf", "IQ3_XXS"),
        ("Qwen3-8B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Phi-3-mini-4k-instruct-fp16.gguf", "F16"),
        ("gemma-bf16.gguf", "BF16"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("tiny_q4_0.gguf", "Q4_0"),
        ("m-Q4_0_4_4.gguf", "Q4_0_4_4"),
        ("Q5_K_S/model-00001-of-00002.gguf", "Q5_K_S"),
        ("Q5_K_S/model-Q6_K-00001-of-00002.gguf", "Q6_K"),
        ("model.gguf", None),
        ("Qwen3.gguf", None),
    ],
)
def test_the_quantization_is_read_from_the_name(path: str, label: str | None) -> None:
    assert label_of(path) == label


def chosen(paths: list[str], selector: str | None = None) -> tuple[str, ...]:
    return choose("org/repo", variants(paths), selector).files


def test_without_a_selector_the_only_or_the_preferred_gguf_is_taken() -> None:
    assert chosen(["odd.gguf", "mmproj-F16.gguf", "config.json"]) == ("odd.gguf",)
    assert chosen(["m-Q8_0.gguf", "m-Q5_K_M.gguf", "m-F16.gguf"]) == ("m-Q5_K_M.gguf",)
    assert chosen(["m-Q8_0.gguf", "m-f16.gguf", "m-Q2_K.gguf"]) == ("m-Q8_0.gguf",)
    with pytest.raises(Conflict, match="org/repo:Q2_K, org/repo:Q3_K_S"):
        chosen(["m-Q2_K.gguf", "m-Q3_K_S.gguf"])


def test_a_selector_is_a_quantization_or_a_file_in_any_case() -> None:
    paths = ["a/m-Q8_0.gguf", "m-Q4_0.gguf", "M-Q4_K_M.gguf"]
    assert chosen(paths, "q8_0") == ("a/m-Q8_0.gguf",)
    assert chosen(paths, "M-q8_0.gguf") == ("a/m-Q8_0.gguf",)
    assert chosen(paths, "A/m-q8_0.GGUF") == ("a/m-Q8_0.gguf",)
    with pytest.raises(NotFound, match="org/repo:Q4_0, org/repo:Q4_K_M, org/repo:Q8_0"):
        chosen(paths, "Q6_K")


def test_one_quantization_in_two_folders_is_ambiguous() -> None:
    paths = ["a/m-Q8_0.gguf", "b/m-Q8_0.gguf"]
    for selector in ("Q8_0", "m-q8_0.gguf", None):
        with pytest.raises(Conflict, match=r"org/repo:a/m-Q8_0\.gguf, org/repo:b/m-Q8_0\.gguf"):
            chosen(paths, selector)
    assert chosen(paths, "b/m-Q8_0.gguf") == ("b/m-Q8_0.gguf",)


def test_a_split_model_counts_when_it_is_whole() -> None:
    parts = [f"m-Q4_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert variants(parts[:2]) == []
    (whole,) = variants(reversed(parts))
    assert whole.files == tuple(parts)
    assert ids("org/repo", [whole]) == ["org/repo:Q4_0"]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert variants(["config.json", shards[0]]) == []
    assert variants([shards[0], shards[1]]) == [], "no engine loads weights without a config.json"
    (model,) = variants(["config.json", "README.md", *shards])
    assert model.files == ("config.json", *shards)


@given(st.lists(st.from_regex(r"[abQ8_0/]{1,8}(-0000[12]-of-00002)?\.gguf", fullmatch=True)))
def test_every_model_of_a_repository_has_an_id_that_chooses_it(paths: list[str]) -> None:
    found: list[Variant] = variants(set(paths))
    names = ids("org/repo", found)
    for name, variant in zip(names, found, strict=True):
        try:
            assert choose("org/repo", found, name.partition(":")[2]) == variant
        except Conflict:  # names that differ only in case
            assert len({file.lower() for v in found for file in v.files}) < sum(
                len(v.files) for v in found
            )


# -- GGUF headers ---------------------------------------------------------------------------------


def test_a_header_tells_what_the_model_is(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "x.gguf",
        architecture="qwen3",
        name="A name",
        context_length=4096,
        file_type=15,
        chat_template="{{ messages }}",
        tokens=100,
        elements=96,
        metadata={
            "qwen3.block_count": 4,
            "qwen3.embedding_length": 64,
            "qwen3.attention.head_count": 8,
            "qwen3.attention.head_count_kv": [2, 2, 1, 1],
            "general.some.text": "x",
            "general.some.flag": True,
        },
    )
    header = read_header(path)
    assert (header.version, header.kind, header.architecture) == (3, "model", "qwen3")
    assert (header.name, header.context_length, header.quantization) == ("A name", 4096, "Q4_K_M")
    assert (header.chat_template, header.is_embedding) == ("{{ messages }}", False)
    assert (header.split_index, header.split_count) == (0, 1)
    assert (header.parameters, header.layers, header.embedding_length) == (96, 4, 64)
    assert header.kv_bytes_per_token == 6 * (8 + 8) * 2


def test_the_shipped_model_is_read() -> None:
    header = read_header(SHIPPED)
    assert (header.architecture, header.quantization) == ("llama", "Q8_0")
    assert header.chat_template


@pytest.mark.parametrize(
    ("architecture", "metadata", "embedding"),
    [
        ("llama", {}, False),
        ("qwen3", {"qwen3.pooling_type": 3}, True),
        ("llama", {"llama.pooling_type": 0}, False),
        ("nomic-bert", {}, True),
    ],
)
def test_a_model_that_pools_is_an_embedding_model(
    tmp_path: Path, architecture: str, metadata: Mapping[str, Any], embedding: bool
) -> None:
    path = write_gguf(tmp_path / "x.gguf", architecture=architecture, metadata=metadata)
    assert read_header(path).is_embedding is embedding


def test_the_commonest_type_stands_in_for_a_missing_file_type(tmp_path: Path) -> None:
    assert read_header(write_gguf(tmp_path / "x.gguf", file_type=None)).quantization == "F32"


def test_a_large_vocabulary_is_passed_over_quickly(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", tokens=250_000, chat_template="after it")
    began = time.process_time()
    assert read_header(path).chat_template == "after it"
    assert time.process_time() - began < 0.5


def test_the_tables_are_those_of_the_gguf_package() -> None:
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        if kind in TENSOR_TYPES:
            assert TENSOR_TYPES[kind] == (kind.name, block, size)
    for file_type in gguf.LlamaFileType:
        if file_type in QUANTIZATIONS:
            name = file_type.name.removeprefix("MOSTLY_").removeprefix("ALL_")
            assert QUANTIZATIONS[file_type] == name


def test_what_is_no_gguf_is_refused_with_a_reason(tmp_path: Path) -> None:
    def reason(path: Path) -> str:
        with pytest.raises(InvalidRequest) as error:
            read_header(path)
        return error.value.message

    text = tmp_path / "x.gguf"
    text.write_bytes(b"PK\x03\x04 and more")
    assert reason(text) == (
        f"{text} is no GGUF file: it begins with b'PK\\x03\\x04'; give a .gguf file."
    )
    text.write_bytes(b"")
    assert "it is empty" in reason(text)
    text.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(100))
    assert "big endian" in reason(text)
    text.write_bytes(b"GGUF" + struct.pack("<I", 1) + bytes(100))
    assert "version 1" in reason(text)
    assert "is a folder" in reason(tmp_path)
    assert "does not exist" in reason(tmp_path / "none.gguf")
    assert "cannot be read" in reason(tmp_path / ("x" * 300))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "no regular file" in reason(pipe)
    assert "no regular file" in reason(Path("/dev/zero"))


def test_a_file_that_was_cut_off_says_how_much_is_missing(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", elements=1000)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(InvalidRequest, match="cut off: 100 bytes"):
        read_header(path)


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


ARCHITECTURE = entry(b"general.architecture", 8, struct.pack("<Q", 1) + b"x")


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<QQ", 0, 2**63),
        struct.pack("<QQ", 2**40, 1) + ARCHITECTURE,
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**62),
        struct.pack("<QQ", 0, 1) + entry(b"k", 8, struct.pack("<Q", 2**64 - 1)),
        struct.pack("<QQ", 0, 1) + entry(b"k", 9, struct.pack("<IQ", 8, 2**61)),
        struct.pack("<QQ", 0, 1) + entry(b"k", 9, struct.pack("<IQ", 8, 2) + b"\xff" * 16),
        struct.pack("<QQ", 0, 1) + entry(b"k", 9, struct.pack("<IQ", 10, 2**61)),
        struct.pack("<QQ", 0, 1) + entry(b"k", 9, struct.pack("<IQ", 9, 1)),
        struct.pack("<QQ", 0, 1) + entry(b"k", 99, b""),
        struct.pack("<QQ", 0, 1) + entry(b"general.alignment", 4, struct.pack("<I", 0)),
        struct.pack("<QQ", 0, 1) + entry(b"general.name", 4, struct.pack("<I", 0)),
        struct.pack("<QQ", 0, 1)
        + entry(b"general.architecture", 8, struct.pack("<Q", 4) + b"\x1b[2J"),
        struct.pack("<QQ", 1, 1) + ARCHITECTURE + struct.pack("<Q", 1) + b"t\xff\xff\xff\xff",
        struct.pack("<QQ", 1, 1)
        + ARCHITECTURE
        + struct.pack("<Q1sI4QIQ", 1, b"t", 4, *[2**63] * 4, 0, 2**63),
    ],
)
def test_impossible_claims_are_refused_in_no_time(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + body + bytes(200))
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 1


def test_a_file_of_many_empty_strings_costs_bounded_time(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with path.open("wb") as file:
        count = 2**30  # 8 GB of zeros that take no room on disk
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1))
        file.write(entry(b"k", 9, struct.pack("<IQ", 8, count)))
        file.truncate(8 * count + 1000)
    with pytest.raises(InvalidRequest, match="cannot be"):
        read_header(path)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write_gguf(
        tmp_path_factory.mktemp("whole") / "x.gguf",
        chat_template="{{ x }}",
        tokens=20,
        metadata={"llama.attention.head_count_kv": [1, 2, 3], "llama.block_count": 3},
    )
    return path.read_bytes()


@ANY_FILE
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused(tmp_path: Path, whole_file: bytes, data: Any) -> None:
    mutated = bytearray(whole_file)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        new = data.draw(st.binary(min_size=1, max_size=9))
        mutated[at : at + len(new)] = new
    check_hostile(tmp_path / "x.gguf", bytes(mutated))


@ANY_FILE
@given(count=st.integers(0, 3000), rest=st.binary(max_size=40))
def test_a_truncated_file_is_refused(
    tmp_path: Path, whole_file: bytes, count: int, rest: bytes
) -> None:
    count = min(count, len(whole_file) - 100)
    check_hostile(tmp_path / "x.gguf", whole_file[:count] + rest)


@ANY_FILE
@given(rest=st.binary(max_size=300))
def test_noise_after_the_magic_is_refused(tmp_path: Path, rest: bytes) -> None:
    check_hostile(tmp_path / "x.gguf", b"GGUF\x03\0\0\0" + rest)


def check_hostile(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    began = time.process_time()
    with contextlib.suppress(InvalidRequest):
        read_header(path)
    assert time.process_time() - began < 1


# -- the catalog ----------------------------------------------------------------------------------


class Disk:
    """A cache and a state folder of a test's own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache = root / "hub"
        self.state = root / "state"
        self.state.mkdir()

    def catalog(self, shipped: Path | None = None) -> Catalog:
        return Catalog(
            cache_dir=self.cache, state_dir=self.state, shipped=shipped or self.root / "none"
        )

    def put(
        self,
        repo: str,
        files: Mapping[str, bytes | Path],
        commit: str = "a" * 40,
        main: bool = True,
    ) -> Path:
        """Lay files out as huggingface_hub does: .gguf and .safetensors under their SHA-256."""
        folder = cache.repo_folder(self.cache, repo)
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        etags = {}
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            large = name.endswith((".gguf", ".safetensors"))
            etags[name] = (hashlib.sha256 if large else hashlib.sha1)(data).hexdigest()
            (folder / "blobs" / etags[name]).write_bytes(data)
        before = (folder / "refs" / "main").read_text() if not main else ""
        cache.link(self.cache, repo, "main", commit, etags)
        if before:
            (folder / "refs" / "main").write_text(before)
        return folder


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def content(model: ModelInfo) -> bytes:
    return Path(model.path).read_bytes()


def model_file(path: Path, seed: int = 0, **options: Any) -> Path:
    return write_gguf(path, seed=seed, **options)


SAFETENSORS = {
    "config.json": json.dumps(
        {"model_type": "qwen3", "max_position_embeddings": 128, "torch_dtype": "bfloat16"}
    ).encode(),
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"chat_template": "x"}',
    "model.safetensors": noise(1000),
}


async def refused(catalog: Catalog, name: str) -> HiveError:
    with pytest.raises(HiveError) as error:
        await catalog.find(name)
    return error.value


async def test_the_shipped_model_is_always_there(disk: Disk) -> None:
    catalog = disk.catalog(SHIPPED)
    (model,) = await catalog.list()
    assert (model.id, model.source, model.format) == (SHIPPED_ID, "shipped", "gguf")
    assert model.digest == f"sha256:{hashlib.sha256(SHIPPED.read_bytes()).hexdigest()}"
    with pytest.raises(Forbidden):
        await catalog.delete(SHIPPED_ID)


async def test_models_in_the_cache_are_listed_whoever_fetched_them(disk: Disk) -> None:
    one = model_file(disk.root / "1.gguf", 1, context_length=2048, file_type=15)
    two = model_file(disk.root / "2.gguf", 2)
    disk.put("org/Model-GGUF", {"m-Q4_K_M.gguf": one, "sub/m.gguf": two, "README.md": b"x"})
    disk.put("org/st", SAFETENSORS)
    disk.put("org/no-model", {"data.json": b"{}"})
    models = {model.id: model for model in await disk.catalog().list()}
    assert set(models) == {"org/Model-GGUF:Q4_K_M", "org/Model-GGUF:sub/m.gguf", "org/st"}
    first = models["org/Model-GGUF:Q4_K_M"]
    assert first.digest == f"sha256:{hashlib.sha256(one.read_bytes()).hexdigest()}"
    assert (first.size_bytes, first.source) == (one.stat().st_size, "hub")
    assert (first.context_length, first.quantization) == (2048, "Q4_K_M")
    assert content(first) == one.read_bytes()
    assert first.path.endswith("/m-Q4_K_M.gguf")
    other = models["org/st"]
    assert (other.architecture, other.context_length) == ("qwen3", 128)
    assert (other.quantization, other.format) == ("BF16", "safetensors")


async def test_what_is_not_whole_is_not_listed(disk: Disk) -> None:
    whole = model_file(disk.root / "x.gguf", elements=100)
    disk.put("org/cut", {"cut-Q8_0.gguf": whole.read_bytes()[:-100]})
    disk.put("org/split", {"m-00001-of-00002.gguf": whole})
    disk.put("org/st", {"config.json": SAFETENSORS["config.json"]})
    disk.put("org/bad-config", {**SAFETENSORS, "config.json": b"["})
    disk.put(
        "org/adapter",
        {"a-F16.gguf": model_file(disk.root / "a.gguf", metadata={"general.type": "adapter"})},
    )
    disk.put("org/projector", {"mmproj-F16.gguf": whole})
    folder = disk.put("org/dangling", {"m-Q8_0.gguf": whole})
    shutil.rmtree(folder / "blobs")
    assert await disk.catalog().list() == []


async def test_the_same_file_is_the_same_model_by_whatever_way(disk: Disk) -> None:
    path = model_file(disk.root / "copy.gguf")
    disk.put("org/repo", {"m-Q8_0.gguf": path})
    catalog = disk.catalog()
    by_file = await catalog.register_file(f"file:{path}")
    by_hub = await catalog.find("org/repo:q8_0")
    assert by_file.digest == by_hub.digest
    assert by_file.id == f"file:{path}"
    assert (await catalog.find(by_hub.digest)).id == "org/repo:Q8_0"
    folder = disk.put("org/st", SAFETENSORS) / "snapshots" / ("a" * 40)
    copy = shutil.copytree(folder, disk.root / "copied")
    (copy / "README.md").write_text("no part of what it is")
    by_folder = await catalog.find(f"file:{copy}")
    assert by_folder.digest == (await catalog.find("org/st")).digest
    (copy / "tokenizer_config.json").write_text('{"chat_template": "another"}')
    assert (await catalog.find(f"file:{copy}")).digest != by_folder.digest


async def test_a_split_model_is_one_model(disk: Disk) -> None:
    parts = {
        f"big-Q4_0-0000{i}-of-00002.gguf": model_file(
            disk.root / f"big-Q4_0-0000{i}-of-00002.gguf",
            i,
            metadata={"split.no": i - 1, "split.count": 2},
        )
        for i in (1, 2)
    }
    disk.put("org/big", parts)
    catalog = disk.catalog()
    (model,) = await catalog.list()
    assert model.id == "org/big:Q4_0"
    assert model.size_bytes == sum(path.stat().st_size for path in parts.values())
    second = disk.root / "big-Q4_0-00002-of-00002.gguf"
    by_file = await catalog.find(f"file:{second}")
    assert by_file.digest == model.digest
    assert by_file.path.endswith("00001-of-00002.gguf")
    second.unlink()
    error = await refused(catalog, f"file:{disk.root}/big-Q4_0-00001-of-00002.gguf")
    assert isinstance(error, InvalidRequest)


async def test_registered_files_are_remembered_and_never_removed(disk: Disk) -> None:
    path = model_file(disk.root / "mine" / "Custom.gguf")
    model = await disk.catalog().register_file(f"file:{path}")
    again = disk.catalog()
    assert await again.list() == [model]
    assert (await again.find("custom")).id == model.id
    assert await again.register_file(f"file:{path}") == model
    assert await again.list() == [model]
    assert await again.delete(model.id) == model
    assert path.exists()
    assert await disk.catalog().list() == []
    with pytest.raises(NotFound):
        await again.delete(model.id)


async def test_a_registered_file_that_went_away_can_be_forgotten(disk: Disk) -> None:
    path = model_file(disk.root / "x.gguf")
    catalog = disk.catalog()
    model = await catalog.register_file(f"file:{path}")
    path.unlink()
    assert await catalog.list() == []
    assert (await catalog.delete(model.id)).id == model.id
    model_file(path)
    assert await catalog.list() == []


async def test_a_file_that_is_no_model_is_refused_when_it_is_registered(disk: Disk) -> None:
    catalog = disk.catalog()
    text = disk.root / "x.gguf"
    text.write_text("hello")
    for reference in (f"file:{text}", "file:/none.gguf", f"file:{disk.root}", "org/repo"):
        with pytest.raises(InvalidRequest):
            await catalog.register_file(reference)
    adapter = model_file(disk.root / "a.gguf", metadata={"general.type": "adapter"})
    with pytest.raises(InvalidRequest, match="adapter"):
        await catalog.register_file(f"file:{adapter}")


async def test_a_large_file_is_hashed_in_the_background_and_only_once(disk: Disk) -> None:
    path = model_file(disk.root / "x.gguf", elements=AT_ONCE_BYTES // 4 + 1)
    (disk.state / "model-files.json").write_text(json.dumps([str(path)]))
    catalog = disk.catalog()
    assert await catalog.list() == [], "the list does not wait"
    model = await catalog.find("x")
    assert await catalog.list() == [model]
    await catalog.close()
    later = disk.catalog()
    assert await later.list() == [model], "what was hashed is remembered"
    os.utime(path, ns=(1, 1))
    assert await later.list() == [], "a file that was touched is another file"
    assert await later.find("x") == model
    await later.close()
    await later.close()


async def test_the_list_reads_no_file_twice(disk: Disk) -> None:
    path = model_file(disk.root / "x.gguf")
    disk.put("org/repo", {"m-Q8_0.gguf": path})
    disk.put("org/st", SAFETENSORS)
    catalog = disk.catalog()
    before = await catalog.list()
    for blob in disk.cache.glob("models--*/blobs/*"):
        facts = blob.stat()
        blob.write_bytes(bytes(facts.st_size))
        os.utime(blob, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert await catalog.list() == before


async def test_hashing_ends_soon_when_the_agent_does(disk: Disk) -> None:
    path = model_file(disk.root / "x.gguf", elements=16)
    os.truncate(path, 2**36)  # 64 GB that take no room: minutes to hash
    catalog = disk.catalog()
    registering = asyncio.create_task(catalog.register_file(f"file:{path}"))
    process = psutil.Process()
    async with asyncio.timeout(10):
        while str(path) not in {file.path for file in process.open_files()}:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    registering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await registering
    async with asyncio.timeout(5):
        while str(path) in {file.path for file in process.open_files()}:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_blob_in_the_store_that_repositories_share_is_found_and_freed(disk: Disk) -> None:
    path = model_file(disk.root / "1.gguf")
    folder = disk.put("org/repo", {"m-Q8_0.gguf": path})
    (blob,) = (folder / "blobs").iterdir()
    xet_hash = "ab" + "0" * 62
    stored = disk.cache / "blobs" / "ab" / xet_hash
    stored.parent.mkdir(parents=True)
    (disk.cache / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    stored.with_name(f"{xet_hash}.refs").write_text(f"{blob.relative_to(disk.cache)}\n")
    blob.rename(stored)
    blob.symlink_to(os.path.relpath(stored, blob.parent))
    catalog = disk.catalog()
    (model,) = await catalog.list()
    assert model.digest == f"sha256:{blob.name}"
    assert model.size_bytes == path.stat().st_size
    await catalog.delete(model.id)
    assert not stored.exists()


def test_importing_the_catalog_and_the_hub_is_cheap() -> None:
    code = (
        "import sys, hive_agent.models.catalog, hive_agent.models.hub\n"
        "assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_a_changed_file_is_another_model(disk: Disk) -> None:
    path = model_file(disk.root / "x.gguf", 1)
    catalog = disk.catalog()
    before = await catalog.register_file(f"file:{path}")
    model_file(path, 2)
    (after,) = await catalog.list()
    assert after.id == before.id
    assert after.digest != before.digest


async def test_a_damaged_memory_costs_only_time(disk: Disk) -> None:
    path = model_file(disk.root / "x.gguf")
    model = await disk.catalog().register_file(f"file:{path}")
    (disk.state / "digests.json").write_text('[[1, 2], "x", {')
    assert await disk.catalog().list() == [model]
    (disk.state / "model-files.json").write_text("null")
    assert await disk.catalog().list() == []


async def test_a_model_answers_to_all_its_names(disk: Disk) -> None:
    disk.put("Org/Model-0.6B-GGUF", {"sub/M-Q8_0.gguf": model_file(disk.root / "1.gguf", 1)})
    catalog = disk.catalog(SHIPPED)
    for name in (
        "Org/Model-0.6B-GGUF:Q8_0",
        "org/model-0.6b-gguf",
        "model-0.6b",
        "MODEL-0.6B-GGUF:q8_0",
        "org/model-0.6b-gguf:m-q8_0.gguf",
        "org/model-0.6b-gguf:sub/m-q8_0.gguf",
    ):
        assert (await catalog.find(name)).id == "Org/Model-0.6B-GGUF:Q8_0"
    error = await refused(catalog, "nothing")
    assert isinstance(error, NotFound)
    assert SHIPPED_ID in error.message


def test_a_name_is_taken_by_whoever_answers_to_it_in_full_or_in_short() -> None:
    known = [("org/Llama-3.2-1B-GGUF:Q4_K_M", "sha256:a"), ("sql", "sha256:b")]
    assert taken_by("llama-3.2-1b", "sha256:c", known) == "org/Llama-3.2-1B-GGUF:Q4_K_M"
    assert taken_by("SQL", "sha256:c", known) == "sql"
    assert taken_by("sql", "sha256:b", known) is None
    assert taken_by("org/sql", "sha256:c", known) is None


async def test_an_adapter_cannot_have_one_of_its_bases_names(tmp_path: Path) -> None:
    catalog = Catalog(cache_dir=tmp_path / "cache", state_dir=tmp_path)
    base = ModelInfo(
        id="org/Tiny",
        digest="sha256:a",
        format="safetensors",
        size_bytes=1,
        source="hub",
        path="/m",
    )
    for name in ("tiny", "TINY"):
        with pytest.raises(InvalidRequest, match="one has the model's"):
            await adapters(catalog, base, [Lora(name=name, path="/adapter")])
    await catalog.close()


async def test_a_name_that_fits_two_models_is_answered_with_both(disk: Disk) -> None:
    files = {
        f"{name}-Q8_0.gguf": model_file(disk.root / f"{name}.gguf", seed)
        for seed, name in enumerate("ab")
    }
    disk.put("org/two", files)
    catalog = disk.catalog()
    for name in ("two", "org/two:Q8_0"):
        error = await refused(catalog, name)
        assert isinstance(error, Conflict)
        assert "org/two:a-Q8_0.gguf, org/two:b-Q8_0.gguf" in error.message
    assert (await catalog.find("org/two:B-q8_0.gguf")).id == "org/two:b-Q8_0.gguf"


async def test_of_two_commits_the_one_that_main_means_counts(disk: Disk) -> None:
    old, new = (model_file(disk.root / f"{i}.gguf", i) for i in (1, 2))
    extra = model_file(disk.root / "3.gguf", 3)
    disk.put("org/repo", {"m-Q8_0.gguf": new}, "b" * 40)
    disk.put("org/repo", {"m-Q8_0.gguf": old, "m-Q4_0.gguf": extra}, "a" * 40, main=False)
    models = {model.id: model for model in await disk.catalog().list()}
    assert set(models) == {"org/repo:Q8_0", "org/repo:Q4_0"}
    assert content(models["org/repo:Q8_0"]) == new.read_bytes()


# -- deleting -------------------------------------------------------------------------------------


async def test_deleting_one_quantization_leaves_the_other(disk: Disk) -> None:
    one, two = (model_file(disk.root / f"{i}.gguf", i) for i in (1, 2))
    folder = disk.put("org/repo", {"m-Q8_0.gguf": one, "m-Q4_0.gguf": two, "README.md": b"x"})
    catalog = disk.catalog()
    gone = await catalog.delete("org/repo:Q8_0")
    assert gone.id == "org/repo:Q8_0"
    assert [model.id for model in await catalog.list()] == ["org/repo:Q4_0"]
    assert len(list((folder / "blobs").iterdir())) == 2
    assert not scan_cache_dir(disk.cache).warnings
    await catalog.delete("org/repo:Q4_0")
    assert not folder.exists()
    assert await catalog.list() == []


async def test_a_blob_that_another_commit_shows_stays(disk: Disk) -> None:
    one, two = (model_file(disk.root / f"{i}.gguf", i) for i in (1, 2))
    folder = disk.put("org/repo", {"m-Q8_0.gguf": one, "renamed-Q8_0.gguf": one}, "a" * 40)
    disk.put("org/repo", {"m-Q8_0.gguf": one, "m-Q4_0.gguf": two}, "b" * 40)
    catalog = disk.catalog()
    await catalog.delete("org/repo:m-Q8_0.gguf")
    assert {model.id for model in await catalog.list()} == {"org/repo:Q8_0", "org/repo:Q4_0"}
    assert len(list((folder / "blobs").iterdir())) == 2
    assert not list(folder.glob("snapshots/*/m-Q8_0.gguf"))


async def test_deleting_safetensors_takes_the_repository(disk: Disk) -> None:
    folder = disk.put("org/st", {**SAFETENSORS, "README.md": b"x"})
    other = disk.put("other/fork", SAFETENSORS)  # the same commit, as forks have
    catalog = disk.catalog()
    await catalog.delete("org/st")
    assert not folder.exists()
    assert other.exists()
    assert [model.id for model in await catalog.list()] == ["other/fork"]


async def test_a_repository_that_is_being_fetched_is_not_removed_as_a_whole(disk: Disk) -> None:
    folder = disk.put("org/repo", {"m-Q8_0.gguf": model_file(disk.root / "1.gguf")})
    coming = folder / "blobs" / f"{'c' * 64}.incomplete"
    coming.write_bytes(b"half")
    lock = cache.lock_path(disk.cache, "org/repo", "c" * 64)
    lock.parent.mkdir(parents=True)
    catalog = disk.catalog()
    with FileLock(lock):
        await catalog.delete("org/repo:Q8_0")
    assert list((folder / "blobs").iterdir()) == [coming]
    assert await catalog.list() == []


async def test_a_damaged_repository_is_left_alone(disk: Disk) -> None:
    folder = disk.put(
        "org/repo", {"m-Q8_0.gguf": model_file(disk.root / "1.gguf"), "README.md": b"x"}
    )
    (folder / "blobs" / hashlib.sha1(b"x").hexdigest()).unlink()
    catalog = disk.catalog()
    with pytest.raises(Conflict, match="by hand"):
        await catalog.delete("org/repo")
    assert [model.id for model in await catalog.list()] == ["org/repo:Q8_0"]


async def test_a_model_that_was_deleted_can_be_fetched_again(disk: Disk) -> None:
    path = model_file(disk.root / "1.gguf")
    async with HubServer() as server:
        server.add("org/repo", {"m-Q8_0.gguf": path})
        hub = Hub(cache_dir=disk.cache, endpoint=server.url)
        catalog = disk.catalog()
        for _ in range(2):
            plan = await hub.plan(parse_reference("org/repo"))
            await hub.fetch(plan, lambda progress: None)
            model = await catalog.find(plan.model_id)
            assert model.size_bytes == plan.total_bytes
            await catalog.delete(model.id)
            assert await catalog.list() == []
        assert server.ranges("m-Q8_0.gguf") == [None, None]


def weights(folder: Path, header: bytes, data: int) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data))
    return path


def tensors(count: int) -> bytes:
    one = {"dtype": "F16", "shape": [1]}
    return json.dumps(
        {f"layers.{n}.weight": {**one, "data_offsets": [2 * n, 2 * n + 2]} for n in range(count)}
    ).encode()


def test_weights_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    weights(tmp_path, tensors(1000), 2000)
    check_weights(tmp_path)
    for header, data, says in (
        (tensors(1000), 1999, "its header speaks of"),
        (b'{"a": [', 10, "its header makes no sense"),
        (b"[" * PARSED_HEADER_BYTES, 10, "its header makes no sense"),
        (b'{"a": {"data_offsets": 1}}', 10, "its header makes no sense"),
        (b"", 10, "no sensible length"),
    ):
        weights(tmp_path, header, data)
        with pytest.raises(InvalidRequest, match=says):
            check_weights(tmp_path)


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_a_models_file_is_refused_and_not_waited_for(
    tmp_path: Path,
) -> None:
    for name in ("model.safetensors", "config.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(InvalidRequest, match="cannot be read: It is no regular file"):
        check_weights(tmp_path)
    with pytest.raises(InvalidRequest, match="cannot be read: It is no regular file"):
        read_config(tmp_path / "config.json")
    pipe = tmp_path / "model.safetensors"
    with pytest.raises(InvalidRequest, match="cannot be read: It is no regular file"):
        Digests(tmp_path / "digests.json").compute(FileKey.of(pipe))


def test_a_header_of_weights_that_would_stop_the_agent_is_not_parsed(tmp_path: Path) -> None:
    hostile = b'{"a": [' + b"[]," * PARSED_HEADER_BYTES
    path = weights(tmp_path, hostile, 0)
    tracemalloc.start()
    try:
        check_weights(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < PARSED_HEADER_BYTES
    finally:
        tracemalloc.stop()
    os.truncate(path, len(hostile))
    with pytest.raises(InvalidRequest, match="no sensible length"):
        check_weights(tmp_path)
