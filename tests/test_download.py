"""Downloads against a real hub on real sockets: resumed, verified, and put where others look."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from huggingface_hub import constants, hf_hub_download, scan_cache_dir
from huggingface_hub.errors import LocalEntryNotFoundError

from hive_agent.models.catalog import Catalog
from hive_agent.models.hub import DownloadPlan, Hub
from hive_agent.models.progress import INTERVAL_S, Meter, Progress, describe
from hive_agent.models.references import parse_reference
from hive_agent.models.transfer import Retry
from operations.errors import (
    Conflict,
    Forbidden,
    HiveError,
    InvalidRequest,
    NotFound,
    Unauthorized,
    Unavailable,
    WontFit,
)
from tests.gguf_files import write_gguf
from tests.hub import (
    Corrupt,
    Drop,
    Gate,
    HubServer,
    IgnoreRange,
    Stall,
    Status,
    WrongPart,
    noise,
)

MB = 2**20
REPO = "org/Model-GGUF"
FILE = "model-Q8_0.gguf"
QUICK = Retry(attempts=3, base_s=0.01, cap_s=0.02, stall_s=5)

# The child prints a line for each report, fetches with no hurry, and is killed from outside.
CHILD = """
import asyncio, sys
from pathlib import Path
from hive_agent.models.hub import Hub
from hive_agent.models.references import parse_reference

async def main(url, cache, reference):
    hub = Hub(cache_dir=Path(cache), endpoint=url)
    plan = await hub.plan(parse_reference(reference))
    await hub.fetch(plan, lambda progress: print(progress.done_bytes, flush=True))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
async def server() -> AsyncIterator[HubServer]:
    async with HubServer() as running:
        yield running


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "huggingface" / "hub"


def hub_at(server: HubServer, cache_dir: Path, **options: Any) -> Hub:
    return Hub(cache_dir=cache_dir, endpoint=server.url, **{"retry": QUICK, **options})


async def fetch(hub: Hub, reference: str = REPO) -> tuple[DownloadPlan, list[Progress]]:
    reports: list[Progress] = []
    plan = await hub.plan(parse_reference(reference))
    await hub.fetch(plan, reports.append)
    return plan, reports


def folder(cache_dir: Path, repo: str = REPO) -> Path:
    return cache_dir / f"models--{repo.replace('/', '--')}"


def blob(server: HubServer, cache_dir: Path, file: str = FILE, repo: str = REPO) -> Path:
    return folder(cache_dir, repo) / "blobs" / server.repos[repo.lower()].etag(file)


def partial(server: HubServer, cache_dir: Path, file: str = FILE) -> Path:
    done = blob(server, cache_dir, file)
    return done.with_name(f"{done.name}.incomplete")


def found_by_huggingface_hub(cache_dir: Path) -> Path:
    return Path(hf_hub_download(REPO, FILE, cache_dir=cache_dir, local_files_only=True))


def connections_to(server: HubServer) -> set[int]:
    """The local ports of this process's connections to the hub."""
    port = int(server.url.rsplit(":", 1)[1])
    mine = psutil.Process().net_connections()
    return {c.laddr.port for c in mine if c.raddr and c.raddr.port == port}


