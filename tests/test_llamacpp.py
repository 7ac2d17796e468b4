"""llama.cpp in full: split files, adapters, templates, projectors, flags, threads and GPUs."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import stat
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import xllamacpp

from hive_agent.asked import Asked
from hive_agent.models.catalog import Catalog
from hive_agent.models.derived import derived
from hive_agent.models.gguf import read_header
from hive_agent.models.variants import variants
from hive_agent.workers.flags import PARAM
from hive_agent.workers.launch import crowding, decide, default_threads
from hive_agent.workers.llamacpp import RULES, launch
from hive_agent.workers.llamacpp_build import Build, Builds, Setting
from hive_agent.workers.options import OPTIONS, check, check_device
from keeper import engine_options
from keeper.exits import WrongUsage
from operations.errors import HiveError, InvalidRequest, Unavailable
from operations.hosts import Device, ModelInfo
from operations.names import short_forms
from operations.operations import Lora, WorkerOptions, WorkerSpawn
from tests import fake_cuda
from tests.cluster import Cluster, Daemon, clean_env, cluster, hive_command, served, spawn, until
from tests.fake_nvml.driver import FakeDriver, gpus
from tests.gguf_files import (
    TINY,
    write_gguf,
    write_llama,
    write_lora,
    write_projector,
    write_split,
)
from tests.hub import HubServer
from worker.engines.llamacpp import Wanted, parameters

QUESTION = "What is Hive?"
OTHER_QUESTION = "Tell me a short story."
DEAF = (
    f"<|im_start|>user\n{OTHER_QUESTION}<|im_end|>\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template that asks always the same."""
CPU = Device(id="cpu", name="CPU", device_type="cpu", vram_total_mb=1, vram_free_mb=1)
GPUS = [
    Device(
        id=f"cuda:{n}",
        name="GPU",
        device_type="gpu",
        vram_total_mb=1,
        vram_free_mb=1,
        uuid=f"GPU-{n}",
    )
    for n in range(2)
]


@pytest.fixture(scope="module")
async def hive() -> AsyncIterator[Daemon]:
    async with cluster() as made:
        yield await made.hive()


