"""Flags that are passed on to an engine: only those that it has, and that Hive does not set."""

from __future__ import annotations

from pathlib import Path

import pytest

from hive_agent.workers.command import launch
from hive_agent.workers.flags import Flag, from_help
from hive_agent.workers.spec import WorkerSpec
from hive_agent.workers.vllm import RULES
from operations.errors import InvalidRequest
from operations.hosts import ModelInfo
from operations.operations import FlagValue, WorkerOptions

HELP = """\
usage: api_server.py [-h] [--headless] [--enable-x | --no-enable-x]

options:
  --headless            Run in headless mode. See --port for more.
  --api-server-count API_SERVER_COUNT, -asc API_SERVER_COUNT
  --enable-prefix-caching, --no-enable-prefix-caching
                        Whether to --cache. (default: None)
  --max-num-batched-tokens MAX_NUM_BATCHED_TOKENS
  --load-format {auto,dummy}
  --scheduling-policy {fcfs,priority}
  --allowed-media-domains ALLOWED_MEDIA_DOMAINS [ALLOWED_MEDIA_DOMAINS ...]
  --disable-log-stats   Disable logging statistics. (default: False)
  --ssl-keyfile SSL_KEYFILE
  --uds UDS             Unix domain socket path.
"""


@pytest.fixture(scope="module")
def known() -> dict[str, Flag]:
    return from_help(HELP)


def test_a_help_tells_the_flags_and_what_they_take(known: dict[str, Flag]) -> None:
    assert known["enable-prefix-caching"] == Flag(switch=True, off=True)
    assert known["disable-log-stats"] == Flag(switch=True)
    assert known["max-num-batched-tokens"] == Flag(switch=False)
    assert known["load-format"] == Flag(switch=False, choices=("auto", "dummy"))
    assert known["allowed-media-domains"] == Flag(switch=False, many=True)
    assert set(known) == {
        "headless",
        "api-server-count",
        "enable-prefix-caching",
        "max-num-batched-tokens",
        "load-format",
        "scheduling-policy",
        "allowed-media-domains",
        "disable-log-stats",
        "ssl-keyfile",
        "uds",
    }


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("enable-prefix-cache", True, "Did you mean --enable-prefix-caching"),
        ("nothing-like-it", 1, "has no flag --nothing-like-it"),
        ("max-model-len", 5, "Use 'options.context_length'"),
        ("uds", "/tmp/x", "refused"),
        ("ssl-keyfile", "/tmp/x", "refused"),
        ("api-server-count", 2, "refused"),
        ("disable-log-stats", False, "only be turned on"),
        ("disable-log-stats", "yes", "is true or false"),
        ("max-num-batched-tokens", True, "takes a value"),
        ("max-num-batched-tokens", ["1", "2"], "takes one value"),
        ("max-num-batched-tokens", "8k", "a whole number above 0"),
        ("max-num-batched-tokens", 0, "a whole number above 0"),
        ("scheduling-policy", "luck", "Give one of: fcfs, priority"),
        ("load-format", "dummy", "another model"),
        ("tokenizer", "/other", "another model"),
        ("hf-overrides", "{}", "another model"),
        ("kv-cache-memory-bytes", 5, "what memory the engine takes"),
        ("speculative-config", "{}", "what memory the engine takes"),
        ("pipeline-parallel-size", 2, "how it is run"),
        ("max-loras", 9, "Use 'options.lora'"),
        ("log-level", "debug", "what it logs"),
        ("enable-logging-iteration-details", True, "what it logs"),
        ("otlp-traces-endpoint", "http://a.example", "what it logs"),
        ("device-ids", "1", "how it is run"),
        ("numa-bind-cpus", "0", "how it is run"),
        ("hf-token", "secret", "another model"),
        ("cpu-offload-gb", 4, "what memory the engine takes"),
        ("mm-processor-cache-gb", 400, "what memory the engine takes"),
        ("allowed-local-media-path", "/", "code, files or servers"),
        ("tool-parser-plugin", "/tmp/x.py", "code, files or servers"),
        ("allowed-media-domains", ["a.example", "--model=/other"], "begins like a flag"),
        ("allowed-media-domains", [], "at least one value"),
    ],
)
def test_a_flag_that_will_not_do_is_refused(
    name: str, value: FlagValue, says: str, known: dict[str, Flag]
) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        RULES.check({name: value}, known)
    assert refused.value.param == "options.flags"
    assert f"--{name}" in refused.value.message


