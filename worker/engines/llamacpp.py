"""llama.cpp as a worker: its own C++ HTTP server, through ``xllamacpp``, in a process of its own.

No Python runs while it serves. The process ends by signal; there is no other way to stop the
server.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from worker.engines import arguments
from worker.engines.llamacpp_build import backend, choices

HTTP_THREADS = 256  # one is held by each open connection
LOG_ERRORS = 1  # llama.cpp's verbosity: its warnings may quote a request
POOLINGS = ("mean", "cls", "last", "rank")


@dataclass(frozen=True)
class Wanted:
    """What to serve, and how.

    :param context: tokens a slot may hold; the KV cache is ``context * slots`` tokens
    :param device: the kind of device, and a number that does not matter here
    :param gpus: how many GPUs share the model; only these are to be visible
    :param split: how many layers go to each of them; llama.cpp decides by itself without it
    :param pooling: how many vectors become one: serve embeddings, or with ``rank`` scores, not chat
    :param kv_type: a ggml type in lower case
    :param lora: (scale, GGUF file) of each adapter
    :param chat_template: a file with Jinja text
    :param settings: fields of ``common_params`` that nothing else here sets
    """

    model: Path
    socket: Path
    served_name: str
    context: int
    slots: int
    threads: int
    device: str = "cpu"
    gpus: int = 1
    split: tuple[float, ...] = ()
    pooling: str | None = None
    kv_type: str = "f16"
    context_shift: bool = False
    lora: tuple[tuple[float, Path], ...] = ()
    projector: Path | None = None
    chat_template: Path | None = None
    settings: tuple[tuple[str, Any], ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve one GGUF until a signal ends the process; 1 if it cannot be loaded, and why."""
    flags = arguments.parser("llama.cpp on a unix socket")
    flags.add_argument("--model", required=True, type=Path, help="a GGUF file")
    flags.add_argument("--threads", type=int, required=True, help="CPU threads")
    flags.add_argument("--gpus", type=int, default=1, help="GPUs that share the model")
    flags.add_argument("--split", type=_numbers, default=(), help="layers on each: 20,12")
    flags.add_argument("--pooling", choices=POOLINGS, help="serve embeddings or scores, not chat")
    flags.add_argument("--kv-type", default="f16", help="numbers of the KV cache: f16, q8_0, …")
    flags.add_argument("--context-shift", action="store_true", help="forget the beginning if full")
    flags.add_argument("--lora", action="append", default=[], type=_lora, help="SCALE:FILE")
    flags.add_argument("--projector", type=Path, help="a GGUF file that lets the model see")
    flags.add_argument("--chat-template", type=Path, help="a file of Jinja text")
    flags.add_argument("--setting", action="append", default=[], type=_setting, help="NAME=JSON")
    given = vars(arguments.parse(flags, argv))
    wanted = Wanted(lora=tuple(given.pop("lora")), settings=tuple(given.pop("setting")), **given)

    import xllamacpp

    try:
        server = xllamacpp.Server(parameters(xllamacpp, wanted))
    except (RuntimeError, ValueError, OverflowError) as error:
        print(f"error: llama.cpp cannot load {wanted.model.name}: {error}", file=sys.stderr)
        return 1
    print(f"llama.cpp serves {wanted.served_name} on {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    os._exit(0)  # taking the server down in order may wait for its clients


def parameters(xlc: Any, wanted: Wanted) -> Any:
    """llama.cpp's ``common_params`` for one model.

    :raises ValueError: this build of llama.cpp does not see the GPUs, or knows no such setting
    """
    params = xlc.CommonParams()
    params.model.path = str(wanted.model)
    params.model_alias = {wanted.served_name}
    params.hostnames = [str(wanted.socket)]
    params.n_ctx = wanted.context * wanted.slots
    params.n_parallel = wanted.slots
    params.ctx_shift = wanted.context_shift
    params.endpoint_metrics = True
    params.endpoint_slots = True
    params.ui = False
    params.warmup = True
    params.fit_params = False  # what was asked for, or an error
    params.use_jinja = True
    params.cache_ram_mib = 0
    params.verbosity = LOG_ERRORS
    params.offline = True
    # ggml's threads spin while they wait: more of them than cores would only take turns.
    params.cpuparams.n_threads = wanted.threads
    params.cpuparams_batch.n_threads = wanted.threads
    params.n_threads_http = HTTP_THREADS
    params.cache_type_k = params.cache_type_v = _choice(xlc.ggml_type, wanted.kv_type)
    params.lora_adapters = [
        xlc.CommonAdapterLoraInfo(path=str(path), scale=scale) for scale, path in wanted.lora
    ]
    if wanted.projector is not None:
        params.mmproj.path = str(wanted.projector)
    if wanted.chat_template is not None:
        params.chat_template = wanted.chat_template.read_text("utf-8")
    if wanted.pooling is not None:
        params.embedding = True
        params.pooling_type = _choice(xlc.llama_pooling_type, wanted.pooling)
        params.n_ubatch = params.n_batch  # an input is embedded in one piece
    else:
        # Between batches other requests get their tokens, and callers that left are noticed.
        params.n_batch = params.n_ubatch
    _place(xlc, params, wanted)
    for name, value in wanted.settings:
        _set(params, name, value)
    return params


def _place(xlc: Any, params: Any, wanted: Wanted) -> None:
    """Put the model on the CPU, or whole on GPUs."""
    kind = wanted.device.partition(":")[0]
    if kind == "cpu":
        params.n_gpu_layers = 0
        params.no_op_offload = params.no_kv_offload = True
        params.mmproj_use_gpu = False
        return
    seen = [str(d["name"]) for d in xlc.get_device_info() if backend(str(d["name"])) == kind]
    if len(seen) < wanted.gpus:
        raise ValueError(
            f"this build of llama.cpp (xllamacpp {xlc.__version__}) sees {len(seen)} {kind} devices"
            f" and {wanted.gpus} were asked for; install a build of xllamacpp for {kind} that fits "
            "the driver, or use the CPU"
        )
    params.n_gpu_layers = -1
    params.main_gpu = 0
    modes = xlc.llama_split_mode
    if wanted.gpus == 1:
        params.split_mode = modes.LLAMA_SPLIT_MODE_NONE
        return
    params.split_mode = modes.LLAMA_SPLIT_MODE_LAYER
    if wanted.split:
        room = len(params.tensor_split)
        params.tensor_split = [*wanted.split, *[0.0] * (room - len(wanted.split))]


def _set(params: Any, name: str, value: Any) -> None:
    current = getattr(params, name, None)
    if current is None:
        raise ValueError(f"this build of llama.cpp has no setting '{name}'")
    setattr(params, name, _choice(type(current), value) if isinstance(current, IntEnum) else value)


def _choice(kind: type[IntEnum], name: str) -> IntEnum:
    known = choices(kind)
    if name not in known:
        raise ValueError(f"'{name}' is none of {', '.join(known)}")
    return known[name]


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def _lora(text: str) -> tuple[float, Path]:
    scale, _, path = text.partition(":")
    return float(scale), Path(path)


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


if __name__ == "__main__":
    # Threads that the C++ server starts inherit this mask, so that sigwait gets the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    sys.exit(main())