@pytest.fixture
async def empty(hive: Daemon) -> AsyncIterator[Daemon]:
    """The same hive, its workers stopped afterwards."""
    yield hive
    for worker in (await hive.client.run({"operation": "worker_list"}))["workers"]:
        await hive.client.run({"operation": "worker_stop", "worker_id": worker["worker_id"]})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a split model, an adapter and a projector for ``hive-tiny``."""
    folder = tmp_path_factory.mktemp("files")
    write_split(TINY, folder, 3)
    write_lora(folder / "pirate.gguf")
    write_projector(folder / "mmproj.gguf")
    return folder


async def chat(daemon: Daemon, model: str, content: Any = QUESTION, **options: Any) -> Any:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 24,
        **options,
    }
    return await daemon.client.post("/v1/chat/completions", body)


async def said(daemon: Daemon, model: str, content: Any = QUESTION) -> str:
    return str((await chat(daemon, model, content))["choices"][0]["message"]["content"])


async def refused(daemon: Daemon, model: str = "hive-tiny", **options: Any) -> HiveError:
    """The error with which the hive refuses to start a worker, when it is asked."""
    operation = {"operation": "worker_spawn", "model": model, "worker": "cpu", "options": options}
    with pytest.raises(HiveError) as error:
        await daemon.client.submit(operation)
    return error.value


# -- split files ---------------------------------------------------------------------------------


async def test_a_split_model_answers_as_the_whole_one(empty: Daemon, files: Path) -> None:
    second = next(files.glob("*-00002-of-00003.gguf"))
    worker = await spawn(empty, f"file:{second}")
    assert worker["model"].endswith("-00001-of-00003.gguf")
    await spawn(empty, "hive-tiny")
    assert await said(empty, worker["model"]) == await said(empty, "hive-tiny")


async def test_a_split_model_comes_whole_from_a_hub(fresh: Cluster, files: Path) -> None:
    parts = {path.name: path.read_bytes() for path in files.glob("*-of-00003.gguf")}
    async with HubServer() as hub:
        hub.add("org/split", parts)
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(fresh.folder / "hf")}
        hive = await fresh.hive(env=env)
        pulled = await hive.client.run({"operation": "model_download", "model": "org/split"})
    assert pulled["size_bytes"] == sum(len(part) for part in parts.values())
    await spawn(hive, "org/split")
    await spawn(hive, "hive-tiny")
    assert await said(hive, "org/split") == await said(hive, "hive-tiny")


async def test_parts_that_do_not_belong_together_are_refused(
    hive: Daemon, files: Path, tmp_path: Path
) -> None:
    first, second, third = (
        Path(shutil.copy(path, tmp_path)) for path in sorted(files.glob("*-of-*"))
    )
    third.unlink()
    error = await refused(hive, f"file:{first}")
    assert (error.status, error.code) == (400, "file_unreadable")
    assert third.name in error.message

    shutil.copy(second, third)  # in the third's place
    error = await refused(hive, f"file:{first}")
    assert (error.status, error.code) == (400, "foreign_part")
    assert f"{third.name} says that it is part 2 of 3" in error.message

    other = write_llama(tmp_path / f"{first.name[:-20]}.gguf", layers=6)
    foreign = sorted(write_split(other, tmp_path / "other", 3))[2]
    shutil.copy(foreign, third)
    error = await refused(hive, f"file:{first}")
    assert (error.status, error.code) == (400, "foreign_part")
    assert "tensors" in error.message


# -- adapters ------------------------------------------------------------------------------------


async def test_an_adapter_changes_the_answers_beside_its_base(empty: Daemon, files: Path) -> None:
    def adapter(name: str, scale: float) -> dict[str, Any]:
        return {"name": name, "path": str(files / "pirate.gguf"), "scale": scale}

    base = await spawn(empty)
    pirate = await spawn(empty, lora=[adapter("pirate", 1.5)])
    nothing = await spawn(empty, lora=[adapter("nothing", 0.0)])
    assert pirate["model"] == "hive-tiny+pirate@1.5"
    assert nothing["model"] == "hive-tiny+nothing@0"
    assert len({worker["digest"] for worker in (base, pirate, nothing)}) == 3
    plain = await said(empty, "hive-tiny")
    assert await said(empty, pirate["model"]) != plain
    assert await said(empty, nothing["model"]) == plain


async def test_adapters_make_an_identity_of_files_and_scales_alone(
    files: Path, tmp_path: Path
) -> None:
    catalog = Catalog(cache_dir=tmp_path / "none", state_dir=tmp_path)
    tiny = await catalog.find("hive-tiny")
    other = write_lora(tmp_path / "other.gguf", seed=1)

    async def identity(*adapters: tuple[str, Path, float]) -> str:
        lora = [Lora(name=name, path=str(path), scale=scale) for name, path, scale in adapters]
        return (await derived(catalog, tiny, WorkerOptions(lora=lora))).digest

    pirate = files / "pirate.gguf"
    once = await identity(("a", pirate, 1.0), ("b", other, 0.5))
    assert once == await identity(("x", other, 0.5), ("y", pirate, 1.0))
    assert once not in (
        tiny.digest,
        await identity(("a", pirate, 1.0)),
        await identity(("a", pirate, 0.5), ("b", other, 1.0)),
        await identity(("a", pirate, 1.0), ("b", other, 0.5000001)),
    )


async def test_what_is_no_adapter_for_the_model_is_refused(
    hive: Daemon, files: Path, tmp_path: Path
) -> None:
    async def of(path: Path, *more: dict[str, str]) -> HiveError:
        error = await refused(hive, lora=[{"name": "a", "path": str(path)}, *more])
        assert error.status == 400
        assert error.param == "options.lora"
        return error

    missing = await of(tmp_path / "missing.gguf")
    assert (missing.code, "missing.gguf" in missing.message) == ("file_unreadable", True)
    assert (await of(TINY)).code == "not_an_adapter"
    vector = write_lora(tmp_path / "vector.gguf", kind="control_vector")
    assert "control_vector" in (await of(vector)).message
    foreign = write_lora(tmp_path / "foreign.gguf", architecture="qwen3")
    error = await of(foreign)
    assert error.code == "wrong_architecture"
    assert "for the architecture qwen3" in error.message
    pirate = files / "pirate.gguf"
    assert "one name" in (await of(pirate, {"name": "a", "path": str(pirate)})).message


async def test_an_adapter_that_does_not_match_fails_in_the_engines_words(
    empty: Daemon, tmp_path: Path
) -> None:
    small = write_llama(tmp_path / "small.gguf")
    lora = write_lora(tmp_path / "lora.gguf", model=small)
    with pytest.raises(HiveError, match="failed to apply lora adapter: tensor 'blk"):
        await spawn(empty, lora=[{"name": "a", "path": str(lora)}])


# -- chat templates ------------------------------------------------------------------------------


async def test_a_chat_template_makes_another_model(empty: Daemon) -> None:
    await spawn(empty)
    deaf = await spawn(empty, chat_template=DEAF)
    assert deaf["model"].startswith("hive-tiny+template-")
    assert await said(empty, deaf["model"]) == await said(empty, "hive-tiny", OTHER_QUESTION)
    assert await said(empty, deaf["model"]) != await said(empty, "hive-tiny")


async def test_the_text_of_a_template_lies_beside_the_socket_while_its_worker_runs(
    empty: Daemon,
) -> None:
    worker = await spawn(empty, chat_template=DEAF)
    kept = Path(worker["socket"]).with_suffix(".jinja")
    assert kept.read_text() == DEAF
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    argv = Path(f"/proc/{worker['pid']}/cmdline").read_bytes()
    assert b"im_start" not in argv
    await empty.client.run({"operation": "worker_stop", "worker_id": worker["worker_id"]})
    assert not kept.exists()


async def test_a_template_is_there_again_after_a_crash_and_gone_after_the_agents(
    fresh: Cluster,
) -> None:
    hive = await fresh.hive()
    worker = await spawn(hive, chat_template=DEAF)
    kept = Path(worker["socket"]).with_suffix(".jinja")
    kept.unlink()
    look = {"operation": "worker_get", "worker_id": worker["worker_id"]}
    os.kill(worker["pid"], signal.SIGKILL)

    async def again() -> bool:
        now = await hive.client.run(look)
        return bool(now["state"] == "ready" and now["pid"] != worker["pid"])

    await until(again, "the worker to run again")
    assert kept.read_text() == DEAF
    await hive.stop(signal.SIGKILL)
    await fresh.hive()
    assert not kept.exists()


async def test_a_broken_template_fails_in_the_engines_words(empty: Daemon) -> None:
    with pytest.raises(HiveError, match="Parser Error: Expected }}"):
        await spawn(empty, chat_template="{% for m in messages %}{{ m.content ")


# -- projectors ----------------------------------------------------------------------------------


def picture(red: int, green: int, blue: int) -> list[dict[str, Any]]:
    """A question about an image of one colour, 56 pixels a side."""
    raw = b"".join(b"\0" + bytes((red, green, blue)) * 56 for _ in range(56))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 56, 56, 8, 2, 0, 0, 0)
    png = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    url = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + png).decode()
    return [
        {"type": "text", "text": QUESTION},
        {"type": "image_url", "image_url": {"url": url}},
    ]


async def likelihood(daemon: Daemon, model: str, content: Any) -> float:
    answer = await chat(daemon, model, content, max_tokens=1, logprobs=True)
    return float(answer["choices"][0]["logprobs"]["content"][0]["logprob"])


async def test_a_projector_lets_a_model_see(empty: Daemon, files: Path) -> None:
    await spawn(empty)
    with pytest.raises(HiveError, match="image"):
        await chat(empty, "hive-tiny", picture(255, 0, 0))
    seeing = await spawn(empty, projector=str(files / "mmproj.gguf"))
    assert seeing["model"].startswith("hive-tiny+projector-")
    blind = await chat(empty, "hive-tiny", QUESTION)
    red = await chat(empty, seeing["model"], picture(255, 0, 0))
    assert red["usage"]["prompt_tokens"] - blind["usage"]["prompt_tokens"] >= 16
    assert await said(empty, seeing["model"]) == await said(empty, "hive-tiny")
    colours = {
        await likelihood(empty, seeing["model"], picture(*colour))
        for colour in ((255, 0, 0), (0, 0, 255))
    }
    assert len(colours) == 2


async def test_what_is_no_projector_is_refused(hive: Daemon, tmp_path: Path) -> None:
    error = await refused(hive, projector=str(TINY))
    assert (error.status, error.code, error.param) == (
        400,
        "not_a_projector",
        "options.projector",
    )
    error = await refused(hive, projector=str(tmp_path / "gone.gguf"))
    assert (error.status, error.param) == (400, "options.projector")


async def test_a_projector_comes_with_its_model_and_is_used(fresh: Cluster, files: Path) -> None:
    projector = (files / "mmproj.gguf").read_bytes()
    async with HubServer() as hub:
        model = {"seer-Q8_0.gguf": TINY.read_bytes()}
        hub.add("org/seer", {**model, "mmproj-F32.gguf": b"x", "mmproj-f16.gguf": projector})
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(fresh.folder / "hf")}
        hive = await fresh.hive(env=env)
        pulled = await hive.client.run({"operation": "model_download", "model": "org/seer"})
    assert pulled["size_bytes"] == TINY.stat().st_size + len(projector)
    assert pulled["projector"].endswith("/mmproj-f16.gguf")
    worker = await spawn(hive, "org/seer")
    assert (worker["model"], worker["digest"]) == ("org/seer:Q8_0", pulled["digest"])
    assert (await chat(hive, "org/seer", picture(1, 2, 3)))["usage"]["prompt_tokens"] > 16
    await hive.client.run({"operation": "worker_stop", "worker_id": worker["worker_id"]})
    await hive.client.run({"operation": "model_delete", "id": "org/seer"})
    assert not Path(pulled["projector"]).exists()


@pytest.mark.parametrize(
    ("projectors", "chosen"),
    [
        ([], None),
        (["mmproj-F32.gguf"], "mmproj-F32.gguf"),
        (["mmproj-x-f32.gguf", "mmproj-x-Q8_0.gguf", "mmproj-x-bf16.gguf"], "mmproj-x-bf16.gguf"),
        (["mmproj-BF16.gguf", "mmproj-F16.gguf"], "mmproj-F16.gguf"),
        (["mmproj-small-f16.gguf", "mmproj-large-f16.gguf"], None),
        (["other/mmproj-f16.gguf"], None),
        (["q4/mmproj-f32.gguf", "mmproj-f16.gguf"], "q4/mmproj-f32.gguf"),
    ],
)
def test_the_projector_of_a_model_lies_beside_it_or_above_in_the_best_precision(
    projectors: list[str], chosen: str | None
) -> None:
    (found,) = variants([*projectors, "q4/model-Q4_0.gguf"])
    assert found.projector == chosen
    assert found.files == ("q4/model-Q4_0.gguf",)
    assert set(found.fetched) == {*found.files, *([chosen] if chosen else [])}


# -- names ---------------------------------------------------------------------------------------


def test_what_was_added_to_a_model_stays_with_each_of_its_short_names() -> None:
    assert short_forms("Org/Name-GGUF:Q8_0+pirate") >= {"name+pirate", "org/name-gguf:q8_0+pirate"}
    assert "name" not in short_forms("Org/Name-GGUF:Q8_0+pirate")
    assert short_forms("file:/m/a+b.gguf+pirate") >= {"a+b.gguf+pirate", "a+b+pirate"}
    assert short_forms("file:/m/a+b.gguf") >= {"a+b.gguf", "a+b"}
    assert short_forms("file:/srv/c++/tiny") >= {"tiny", "file:/srv/c++/tiny"}
    assert short_forms("file:/srv/c++/tiny+pirate") >= {"tiny+pirate"}
    assert "tiny" not in short_forms("file:/srv/c++/tiny+pirate")


async def test_a_queen_finds_a_model_and_what_was_made_of_it_by_their_names(
    fresh: Cluster, files: Path
) -> None:
    queen = await fresh.queen()
    hive = await fresh.hive(queen=queen)
    lora = [{"name": "pirate", "path": str(files / "pirate.gguf"), "scale": 1.5}]
    made = await spawn(hive, lora=lora)
    await served(queen.client, made["model"])
    with pytest.raises(HiveError) as error:
        await said(queen, "hive-tiny")
    assert error.value.status == 503  # it is there, and not loaded
    await spawn(hive)
    await served(queen.client, "hive-tiny")
    assert await said(queen, "HIVE-tiny+pirate@1.5") == await said(hive, made["model"])
    assert await said(queen, "hive-tiny") == await said(hive, "hive-tiny")
    assert await said(queen, "hive-tiny") != await said(queen, made["model"])


async def test_a_model_that_a_worker_holds_under_another_name_is_not_deleted(
    empty: Daemon, tmp_path: Path
) -> None:
    path = write_llama(tmp_path / "held.gguf")
    await empty.client.run({"operation": "model_download", "model": f"file:{path}"})
    worker = await spawn(empty, f"file:{path}", chat_template=DEAF)
    with pytest.raises(HiveError) as error:
        await empty.client.run({"operation": "model_delete", "id": f"file:{path}"})
    assert error.value.code == "model_in_use"
    assert worker["worker_id"] in error.value.message
    await empty.client.run({"operation": "worker_stop", "worker_id": worker["worker_id"]})
    await empty.client.run({"operation": "model_delete", "id": f"file:{path}"})


# -- flags and options ---------------------------------------------------------------------------


async def test_a_flag_reaches_the_engine(empty: Daemon) -> None:
    await spawn(empty, flags={"n-predict": 3, "reasoning-format": "none", "special": True})
    answer = await chat(empty, "hive-tiny", max_tokens=None)
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("n-predikt", 3, "Did you mean --n-predict"),
        ("n-ctx", 64, "options.context_length"),
        ("verbosity", 5, "refused"),
        ("endpoint-props", True, "refused"),
        ("slot-save-path", "/tmp", "has no flag"),
        ("hostnames", ["0.0.0.0"], "has no flag"),
        ("n-predict", "many", "whole number"),
        ("n-predict", 1.5, "whole number"),
        ("n-predict", 2**31, "32 bits"),
        ("n-predict", True, "takes a value"),
        ("special", 1, "true or false"),
        ("slot-prompt-similarity", "much", "a number"),
        ("reasoning-format", "loud", "none, auto, deepseek_legacy, deepseek"),
        ("flash-attn-type", "disabled", "what memory the engine takes"),
        ("swa-full", True, "what memory the engine takes"),
        ("tensor-buft-overrides", "x=CPU", "what memory the engine takes"),
        ("rope-freq-base", 5.0, "another model"),
    ],
)
async def test_a_flag_that_cannot_be_passed_on_is_refused(
    hive: Daemon, flag: str, value: Any, says: str
) -> None:
    error = await refused(hive, flags={flag: value})
    assert (error.status, error.param) == (400, PARAM)
    assert says in error.message


def test_no_flag_overrides_what_the_worker_sets() -> None:
    class Recorder:
        """Notes which fields are set."""

        def __init__(self, real: Any) -> None:
            self.__dict__.update(real=real, seen=set())

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def __setattr__(self, name: str, value: Any) -> None:
            self.seen.add(name)
            setattr(self.real, name, value)

    class Recording:
        def __init__(self) -> None:
            self.params = Recorder(xllamacpp.CommonParams())

        def __getattr__(self, name: str) -> Any:
            return getattr(xllamacpp, name)

        def CommonParams(self) -> Recorder:  # noqa: N802  # llama.cpp's name
            return self.params

    known = {name for name in dir(xllamacpp.CommonParams()) if not name.startswith("_")}
    for pooling in (None, "mean"):
        xlc = Recording()
        wanted = Wanted(
            TINY, Path("s"), "m", 64, 1, 1, pooling=pooling, chat_template=Path(__file__)
        )
        parameters(xlc, wanted)
        assert xlc.params.seen <= known
        open_ = [
            name
            for name in xlc.params.seen
            if isinstance(getattr(xllamacpp.CommonParams(), name), bool | int | float)
            and not is_refused(name.replace("_", "-"))
        ]
        assert open_ == []


def is_refused(flag: str) -> bool:
    return flag in RULES.set_by_hive or RULES.refusal(flag) is not None


@pytest.mark.parametrize(
    ("engine", "options", "param"),
    [
        ("llamacpp", {"dtype": "float16"}, "dtype"),
        ("llamacpp", {"quantization": "awq"}, "quantization"),
        ("llamacpp", {"memory_share": 0.5}, "memory_share"),
        ("llamacpp", {"kv_type": "fp8"}, "kv_type"),
        ("llamacpp", {"url": "http://x"}, "url"),
        ("llamacpp", {"script": {}}, "script"),
        ("vllm", {"projector": "/x"}, "projector"),
        ("vllm", {"context_shift": True}, "context_shift"),
        ("vllm", {"kv_type": "q8_0"}, "kv_type"),
        ("vllm", {"lora": [{"name": "a", "path": "/a", "scale": 0.5}]}, "lora"),
        ("scripted", {"flags": {"x-y": 1}}, "flags"),
        ("external", {"threads": 1}, "threads"),
        ("external", {"lora": [{"name": "a", "path": "/a"}]}, "lora"),
    ],
)
def test_an_option_of_another_engine_is_refused(
    engine: Any, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as error:
        check(engine, WorkerOptions.model_validate(options))
    assert error.value.param == f"options.{param}"


def test_a_share_of_gpu_memory_is_refused_on_the_cpu() -> None:
    share = WorkerOptions(memory_share=0.5)
    with pytest.raises(InvalidRequest, match="share of a GPU's memory") as error:
        check_device("vllm", share, "cpu")
    assert error.value.param == "options.memory_share"
    check_device("vllm", share, "cuda:0")
    check_device("vllm", WorkerOptions(), "cpu")


def test_every_option_belongs_to_an_engine() -> None:
    assert frozenset().union(*OPTIONS.values()) == WorkerOptions.model_fields.keys()


async def test_options_that_llamacpp_does_not_have_are_refused_when_they_are_posted(
    hive: Daemon,
) -> None:
    error = await refused(hive, dtype="float16")
    assert (error.status, error.param) == (400, "options.dtype")
    error = await refused(hive, engine_version="1.0")
    assert (error.status, error.param) == (400, "options.engine_version")
    assert xllamacpp.__version__ in error.message


# -- the command line ------------------------------------------------------------------------------


def test_adapters_and_flags_are_written_in_short() -> None:
    assert engine_options.adapters([]) is None
    assert engine_options.adapters(["a=/x/a.gguf", "b=/x/b@home@0.5", "c=/x/c@v2"]) == [
        Lora(name="a", path="/x/a.gguf"),
        Lora(name="b", path="/x/b@home", scale=0.5),
        Lora(name="c", path="/x/c@v2"),
    ]
    assert engine_options.flags([]) is None
    written = ["n-keep=3", "--swa-full", "mmap=false", "x-base=1.5", "mode=auto", "name=a=b"]
    assert engine_options.flags(written) == {
        "n-keep": 3,
        "swa-full": True,
        "mmap": False,
        "x-base": 1.5,
        "mode": "auto",
        "name": "a=b",
    }


@pytest.mark.parametrize("written", ["pirate", "a=relative.gguf", "=/x", "a=/x@nan", "a b=/x"])
def test_an_adapter_that_is_written_wrong_says_how_to_write_it(written: str) -> None:
    with pytest.raises(WrongUsage, match="NAME=PATH"):
        engine_options.adapters([written])


async def test_the_command_starts_a_worker_with_everything(
    empty: Daemon, files: Path, tmp_path: Path
) -> None:
    template = tmp_path / "deaf.jinja"
    template.write_text(DEAF)
    process = await asyncio.create_subprocess_exec(
        *hive_command(),
        *("workers", "spawn", "hive-tiny", f"--url={empty.url}", "--device=cpu", "--json"),
        f"--lora=pirate={files / 'pirate.gguf'}@1.5",
        f"--projector={files / 'mmproj.gguf'}",
        f"--chat-template={template}",
        "--flag=n-predict=3",
        env=clean_env(),
        stdout=asyncio.subprocess.PIPE,
    )
    told, _ = await process.communicate()
    assert process.returncode == 0
    worker = json.loads(told)
    assert re.fullmatch(r"hive-tiny\+projector-\w{6}\+pirate@1\.5\+template-\w{6}", worker["model"])
    answer = await chat(empty, worker["model"], max_tokens=None)
    assert answer["usage"]["completion_tokens"] == 3


# -- what a model is made for ---------------------------------------------------------------------


def info(**facts: Any) -> ModelInfo:
    given = {"id": "m", "digest": "d", "format": "gguf", "size_bytes": 1, "path": "/m.gguf"}
    return ModelInfo.model_validate({**given, "source": "file", **facts})


@pytest.mark.parametrize(
    ("facts", "options", "flag", "tasks"),
    [
        ({}, {}, None, ("generate",)),
        ({}, {"embeddings": True}, "--pooling=mean", ("embed",)),
        ({}, {"rerank": True}, "--pooling=rank", ("rerank",)),
        ({"embedding": True, "pooling": "cls"}, {}, "--pooling=cls", ("embed",)),
        ({"embedding": True, "pooling": "last"}, {}, "--pooling=last", ("embed",)),
        ({"embedding": True, "pooling": "rank"}, {}, "--pooling=rank", ("rerank",)),
        ({"embedding": True}, {}, "--pooling=mean", ("embed",)),
    ],
)
def test_a_model_is_served_for_what_it_was_made_for_and_pooled_as_it_was_trained(
    facts: dict[str, Any], options: dict[str, Any], flag: str | None, tasks: tuple[str, ...]
) -> None:
    spec = placed([CPU], info(**facts), **options)
    assert spec.tasks == tasks
    pooling = [word for word in launch(spec, Path("s")).argv if word.startswith("--pooling")]
    assert pooling == ([flag] if flag else [])


def test_the_pooling_is_read_from_the_file(tmp_path: Path) -> None:
    for number, pooling in ((0, None), (1, "mean"), (2, "cls"), (3, "last"), (4, "rank")):
        path = write_gguf(tmp_path / "m.gguf", metadata={"llama.pooling_type": number})
        assert read_header(path).pooling == pooling


# -- threads and devices ---------------------------------------------------------------------------


@pytest.mark.parametrize("cores", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("model_bytes", [10**6, 10**10])
def test_workers_take_no_more_threads_than_there_are_cores_until_none_is_left(
    cores: int, model_bytes: int
) -> None:
    in_use = 0
    while in_use < cores:
        threads = default_threads(model_bytes, cores, in_use)
        assert 1 <= threads <= cores - in_use
        assert crowding(threads, cores, in_use) is None
        in_use += threads
    assert default_threads(model_bytes, cores, in_use) == 1
    assert crowding(1, cores, in_use) is not None


def test_a_worker_on_gpus_takes_one_thread() -> None:
    assert placed(GPUS, info(size_bytes=10**10)).threads == 1
    assert placed([CPU], info(size_bytes=10**10)).threads == 8
    assert placed(GPUS, info(), threads=3).threads == 3


async def test_two_workers_that_are_asked_for_at_once_count_each_others_threads(
    empty: Daemon,
) -> None:
    both = await asyncio.gather(spawn(empty, engine="llamacpp"), spawn(empty, engine="llamacpp"))
    threads = []
    for worker in both:
        argv = Path(f"/proc/{worker['pid']}/cmdline").read_text().split("\0")
        threads += [int(word.partition("=")[2]) for word in argv if word.startswith("--threads=")]
    assert len(threads) == 2
    assert sum(threads) <= max(2, await cores_of(empty))


async def cores_of(daemon: Daemon) -> int:
    devices = (await daemon.client.get("/v1/capabilities"))["devices"]
    return next(int(device["cores"]) for device in devices if device["id"] == "cpu")


async def test_whoever_asks_for_threads_that_others_use_is_told(empty: Daemon) -> None:
    lines: list[str] = []
    operation = {
        "operation": "worker_spawn",
        "model": "hive-tiny",
        "worker": "cpu",
        "options": {"threads": 1},
    }
    for _ in range(3):
        await empty.client.submit_and_stream(operation, lines.append)
    workers = (await empty.client.run({"operation": "worker_list"}))["workers"]
    assert len(workers) == 3
    assert any("take turns" in line for line in lines) == (await cores_of(empty) < 3)


def placed(devices: list[Device], model: ModelInfo, **options: Any) -> Any:
    request = WorkerSpawn(model="m", options=WorkerOptions.model_validate(options))
    return decide(request, model, devices, worker_id="w-1", cores=16, threads_in_use=0)


def test_a_worker_sees_its_own_gpus_only() -> None:
    one = launch(placed(GPUS[1:], info()), Path("s"))
    assert one.env["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert one.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "--gpus=1" in one.argv
    both = launch(placed(GPUS, info()), Path("s"))
    assert both.env["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1"
    assert "--gpus=2" in both.argv
    assert launch(placed([CPU], info()), Path("s")).env["CUDA_VISIBLE_DEVICES"] == ""


def test_a_gpu_that_tells_no_uuid_is_shown_by_its_number() -> None:
    nameless = GPUS[1].model_copy(update={"uuid": None})
    for model in (info(), info(format="safetensors")):
        alone = launch(placed([nameless], model), Path("s"))
        assert alone.env["CUDA_VISIBLE_DEVICES"] == "1"
        assert alone.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        both = launch(placed([nameless, GPUS[0]], model), Path("s"))
        assert both.env["CUDA_VISIBLE_DEVICES"] == "1,0"
    sliced = nameless.model_copy(update={"parent": "GPU-1"})
    with pytest.raises(Unavailable, match="MIG instance cuda:1"):
        placed([sliced], info())


class Gpus:
    """The installed llama.cpp, told that it sees GPUs."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __getattr__(self, name: str) -> Any:
        return getattr(xllamacpp, name)

    def get_device_info(self) -> list[dict[str, str]]:
        return [{"name": f"CUDA{n}"} for n in range(self.count)] + [{"name": "CPU"}]


