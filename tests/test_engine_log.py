"""What an engine's log tells: how far it is, and why it ended.

The lines of vLLM on the CPU and of llama.cpp were seen; those that need a GPU are as their sources
have them (vllm/v1/worker/utils.py, vllm/v1/core/kv_cache_utils.py, c10/cuda/CUDAException.cpp).
``tests/test_vllm.py`` and ``tests/test_engines.py`` provoke what can be provoked without one.
"""

from __future__ import annotations

import errno
import re
import time
from pathlib import Path

import pytest

from hive_agent.workers.base import broke
from hive_agent.workers.engine_log import DETAIL_CHARS, explain, last_words, progress
from hive_agent.workers.log_file import LAST_START_BYTES, LIMIT_BYTES, LogFile
from hive_agent.workers.worker import not_started

TRACEBACK = "\n".join(
    f'(EngineCore pid=7) ERROR 11-21 14:54:48 [core.py:1510]   File "x.py", line {n}, in f'
    for n in range(200)
)


@pytest.mark.parametrize(
    ("line", "kind", "detail"),
    [
        (
            "(EngineCore pid=9) ERROR 11-21 14:54:48 [core.py:15] torch.OutOfMemoryError: CUDA out "
            "of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB",
            "out_of_memory",
            "CUDA out of memory",
        ),
        (
            "ValueError: Free memory on device cuda:0 (3.1/23.64 GiB) on startup is less than "
            "desired GPU memory utilization (0.9, 21.28 GiB). Decrease GPU memory utilization",
            "out_of_memory",
            "3.1/23.64 GiB",
        ),
        (
            "ValueError: To serve at least one request with the models's max seq len (131072), "
            "(16.00 GiB KV cache is needed, which is larger than the available KV cache memory "
            "(7.12 GiB). Based on the available memory, the estimated maximum model length is 58k",
            "out_of_memory",
            "larger than the available KV cache memory",
        ),
        ("ValueError: No available memory for the cache blocks. Try", "out_of_memory", "No avail"),
        (
            "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 4096.00 MiB on device 0: "
            "cudaMalloc failed: out of memory",
            "out_of_memory",
            "cudaMalloc failed",
        ),
        (
            "RuntimeError: The NVIDIA driver on your system is too old (found version 11040). "
            "Please update your GPU driver",
            "wrong_driver",
            "found version 11040",
        ),
        (
            "RuntimeError: CUDA driver version is insufficient for CUDA runtime version",
            "wrong_driver",
            "insufficient",
        ),
        ("RuntimeError: Failed to infer device type, please set", "wrong_driver", "infer device"),
        (
            "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the "
            "device",
            "missing_kernel",
            "no kernel image",
        ),
        (
            "ValueError: The quantization method gptq_marlin is not supported for the current GPU. "
            "Minimum capability: 80. Current capability: 75.",
            "missing_kernel",
            "gptq_marlin",
        ),
        (
            "  Value error, Model architectures ['NoSuchForCausalLM'] are not supported for now.",
            "unsupported_model",
            "NoSuchForCausalLM",
        ),
        (
            "llama_model_load: error loading model: unknown model architecture: 'nosuch'",
            "unsupported_model",
            "'nosuch'",
        ),
        (
            "(Worker pid=3) ERROR 11-21 14:54:17 [m.py:9] safetensors_rust.SafetensorError: Error "
            "while deserializing header: incomplete metadata, file not fully covered",
            "bad_model_file",
            "incomplete metadata",
        ),
        (
            "llama_model_load: error loading model: tensor 'blk.0.ffn_up.weight' data is not "
            "within the file bounds, model is corrupted or incomplete",
            "bad_model_file",
            "blk.0.ffn_up.weight",
        ),
        (
            "    sock.bind(path)\nOSError: [Errno 98] Address already in use",
            "engine_socket",
            "in use",
        ),
        ("OSError: AF_UNIX path too long", "engine_socket", "too long"),
        (
            "  Value error, User-specified max_model_len (99999) is greater than the derived "
            "max_model_len (max_position_embeddings=1024.0 or model_max_length=None in config)",
            "bad_option",
            "99999",
        ),
        ("api_server.py: error: unrecognized arguments: --nosuch", "bad_option", "--nosuch"),
        (
            "CUDA error: uncorrectable ECC error encountered",
            "gpu_failed",
            "uncorrectable ECC",
        ),
        (
            "ImportError: /x/_C.abi3.so: undefined symbol: _ZN3c104cuda9SetDeviceEi",
            "engine_broken",
            "undefined symbol",
        ),
        (
            "ERROR 11-21 [multiproc_executor.py:9] Worker proc VllmWorker-0 died unexpectedly "
            "(exit code: -9), shutting down executor.\nRuntimeError: Executor failed.",
            "process_killed",
            "VllmWorker-0",
        ),
        (
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core "
            "proc(s): {'EngineCore_0': -11}",
            "process_crashed",
            "EngineCore_0",
        ),
    ],
)
def test_a_failure_is_recognised_and_says_what_to_do(line: str, kind: str, detail: str) -> None:
    after = "RuntimeError: Engine core initialization failed. See root cause above."
    failure = explain([*TRACEBACK.splitlines(), *line.splitlines(), *TRACEBACK.splitlines(), after])
    assert failure is not None
    assert failure.kind == kind
    assert detail in failure.detail
    assert failure.advice.endswith(".")
    assert str(failure).count("\n") == 0
    assert len(str(failure)) < 600