def test_flags_that_were_checked_become_arguments(known: dict[str, Flag]) -> None:
    flags: dict[str, FlagValue] = {
        "enable-prefix-caching": False,
        "disable-log-stats": True,
        "max-num-batched-tokens": 512,
        "allowed-media-domains": ["a.example", "b.example"],
    }
    RULES.check(flags, known)
    assert RULES.argv(flags) == [
        "--no-enable-prefix-caching",
        "--disable-log-stats",
        "--max-num-batched-tokens=512",
        "--allowed-media-domains",
        "a.example",
        "b.example",
    ]


def command(*, devices: tuple[str, ...] = ("cpu",), **options: object) -> tuple[str, ...]:
    model = ModelInfo(
        id="org/model", digest="d", format="safetensors", size_bytes=1, source="file", path="/m"
    )
    spec = WorkerSpec(
        worker_id="w",
        model=model,
        engine="vllm",
        devices=devices,
        cuda_ids=tuple(f"GPU-{device}" for device in devices if device != "cpu"),
        slots=8,
        context_length=1024,
        threads=2,
        options=WorkerOptions.model_validate(options),
        python="/env/bin/python",
    )
    made = launch(spec, Path("/run/w.sock"))
    settings = tuple(
        f"{name}={value}" for name, value in made.environment({"PYTHONPATH": "x"}).items()
    )
    return made.argv + settings


def test_vllm_is_told_what_was_asked() -> None:
    said = command(
        devices=("cuda:1", "cuda:3"),
        dtype="bfloat16",
        quantization="awq",
        kv_type="fp8",
        memory_share=0.5,
        lora=[{"name": "pirate", "path": "/l/p"}, {"name": "poet", "path": "/l/q"}],
        flags={"enable-sleep-mode": True},
    )
    for part in (
        "--uds=/run/w.sock",
        "--model=/m",
        "--served-model-name=org/model",
        "--max-model-len=1024",
        "--max-num-seqs=8",
        "--dtype=bfloat16",
        "--quantization=awq",
        "--kv-cache-dtype=fp8",
        "--gpu-memory-utilization=0.5000",
        "--tensor-parallel-size=2",
        "--enable-lora",
        "pirate=/l/p",
        "poet=/l/q",
        "--enable-sleep-mode",
        "VLLM_SERVER_DEV_MODE=1",
        "CUDA_VISIBLE_DEVICES=GPU-cuda:1,GPU-cuda:3",
    ):
        assert part in said
    assert not any(part.startswith("PYTHONPATH") for part in said)
    assert "--enforce-eager" not in said


def test_vllm_on_the_cpu_takes_no_more_threads_than_it_was_given() -> None:
    said = command()
    assert "OMP_NUM_THREADS=2" in said
    assert "VLLM_CPU_KVCACHE_SPACE=1" in said
    assert "--enforce-eager" in said
    assert "CUDA_VISIBLE_DEVICES=" in said
    assert not any(part.startswith(("--tensor", "--gpu")) for part in said)


def test_a_chat_template_reaches_vllm_as_a_file() -> None:
    spec_options = {"chat_template": "{{ messages }}" * 1000}
    said = command(**spec_options)
    (flag,) = (part for part in said if part.startswith("--chat-template="))
    assert flag == "--chat-template=/run/w.jinja"