def on_gpus(count: int, there: int, **more: Any) -> Any:
    wanted = Wanted(TINY, Path("s"), "m", 64, 1, 1, device="cuda:5", gpus=count, **more)
    return parameters(Gpus(there), wanted)


def test_layers_are_split_over_gpus_as_the_prediction_laid_them_out() -> None:
    modes = xllamacpp.llama_split_mode
    alone = on_gpus(1, 1)
    assert (alone.n_gpu_layers, alone.main_gpu) == (-1, 0)
    assert alone.split_mode == modes.LLAMA_SPLIT_MODE_NONE
    shared = on_gpus(2, 2, split=(20.0, 12.0))
    assert shared.split_mode == modes.LLAMA_SPLIT_MODE_LAYER
    assert shared.tensor_split[:3] == [20, 12, 0]
    assert not any(on_gpus(2, 2).tensor_split)
    with pytest.raises(ValueError, match="sees 1 cuda devices and 2 were asked for"):
        on_gpus(2, 1)


async def test_the_installed_build_tells_what_it_can() -> None:
    build = await Builds(list).installed()
    assert build.version == xllamacpp.__version__
    assert "cpu" in build.backends
    assert build.settings["n_ctx"] == Setting(kind="int")
    assert build.settings["split_mode"].choices == ("none", "layer", "row", "tensor")