def test_a_cause_is_told_before_what_it_brought_about() -> None:
    lines = [
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040).",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    ]
    for order in (lines, lines[::-1]):
        failure = explain(order)
        assert failure is not None
        assert failure.kind == "wrong_driver"


def test_a_list_in_the_engines_words_is_told_and_a_long_one_is_marked_as_cut() -> None:
    words = "Unknown quantization method: q9. Must be one of ['awq', 'fp8']"
    failure = explain([f"  Value error, {words}. [type=value_error, input_value=...]"])
    assert failure is not None
    assert (failure.kind, failure.detail) == ("bad_option", words)
    names = ", ".join(f"'method{n}'" for n in range(100))
    failure = explain([f"  Value error, Must be one of [{names}]. [type=value_error]"])
    assert failure is not None
    assert re.search(r"'method\d+' …$", failure.detail)
    assert len(failure.detail) <= DETAIL_CHARS


def test_what_is_not_recognised_is_told_in_the_engines_own_words() -> None:
    lines = ["loading", "error: the script says so", "bye"]
    assert explain(lines) is None
    assert last_words(lines) == "the script says so"
    assert last_words([]) == "it said nothing"
    root = "(Worker pid=3) ERROR 11-21 15:27:45 [m.py:953] ZeroDivisionError: division by zero"
    after = "RuntimeError: Engine core initialization failed. See root cause above."
    assert (
        last_words([*TRACEBACK.splitlines(), root, after]) == "ZeroDivisionError: division by zero"
    )


def test_warnings_of_a_healthy_start_are_no_failure() -> None:
    lines = [
        "(APIServer pid=1) WARNING 11-21 14:40:36 [system_utils.py:255] Found ulimit of 20000 and "
        "failed to automatically increase. This can cause fd limit errors like `OSError: [Errno "
        "24] Too many open files`. Consider increasing with ulimit -n",
        "(EngineCore pid=2) WARNING 11-21 14:40:44 [cpu.py:224] Triton is not installed.",
    ]
    assert explain(lines) is None


def test_progress_is_told_step_by_step() -> None:
    text = (
        "(APIServer pid=1) INFO 11-21 14:40:44 [model.py:733] Resolved architecture: LlamaForCaus\n"
        "(Worker pid=3) INFO 11-21 14:40:58 [r.py:68] Starting to load model /m...\n"
        "Loading safetensors checkpoint shards:   0% Completed | 0/7 [00:00<?, ?it/s]\r"
        "Loading safetensors checkpoint shards:  42% Completed | 3/7 [00:01<00:01]\r"
        "Loading safetensors checkpoint shards:  42% Completed | 3/7 [00:01<00:01]\n"
        "(Worker pid=3) INFO 11-21 14:40:58 [d.py:501] Loading weights took 0.02 seconds\n"
        "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  35%|###5   | 12/34 [00:01<00]\n"
    )
    assert list(progress(text)) == [
        "it is a LlamaForCaus",
        "loading weights",
        "loading weights 0/7",
        "loading weights 3/7",
        "weights loaded in 0.02 s",
        "capturing CUDA graphs 12/34",
    ]


@pytest.mark.parametrize("line_chars", [10, 1000, LAST_START_BYTES])
@pytest.mark.parametrize(
    "piece", ["a", "_", "_a::", "Model architectures [", "sock.bind()) ) a", "Please install a"]
)
def test_a_log_of_hostile_words_is_read_to_its_end(piece: str, line_chars: int) -> None:
    """Seconds at the most; hours, where a pattern takes the square of the length of a line."""
    text = piece * (LAST_START_BYTES // len(piece))
    lines = [text[i : i + line_chars] for i in range(0, len(text), line_chars)]
    began = time.monotonic()
    assert explain(lines) is None
    assert len(last_words(lines)) <= 300
    assert time.monotonic() - began < 30


def test_of_much_news_the_last_is_told(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "w.log")
    log.begin()
    endless = "Loading safetensors checkpoint shards:" * (LIMIT_BYTES // 38)
    log.path.write_text(f"{endless}\n{endless}\nStarting to load model /m\n")
    began = time.monotonic()
    assert list(progress(log.news())) == ["loading weights"]
    assert time.monotonic() - began < 30
    assert log.news() == ""


def test_a_symptom_over_two_lines_is_found_wherever_it_stands() -> None:
    symptom = ["    sock.bind(path)", "PermissionError: [Errno 13] Permission denied"]
    for before in range(20):
        failure = explain(["words"] * before + symptom)
        assert failure is not None
        assert failure.kind == "engine_socket"


def test_a_log_tells_its_news_once_and_its_last_start_alone(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "w.log")
    log.begin()
    with log.path.open("a") as file:
        print("first start", file=file)
        file.write("half a li")
        file.flush()
        assert log.news() == "first start\n"
        assert log.news() == ""
        print("ne", file=file, flush=True)
        assert log.news() == "half a line\n"
        log.begin()
        print("second start", file=file, flush=True)
    assert log.of_last_start() == ["second start"]
    assert log.tail(2) == ["half a line", "second start"]
    assert log.tail(0) == []


def test_a_full_disk_is_named_with_the_file_that_it_has_no_room_for() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/state/logs/w-1.log")
    failure = not_started(error)
    assert failure.kind == "disk_full"
    for said in (str(failure), broke(error)):
        assert "No space left on device: /state/logs/w-1.log" in said
        assert "Free some space" in said
    other = OSError(errno.EACCES, "Permission denied", "/state/logs/w-1.log")
    assert not_started(other).kind == "engine_broken"
    assert "Permission denied: /state/logs/w-1.log" in broke(other)