async def until(condition: Callable[[], bool]) -> None:
    """For what only the file system tells."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


# -- where things go ------------------------------------------------------------------------------


async def test_huggingface_hub_finds_what_was_fetched(server: HubServer, cache_dir: Path) -> None:
    data = noise(MB)
    repo = server.add(REPO, {FILE: data, "README.md": b"read me"})
    plan, reports = await fetch(hub_at(server, cache_dir))

    path = found_by_huggingface_hub(cache_dir)
    assert path.read_bytes() == data
    assert path.is_symlink()
    assert not path.readlink().is_absolute()
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "README.md", cache_dir=cache_dir, local_files_only=True)

    info = scan_cache_dir(cache_dir)
    assert not info.warnings
    assert not getattr(info, "incomplete_files", ())
    (cached,) = info.repos
    assert cached.repo_id == REPO
    assert list(cached.refs) == ["main"]
    assert cached.refs["main"].commit_hash == repo.commit == plan.listing.commit
    assert plan.model_id == f"{REPO}:Q8_0"
    assert (reports[-1].done_bytes, reports[-1].total_bytes) == (MB, MB)


async def test_what_huggingface_hub_fetched_is_not_fetched_again(
    server: HubServer, cache_dir: Path
) -> None:
    server.add(REPO, {FILE: noise(MB), "tokenizer.json": b"{}"})
    await asyncio.to_thread(
        hf_hub_download, REPO, FILE, cache_dir=cache_dir, endpoint=server.url, token=False
    )
    before = len(server.seen(FILE))
    plan, reports = await fetch(hub_at(server, cache_dir))
    assert plan.missing_bytes == 0
    assert len(server.seen(FILE)) == before
    assert reports[-1].done_bytes == MB


async def test_a_repository_of_safetensors_comes_with_all_that_an_engine_needs(
    server: HubServer, cache_dir: Path, tmp_path: Path
) -> None:
    wanted = {
        "config.json": json.dumps({"model_type": "llama", "max_position_embeddings": 64}).encode(),
        "generation_config.json": b"{}",
        "tokenizer.json": b'{"a": 1}',
        "tokenizer_config.json": b'{"b": 2}',
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors.index.json": b'{"weight_map": {}}',
        "model-00001-of-00002.safetensors": noise(300_000, 1),
        "model-00002-of-00002.safetensors": noise(200_000, 2),
    }
    left = {
        "README.md": b"x",
        "original/consolidated.safetensors": noise(1000, 3),
        "consolidated.safetensors": noise(1000, 4),
        "pytorch_model.bin": noise(1000, 5),
        "modeling.py": b"import os",
        "onnx/model.onnx": b"x",
    }
    server.add("org/model", {**wanted, **left})
    plan, reports = await fetch(hub_at(server, cache_dir), "org/model")
    snapshot = folder(cache_dir, "org/model") / "snapshots" / plan.listing.commit
    found = {path.name: path.read_bytes() for path in snapshot.rglob("*")}
    assert found == wanted
    assert reports[-1].file == "org/model (8 files)"
    catalog = Catalog(cache_dir=cache_dir, state_dir=tmp_path, shipped=tmp_path / "none")
    (model,) = await catalog.list()
    assert (model.id, model.format, model.path) == ("org/model", "safetensors", str(snapshot))
    assert (model.architecture, model.context_length) == ("llama", 64)


async def test_all_parts_of_a_split_model_come_together(
    server: HubServer, cache_dir: Path, tmp_path: Path
) -> None:
    parts = [
        write_gguf(
            tmp_path / f"big-Q4_K_M-0000{number}-of-00003.gguf",
            metadata={"split.count": 3, "split.no": number - 1},
            seed=number,
        )
        for number in (1, 2, 3)
    ]
    server.add(REPO, {f"Q4_K_M/{part.name}": part for part in parts} | {FILE: noise(100)})
    plan, _ = await fetch(hub_at(server, cache_dir), f"{REPO}:{parts[1].name}")
    assert [file.path for file in plan.files] == [f"Q4_K_M/{part.name}" for part in parts]
    catalog = Catalog(cache_dir=cache_dir, state_dir=tmp_path, shipped=tmp_path / "none")
    model = await catalog.find(plan.model_id)
    assert model.path.endswith("/Q4_K_M/big-Q4_K_M-00001-of-00003.gguf")
    assert model.size_bytes == plan.total_bytes


async def test_a_mirror_that_tells_sizes_only_by_the_tree_serves_too(cache_dir: Path) -> None:
    async with HubServer(blobs=False) as mirror:
        mirror.add(REPO, {FILE: noise(1000), "config.json": b"{}"})
        plan, _ = await fetch(hub_at(mirror, cache_dir))
        assert plan.total_bytes == 1000


async def test_the_hub_decides_how_a_repository_is_spelt(
    server: HubServer, cache_dir: Path
) -> None:
    server.add(REPO, {FILE: noise(1000)})
    plan, _ = await fetch(hub_at(server, cache_dir), "ORG/model-gguf:q8_0")
    assert plan.model_id == f"{REPO}:Q8_0"
    assert folder(cache_dir).is_dir()


async def test_names_that_lead_out_of_the_cache_are_ignored(
    server: HubServer, cache_dir: Path
) -> None:
    server.add(
        REPO,
        {"../../../evil-Q4_0.gguf": noise(10), "/etc/evil-Q5_0.gguf": noise(11), FILE: noise(12)},
    )
    plan, _ = await fetch(hub_at(server, cache_dir))
    assert [file.path for file in plan.files] == [FILE]
    with pytest.raises(NotFound):
        await fetch(hub_at(server, cache_dir), f"{REPO}:Q4_0")


# -- interruptions --------------------------------------------------------------------------------


async def test_a_download_killed_in_the_middle_resumes_where_it_stopped(
    server: HubServer, cache_dir: Path
) -> None:
    data = noise(8 * MB)
    server.add(REPO, {FILE: data})
    gate = Gate()
    server.fault(FILE, gate)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, server.url, str(cache_dir), REPO,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    await gate.allow(5 * MB)
    await gate.reached(5 * MB)
    there = partial(server, cache_dir)
    await until(lambda: there.exists() and there.stat().st_size >= 4 * MB)
    child.send_signal(signal.SIGKILL)
    await child.wait()
    assert child.stdout is not None
    await child.stdout.read()

    kept = there.stat().st_size
    _, reports = await fetch(hub_at(server, cache_dir))
    assert server.ranges(FILE) == [None, f"bytes={kept}-"]
    assert blob(server, cache_dir).read_bytes() == data
    assert not there.exists()
    assert reports[0].done_bytes >= kept, "what was there counts as done from the start"


async def test_a_dropped_connection_goes_on_where_it_broke(
    server: HubServer, cache_dir: Path
) -> None:
    data = noise(3 * MB)
    server.add(REPO, {FILE: data})
    server.fault(FILE, Drop(after=MB), Drop(after=5), Drop(after=0), Drop(after=0))
    _, reports = await fetch(hub_at(server, cache_dir))
    assert server.ranges(FILE) == [
        None,
        f"bytes={MB}-",
        f"bytes={MB + 5}-",
        f"bytes={MB + 5}-",
        f"bytes={MB + 5}-",
    ]
    assert blob(server, cache_dir).read_bytes() == data
    assert any("trying again" in report.note for report in reports)


async def test_a_stalled_connection_counts_as_dropped(server: HubServer, cache_dir: Path) -> None:
    data = noise(MB)
    server.add(REPO, {FILE: data})
    server.fault(FILE, Stall(after=400_000))
    await fetch(hub_at(server, cache_dir, retry=Retry(3, 0.01, 0.02, stall_s=0.3)))
    assert server.ranges(FILE) == [None, "bytes=400000-"]
    assert blob(server, cache_dir).read_bytes() == data


async def test_a_server_that_ignores_ranges_starts_over(server: HubServer, cache_dir: Path) -> None:
    data = noise(MB)
    server.add(REPO, {FILE: data})
    server.fault(FILE, Drop(after=400_000), IgnoreRange())
    _, reports = await fetch(hub_at(server, cache_dir))
    assert blob(server, cache_dir).read_bytes() == data
    assert reports[-1].done_bytes == MB
    assert all(report.done_bytes <= MB for report in reports)


async def test_a_server_that_ignores_ranges_and_always_breaks_is_given_up(
    server: HubServer, cache_dir: Path
) -> None:
    server.add(REPO, {FILE: noise(MB)})
    server.fault(FILE, *[IgnoreRange(drop_after=400_000)] * 20)
    with pytest.raises(Unavailable, match=r"closed|lost") as error:
        await fetch(hub_at(server, cache_dir))
    assert error.value.retryable
    assert len(server.ranges(FILE)) <= QUICK.attempts + 1


@pytest.mark.parametrize("fault", [WrongPart(by=100), Status(416)])
async def test_a_part_that_was_not_asked_for_is_not_used(
    server: HubServer, cache_dir: Path, fault: WrongPart | Status
) -> None:
    data = noise(MB)
    server.add(REPO, {FILE: data})
    server.fault(FILE, Drop(after=400_000), fault)
    await fetch(hub_at(server, cache_dir))
    assert server.ranges(FILE) == [None, "bytes=400000-", None]
    assert blob(server, cache_dir).read_bytes() == data


async def test_a_hub_that_is_busy_is_asked_again(server: HubServer, cache_dir: Path) -> None:
    server.add(REPO, {FILE: noise(1000)})
    server.fault(FILE, Status(503), Status(429, {"Retry-After": "0"}), Status(500))
    with pytest.raises(Unavailable, match="answered 500, 3 times in a row"):
        await fetch(hub_at(server, cache_dir))
    await fetch(hub_at(server, cache_dir))
    assert blob(server, cache_dir).exists()


async def test_who_gives_up_keeps_what_came_in(server: HubServer, cache_dir: Path) -> None:
    server.add(REPO, {FILE: noise(MB)})
    server.fault(FILE, Drop(after=600_000), *[Drop(after=0)] * 3)
    with pytest.raises(Unavailable, match=r"600\.0 kB of 1\.0 MB are kept"):
        await fetch(hub_at(server, cache_dir))
    assert partial(server, cache_dir).stat().st_size == 600_000
    plan = await hub_at(server, cache_dir).plan(parse_reference(REPO))
    assert plan.missing_bytes == MB - 600_000
    assert not list((folder(cache_dir)).glob("snapshots/*/*")), "nobody sees half a model"


async def test_cancelling_leaves_a_partial_file_and_nothing_open(
    server: HubServer, cache_dir: Path
) -> None:
    server.add(REPO, {FILE: noise(4 * MB)})
    gate = Gate()
    server.fault(FILE, gate)
    await gate.allow(2 * MB)
    hub = hub_at(server, cache_dir)
    plan = await hub.plan(parse_reference(REPO))
    before = connections_to(server)
    downloading = asyncio.create_task(hub.fetch(plan, lambda progress: None))
    await gate.reached(2 * MB)
    there = partial(server, cache_dir)
    await until(lambda: there.exists() and there.stat().st_size >= MB)
    downloading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await downloading
    assert str(there) not in {file.path for file in psutil.Process().open_files()}
    assert connections_to(server) == before

    await gate.allow()
    await fetch(hub_at(server, cache_dir))
    assert server.ranges(FILE)[1] in {f"bytes={n}-" for n in range(MB, 2 * MB + 1)}
    assert not there.exists()


async def test_two_who_want_the_same_fetch_it_once(server: HubServer, cache_dir: Path) -> None:
    server.add(REPO, {FILE: noise(2 * MB)})
    gate = Gate()
    server.fault(FILE, gate)
    first = asyncio.create_task(fetch(hub_at(server, cache_dir)))
    await gate.allow(MB)
    await gate.reached(MB)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, server.url, str(cache_dir), REPO,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    assert int(await child.stdout.readline()) <= 2 * MB, "it tells how far the other one is"
    await gate.allow()
    await first
    lines = (await child.stdout.read()).split()
    assert await child.wait() == 0
    assert int(lines[-1]) == 2 * MB
    assert server.ranges(FILE) == [None]


# -- trust ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [FILE, "config.json"])
async def test_wrong_bytes_are_removed_and_reported(
    server: HubServer, cache_dir: Path, file: str
) -> None:
    weights = {"model.safetensors": noise(1000)} if file == "config.json" else {}
    server.add(REPO, {file: noise(MB), **weights})
    server.fault(file, Corrupt())
    with pytest.raises(Unavailable, match="checksum") as error:
        await fetch(hub_at(server, cache_dir))
    assert error.value.code == "download_corrupt"
    assert not blob(server, cache_dir, file).exists()
    assert not partial(server, cache_dir, file).exists()
    await fetch(hub_at(server, cache_dir))
    assert blob(server, cache_dir, file).exists()


def test_small_files_have_the_ids_that_git_gives_them() -> None:
    server = HubServer()
    repo = server.add(REPO, {"empty.json": b"", FILE: b""})
    assert repo.etag("empty.json") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert repo.etag(FILE).startswith("e3b0c44298fc1c149afbf4c8996fb924")


async def test_a_damaged_beginning_from_before_is_fetched_anew(
    server: HubServer, cache_dir: Path
) -> None:
    data = noise(MB)
    server.add(REPO, {FILE: data})
    there = partial(server, cache_dir)
    there.parent.mkdir(parents=True)
    there.write_bytes(b"x" * 500_000)
    await fetch(hub_at(server, cache_dir))
    assert server.ranges(FILE) == ["bytes=500000-", None]
    assert blob(server, cache_dir).read_bytes() == data


async def test_a_complete_partial_file_is_only_checked(server: HubServer, cache_dir: Path) -> None:
    data = noise(MB)
    server.add(REPO, {FILE: data})
    there = partial(server, cache_dir)
    there.parent.mkdir(parents=True)
    there.write_bytes(data)
    await fetch(hub_at(server, cache_dir))
    assert server.ranges(FILE) == []
    assert blob(server, cache_dir).read_bytes() == data


async def test_the_token_goes_to_the_hub_and_nowhere_else(
    cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with HubServer(cdn=True) as server:
        server.add(REPO, {FILE: noise(1000)}, token="hf_secret")
        server.fault(FILE, Drop(after=500))
        await fetch(hub_at(server, cache_dir, token="hf_secret"))
        at_hub = [seen for seen in server.requests if seen.host.startswith("127.0.0.1")]
        at_cdn = [seen for seen in server.requests if seen.host.startswith("localhost")]
        assert {seen.authorization for seen in at_hub} == {"Bearer hf_secret"}
        assert [seen.range for seen in at_cdn] == [None, "bytes=500-"]
        assert {seen.authorization for seen in at_cdn} == {None}
    ours = [record for record in caplog.records if record.name.startswith("hive")]
    assert not any("hf_secret" in record.getMessage() for record in ours)


async def test_a_signed_address_that_ran_out_is_asked_for_again(cache_dir: Path) -> None:
    async with HubServer(cdn=True) as server:
        server.add(REPO, {FILE: noise(1000)})
        server.fault(FILE, Drop(after=500), Status(403))
        await fetch(hub_at(server, cache_dir))
        assert server.ranges(FILE) == [None, "bytes=500-", "bytes=500-"]


async def test_access_that_is_withdrawn_meanwhile_keeps_what_came_in(
    server: HubServer, cache_dir: Path
) -> None:
    server.add(REPO, {FILE: noise(MB)})
    hub = hub_at(server, cache_dir)
    plan = await hub.plan(parse_reference(REPO))
    there = partial(server, cache_dir)
    there.parent.mkdir(parents=True)
    there.write_bytes(noise(MB)[:1000])
    server.repos[REPO.lower()].gated = True
    with pytest.raises(Forbidden, match="licence"):
        await hub.fetch(plan, lambda progress: None)
    assert there.stat().st_size == 1000


async def test_a_repository_that_changes_meanwhile_is_planned_anew(
    server: HubServer, cache_dir: Path
) -> None:
    server.add(REPO, {FILE: noise(MB, 1)})
    hub = hub_at(server, cache_dir)
    plan = await hub.plan(parse_reference(REPO))
    stale = partial(server, cache_dir)
    stale.parent.mkdir(parents=True)
    stale.write_bytes(noise(MB, 1)[:1000])
    server.add(REPO, {FILE: noise(MB, 2)})
    await hub.fetch(plan, lambda progress: None)
    assert not stale.exists()
    assert found_by_huggingface_hub(cache_dir).read_bytes() == noise(MB, 2)


# -- refusals -------------------------------------------------------------------------------------


async def refusal(hub: Hub, reference: str = REPO) -> HiveError:
    with pytest.raises(HiveError) as error:
        await fetch(hub, reference)
    return error.value


async def test_a_gated_model_says_where_to_accept_its_licence(
    server: HubServer, cache_dir: Path
) -> None:
    server.add(REPO, {FILE: noise(1000)}, gated=True)
    error = await refusal(hub_at(server, cache_dir, token="hf_x"))
    assert isinstance(error, Forbidden)
    assert f"{server.url}/{REPO}" in error.message
    assert "hf auth login" in error.message
    assert not folder(cache_dir).exists()


async def test_a_private_model_needs_its_token(server: HubServer, cache_dir: Path) -> None:
    server.add(REPO, {FILE: noise(1000)}, token="right")
    for token in (None, "wrong"):
        error = await refusal(hub_at(server, cache_dir, token=token))
        assert isinstance(error, NotFound)
        assert "hf auth login" in error.message
    assert isinstance(await refusal(hub_at(server, cache_dir, token="invalid")), Unauthorized)
    await fetch(hub_at(server, cache_dir, token="right"))


async def test_what_is_not_there_is_answered_with_what_is(
    server: HubServer, cache_dir: Path
) -> None:
    hub = hub_at(server, cache_dir)
    assert isinstance(await refusal(hub, "org/nothing"), NotFound)
    server.add(REPO, {"m-Q2_K.gguf": noise(10, 1), "m-Q3_K_S.gguf": noise(10, 2)})
    for selector in ("Q8_0", "other.gguf"):
        error = await refusal(hub, f"{REPO}:{selector}")
        assert isinstance(error, NotFound)
        assert f"{REPO}:Q2_K, {REPO}:Q3_K_S" in error.message
    error = await refusal(hub)
    assert isinstance(error, Conflict)
    assert f"{REPO}:Q2_K, {REPO}:Q3_K_S" in error.message
    server.add("org/data", {"README.md": b"x", "table.csv": b"1,2"})
    assert isinstance(await refusal(hub, "org/data"), NotFound)


async def test_a_path_is_nothing_to_fetch(server: HubServer, cache_dir: Path) -> None:
    assert isinstance(await refusal(hub_at(server, cache_dir), "file:/x.gguf"), InvalidRequest)


async def test_a_hub_that_is_away_is_unavailable(cache_dir: Path) -> None:
    async with HubServer() as server:
        pass
    error = await refusal(hub_at(server, cache_dir))
    assert isinstance(error, Unavailable)
    assert error.retryable
    assert server.url in error.message


async def test_a_web_server_that_is_no_hub_is_named_as_such(
    server: HubServer, cache_dir: Path
) -> None:
    error = await refusal(Hub(cache_dir=cache_dir, endpoint=f"{server.url}/nothing/here"))
    assert isinstance(error, NotFound | Unavailable)
    assert f"{server.url}/nothing/here" in error.message


async def test_offline_mode_is_honoured(
    server: HubServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.add(REPO, {FILE: noise(1000)})
    error = await refusal(hub_at(server, cache_dir))
    assert isinstance(error, Unavailable)
    assert not error.retryable
    assert "HF_HUB_OFFLINE" in error.message
    assert server.requests == []


async def test_a_model_larger_than_the_disk_is_refused_before_it_is_fetched(
    server: HubServer, cache_dir: Path
) -> None:
    size = 10**15
    server.add(REPO, {FILE: b"GGUF"}, claimed_sizes={FILE: size})
    free = shutil.disk_usage("/").free
    error = await refusal(hub_at(server, cache_dir))
    assert isinstance(error, WontFit)
    assert "needs 1000.0 TB" in error.message
    assert f"{(size - free) / 1e12:.0f}" in error.message
    assert server.seen(FILE) == []


async def test_a_disk_that_fills_up_is_reported_as_such(server: HubServer, cache_dir: Path) -> None:
    server.add(REPO, {FILE: noise(MB)})
    there = partial(server, cache_dir)
    there.parent.mkdir(parents=True)
    there.symlink_to("/dev/full")  # the kernel's disk without room
    error = await refusal(hub_at(server, cache_dir))
    assert isinstance(error, WontFit)
    assert "1.0 MB more" in error.message


# -- progress -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (
            Progress("Qwen3-0.6B-Q8_0.gguf", 287_300_000, 639_400_000, 21_400_000),
            "Qwen3-0.6B-Q8_0.gguf 44 % (287.3 of 639.4 MB, 21.4 MB/s, 16 s left)",
        ),
        (Progress("a.gguf", 5, 2_000_000_000, 0), "a.gguf 0 % (5 bytes of 2.0 GB)"),
        (Progress("a.gguf", 10, 10, 0), "a.gguf 100 % (10 bytes)"),
        (Progress("a.gguf", 0, 0, 0), "a.gguf 100 % (0 bytes)"),
        (
            Progress("a.gguf", 10**9, 10**12, 10**7, "the connection was lost"),
            "a.gguf 0 % (1.0 GB of 1.0 TB, 10.0 MB/s, 27 h 45 min left); the connection was lost",
        ),
    ],
)
def test_a_line_of_progress_reads_well(progress: Progress, line: str) -> None:
    assert describe(progress) == line


def test_progress_is_reported_twice_a_second_with_the_rate_of_the_last_seconds() -> None:
    now = 100.0
    reports: list[Progress] = []
    meter = Meter("a.gguf", 100_000, reports.append, clock=lambda: now)
    meter.found(20_000)
    for _ in range(200):  # 20 s at 1,000 bytes/s
        now += 0.1
        meter.fetched(100)
    assert 30 <= len(reports) <= 20 / INTERVAL_S + 1
    assert reports[-1].rate == pytest.approx(1000, rel=0.01)
    now += 20  # nothing comes
    meter.fetched(100)
    assert reports[-1].rate < 20
    meter.finish()
    assert reports[-1].done_bytes == 100_000