async def test_a_build_is_asked_once_and_again_when_the_driver_is_another() -> None:
    devices = [CPU, *GPUS]
    builds = Builds(lambda: devices)
    first, *others = await asyncio.gather(*(builds.installed() for _ in range(20)))
    assert all(other is first for other in others)
    for changed in ({"driver_version": "580.1"}, {"healthy": False}, {"uuid": "GPU-new"}):
        devices[1] = devices[1].model_copy(update=changed)
        again = await builds.installed()
        assert again is not first
        assert again is await builds.installed()
        first = again
    devices[1] = devices[1].model_copy(update={"vram_free_mb": 0})
    assert await builds.installed() is first


async def test_those_who_ask_the_same_wait_for_one_answer() -> None:
    asked: Asked[str, int] = Asked()
    started, answered = asyncio.Event(), asyncio.Event()
    times = 0

    async def answer() -> int:
        nonlocal times
        times += 1
        started.set()
        await answered.wait()
        if times == 1:
            raise ValueError("no answer")
        return times

    waiting = [asyncio.create_task(asked.get("a", answer)) for _ in range(3)]
    await started.wait()
    waiting[0].cancel()
    answered.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(one) for one in outcomes] == [asyncio.CancelledError, ValueError, ValueError]
    assert [await asked.get("a", answer) for _ in range(2)] == [2, 2]
    assert await asked.get("b", answer) == 3


