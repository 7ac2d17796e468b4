"""What an engine's own log tells: how far it has come with loading, and why it gave up.

The words are those of vLLM (0.32 and 0.33), PyTorch, CUDA, safetensors and llama.cpp; each was
either seen or read in their sources. What is not recognised is told as the engine said it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

DETAIL_CHARS: Final = 240
LINE_CHARS: Final = 1000
MOST_LINES: Final = 4000
"""What is looked at, for the words of an engine are partly those of the file that it reads: of each
line the beginning, and of many lines the last. No pattern below sees more than a few lines at once,
and none that repeats may begin with a repetition without a limit."""

_BLOCK_LINES: Final = 8  # a symptom spans two lines at most

FailureKind = Literal[
    "out_of_memory",
    "bad_model_file",
    "missing_kernel",
    "unsupported_model",
    "wrong_driver",
    "gpu_failed",
    "gpu_disturbed",
    "engine_socket",
    "bad_option",
    "engine_broken",
    "disk_full",
    "process_killed",
    "process_crashed",
]


@dataclass(frozen=True)
class Failure:
    """Why an engine ended.

    :param detail: the engine's own words
    :param advice: what to do
    """

    kind: FailureKind
    what: str
    detail: str
    advice: str

    def __str__(self) -> str:
        said = f" ({self.detail})" if self.detail else ""
        return f"{self.what}{said}. {self.advice}"


@dataclass(frozen=True)
class _Symptom:
    kind: FailureKind
    pattern: re.Pattern[str]
    what: str
    advice: str


def _symptom(kind: FailureKind, what: str, advice: str, *patterns: str) -> _Symptom:
    return _Symptom(
        kind, re.compile("|".join(patterns), re.IGNORECASE | re.MULTILINE), what, advice
    )


_LESS: Final = (
    "Ask for less context or fewer slots, use a smaller quantization or more devices, or stop "
    "another worker; 'hive fit MODEL' tells what it takes."
)

_SYMPTOMS: Final = (
    _symptom(
        "wrong_driver",
        "the NVIDIA driver is missing, or too old for this build of the engine",
        "Update the driver ('nvidia-smi' tells its version), or install a build of the engine for "
        "an older CUDA.",
        r"NVIDIA driver on your system is too old[^.\n]*",
        r"CUDA driver version is insufficient[^\n]*",
        r"Failed to infer device type",
        r"Found no NVIDIA driver[^\n]*",
        r"no CUDA-capable device is detected",
        r"libcuda\.so[.\d]*: cannot open shared object file",
        r"forward compatibility was attempted on non supported HW",
        r"provided PTX was compiled with an unsupported toolchain",
    ),
    _symptom(
        "missing_kernel",
        "the engine has no kernel for this model on this device",
        "Choose another quantization, dtype or KV type, or a device that the engine supports.",
        r"no kernel image is available for execution on the device",
        r"Minimum capability: \d+\. Current capability: \d+",
        r"The quantization method \S+ is not supported for the current GPU[^\n]*",
        r"\S{1,64} quantization is (?:currently )?not supported (?:in|on|for)[^\n]*",
        r"(?:Bfloat16|FP8|Sparse Attention|MLA)[^\n]{0,60} is (?:only )?(?:not )?supported "
        r"(?:on|for)[^\n]*",
        r"(?:Failed to find|Cannot find|Could not find)[^\n]{0,40}kernels?[^\n]*",
        r"_\w{1,64}::\w{1,128}\(\) expected at most 0 argument",  # declared, and built without it
        r"'_C'? object has no attribute '[^'\n]+'",
        r"NotImplementedError: Could not run '[^'\n]+' with arguments from the '[^'\n]+' backend",
    ),
    _symptom(
        "unsupported_model",
        "the engine does not know this model's architecture",
        "Use a newer version of the engine ('hive engines ls'), another engine, or another model.",
        r"Model architectures \[[^\]\n]*\] are not supported",
        r"model type `[^`\n]+` but Transformers does not recognize this architecture",
        r"unknown model architecture: '[^'\n]*'",
        r"There is no module or parameter named '[^'\n]*'",
    ),
    _symptom(
        "bad_option",
        "the engine does not take one of the options",
        "Correct the request.",
        r"max_model_len \(\d+\) is greater than the derived max_model_len \([^)\n]*\)",
        r"Cannot find the config file for \w+",
        r"Quantization method specified in the model config \([^\n]*",
        r"Total number of attention heads \(\d+\) must be divisible by tensor parallel size[^.\n]*",
        r"LoRA rank \d+ is greater than max_lora_rank \d+",
        r"(?<!\w)error: unrecognized arguments: [^\n]*",
        r"(?<!\w)error: argument --[^\n]*",
        r"No adapter found for [^\n]*",
        r"failed to apply lora adapter: [^\n]*",
        r"(?<=common_chat_templates_init: error: )[^\n]*",
        r"Please install \w+[^\n]{0,40} via `pip install[^`\n]*`",
    ),
    _symptom(
        "bad_model_file",
        "the model's files are damaged or not complete",
        "Fetch the model again ('hive models rm', then 'hive models pull').",
        r"Error while deserializing header: [^\n]*",
        r"Cannot find any model weights with [^\n]*",
        r"Error no file named [^\n]*",
        r"Can't load (?:tokenizer|the configuration)[^\n]*",
        r"Following weights were not initialized from checkpoint: [^\n]*",
        r"invalid magic characters?[^\n]*",
        r"tensor '[^'\n]*' data is not within the file bounds[^\n]*",
        r"Unable to load (?:vocabulary|weights)[^\n]*",
        r"failed to load CLIP model[^\n]*",
    ),
    _symptom(
        "engine_socket",
        "the engine could not listen where it was told to",
        "See that the hive's runtime folder exists, is its own, and has a short path.",
        r"OSError: \[Errno \d+\] Address already in use",
        r"AF_UNIX path too long",
        r"couldn't bind HTTP server socket[^\n]*",
        r"sock\.bind\([^\n]{0,80}\)\s{1,20}\w{1,40}Error: [^\n]*",
        r"ZMQError: [^\n]*",
    ),
    _symptom(
        "gpu_disturbed",
        "another process gave back memory of the GPU while the engine measured its own",
        "Load the model again when the other processes on this GPU have come to rest ('nvidia-smi' "
        "lists them), or choose a GPU that nobody else uses.",
        r"Error in memory profiling\. Initial free memory [^\n]{1,80}",
    ),
    _symptom(
        "out_of_memory",
        "there was not enough memory",
        _LESS,
        r"No available memory for the cache blocks",
        r"Free memory on device[^\n]* is less than desired GPU memory utilization[^.\n]*",
        r"KV cache is needed, which is larger than the available KV cache memory[^.\n]*",
        r"Available memory on node \d+[^\n]* is less than requested memory for kv \([^)\n]*\)",
        r"CUDA out of memory[^.\n]*",
        r"CUDA error: out of memory",
        r"cudaMalloc failed: out of memory",
        r"DefaultCPUAllocator: can't allocate memory[^\n]*",
        r"(?:unable|failed) to allocate [^\n]*buffer[^\n]*",
        r"Cannot allocate memory",
        r"std::bad_alloc",
        r"^MemoryError",
    ),
    _symptom(
        "gpu_failed",
        "the GPU failed",
        "Look at 'dmesg' for NVRM Xid errors; the device may need a reset or a restart of the "
        "machine.",
        r"CUDA error: (?:unspecified launch failure|uncorrectable ECC[^\n]*|device-side assert"
        r"[^\n]*|an illegal memory access[^\n]*)",
        r"GPU is lost",
    ),
    _symptom(
        "bad_option",
        "the engine refused its configuration",
        "Correct the request.",
        r"(?<=Value error, )[^\n]+?(?= \[type=|$)",
    ),
    _symptom(
        "engine_broken",
        "the engine's installation is broken",
        "See 'hive engines ls', remove it with 'hive engines rm' and install it again.",
        r"undefined symbol: \S+",
        r"\S{1,128}: cannot open shared object file[^\n]*",
        r"ModuleNotFoundError: No module named '[^'\n]*'",
        r"ImportError: cannot import name [^\n]*",
        r"can't open file '[^'\n]*'",
    ),
    _symptom(
        "process_killed",
        "one of the engine's processes was killed",
        "Load the model again; 'dmesg' tells whether the kernel killed it for memory.",
        r"Worker proc \S{1,64} died unexpectedly \(exit code: -(?:9|15)\)",
        r"(?<=Failed core proc\(s\): )\{'[^'\n]{1,64}': -(?:9|15)[,}]",
    ),
    _symptom(
        "process_crashed",
        "one of the engine's processes crashed",
        "Load the model again; if it crashes again, take another version of the engine "
        "('hive engines ls').",
        r"Worker proc \S{1,64} died unexpectedly \(exit code: -\d+\)",
        r"(?<=Failed core proc\(s\): )\{'[^'\n]{1,64}': -\d+[,}]",
    ),
)

KILLED_FOR_MEMORY: Final = Failure(
    "out_of_memory",
    "the kernel killed a process meanwhile because the machine's memory ran out",
    "",
    _LESS,
)

_PROGRESS: Final = (
    (r"Loading safetensors checkpoint shards:.*?(\d+/\d+)", "loading weights {}"),
    (r"Loading (?:pt|np_cache) checkpoint shards:.*?(\d+/\d+)", "loading weights {}"),
    (r"Resolved architecture: (\w+)", "it is a {}"),
    (r"Starting to load model", "loading weights"),
    (r"Loading weights took ([\d.]+) seconds", "weights loaded in {} s"),
    (r"torch\.compile (?:takes|took) ([\d.]+) s", "compiled in {} s"),
    (r"Capturing CUDA graphs?[^|]*\|[^|]*\| *(\d+/\d+)", "capturing CUDA graphs {}"),
    (r"KV cache size: ([\d,]+) tokens", "the KV cache holds {} tokens"),
    (r"init engine .* took ([\d.]+) s", "engine made in {} s"),
    (r"Starting vLLM (?:API )?server", "starting its server"),
)
_RAISED: Final = re.compile(r"[\w.]{0,200}?(?:Error|Exception): \S")
_STEPS: Final = tuple((re.compile(pattern), said) for pattern, said in _PROGRESS)


def progress(text: str) -> Iterable[str]:
    """The steps that a piece of the log tells, in its order, each once in a row.

    Progress bars overwrite their line with a carriage return; each of their states is a line.
    """
    last = None
    for line in re.split(r"[\r\n]+", text):
        for pattern, said in _STEPS:
            if found := pattern.search(line[:LINE_CHARS]):
                step = said.format(*found.groups())
                if step != last:
                    yield step
                last = step
                break


def explain(lines: Sequence[str]) -> Failure | None:
    """Why an engine ended, by the log of its last start; None if nothing in it is recognised.

    A log may hold several symptoms, of which later ones often follow from the first. So the kinds
    are asked for in the order of the table above, where causes stand before what they bring about.

    Takes seconds for the longest log: not for an event loop.
    """
    bare = [_bare(line) for line in lines[-MOST_LINES:]]
    # Block by block: whoever asks in a thread holds up no other for longer than a block takes.
    blocks = [
        "\n".join(bare[start : start + _BLOCK_LINES + 1])
        for start in range(0, len(bare), _BLOCK_LINES)
    ]
    for symptom in _SYMPTOMS:
        for block in blocks:
            if found := symptom.pattern.search(block):
                return Failure(symptom.kind, symptom.what, _detail(found[0]), symptom.advice)
    return None


def last_words(lines: Sequence[str]) -> str:
    """What an engine said last, its own errors before anything else."""
    words = [bare for line in lines[-MOST_LINES:] if (bare := _bare(line).strip())]
    errors = [word for word in words if word.startswith("error:")]
    raised = [word for word in words if _RAISED.match(word)]
    if errors or not words:
        return (errors or ["it said nothing"])[-1].removeprefix("error: ")[:300]
    # vLLM's last exception only says that there was one before.
    return (raised or words[-1:])[0][:300]


def _detail(said: str) -> str:
    """An engine's words in one line; where there are too many, the first, and a mark for the
    rest."""
    words = " ".join(said.split()).rstrip(" .:")
    if len(words) <= DETAIL_CHARS:
        return words
    return words[: DETAIL_CHARS - 1].rpartition(" ")[0].rstrip(" .:,") + " …"


def _bare(line: str) -> str:
    """The beginning of a line, without the names of the process and the place that vLLM puts
    before it."""
    named = r"^\(\w+(?: pid=\d+)?\) (?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] ?)?"
    return re.sub(named, "", line[: 2 * LINE_CHARS])[:LINE_CHARS]