def test_a_build_computes_where_it_has_a_backend() -> None:
    gpu = Build(version="1", backends=frozenset({"cpu", "cuda"}), settings={})
    gpu.check_device("cuda:3")
    assert gpu.cpu_only(WorkerSpawn(model="m"), [*GPUS, CPU]) is None
    with pytest.raises(Unavailable, match="vulkan"):
        gpu.check_device("vulkan:0")


async def test_a_build_without_gpus_refuses_them_when_they_are_asked_for(
    fresh: Cluster, driver: FakeDriver
) -> None:
    driver.write(gpus(2))
    hive = await fresh.hive(env=driver.env)
    operation = {"operation": "worker_spawn", "model": "hive-tiny"}
    with pytest.raises(HiveError) as error:
        await hive.client.submit({**operation, "worker": "cuda", "device": 1})
    assert (error.value.status, error.value.code) == (503, "engine_without_device")
    assert "Install a build of xllamacpp for cuda" in error.value.message
    assert (await hive.client.run({"operation": "worker_list"}))["workers"] == []

    lines: list[str] = []
    left_open = await hive.client.submit_and_stream(operation, lines.append)
    assert left_open.value()["device"] == "cpu"
    assert any(line.startswith("[WARN]") and "CPU only" in line for line in lines)


async def test_a_worker_over_several_gpus_is_told_which_and_how_much_of_the_model_each_takes(
    fresh: Cluster, driver: FakeDriver
) -> None:
    driver.write(gpus(3))
    hive = await fresh.hive(env={**driver.env, **fake_cuda.installed()})
    operation = {"operation": "worker_spawn", "model": "hive-tiny", "worker": "cuda"}
    worker = await hive.client.run({**operation, "devices": [2, 0]})
    assert worker["devices"] == ["cuda:2", "cuda:0"]
    argv = Path(f"/proc/{worker['pid']}/cmdline").read_text().split("\0")
    assert "--gpus=2" in argv
    assert "--threads=1" in argv
    split = next(word for word in argv if word.startswith("--split="))
    assert sum(map(int, split.partition("=")[2].split(","))) == 5  # four blocks and the head
    variables = Path(f"/proc/{worker['pid']}/environ").read_text().split("\0")
    assert "CUDA_VISIBLE_DEVICES=GPU-2,GPU-0" in variables
    assert await said(hive, "hive-tiny")
