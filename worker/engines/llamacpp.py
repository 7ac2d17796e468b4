"""llama.cpp as a worker: its own C++ HTTP server, through ``xllamacpp``, in a process of its own.

No Python runs while it serves. The process ends by signal; there is no other way to stop the
server.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worker.engines import arguments

HTTP_THREADS = 256  # one is held by each open connection
LOG_ERRORS = 1  # llama.cpp's verbosity: its warnings may quote a request


def main(argv: Sequence[str] | None = None) -> int:
    """Serve one GGUF until a signal ends the process; 1 if it cannot be loaded, and why."""
    flags = arguments.parser("llama.cpp on a unix socket")
    flags.add_argument("--model", required=True, type=Path, help="a GGUF file")
    flags.add_argument("--threads", type=int, required=True, help="CPU threads")
    flags.add_argument("--embeddings", action="store_true", help="serve embeddings, not chat")
    flags.add_argument("--rerank", action="store_true", help="rerank documents, no chat")
    flags.add_argument("--kv-type", default="f16", help="numbers of the KV cache: f16, q8_0, …")
    flags.add_argument("--context-shift", action="store_true", help="forget the beginning if full")
    given = arguments.parse(flags, argv)

    import xllamacpp

    try:
        params = parameters(
            xllamacpp,
            model=given.model,
            socket=given.socket,
            served_name=given.served_name,
            context=given.context,
            slots=given.slots,
            threads=given.threads,
            device=given.device,
            embeddings=given.embeddings,
            rerank=given.rerank,
            kv_type=given.kv_type,
            context_shift=given.context_shift,
        )
        server = xllamacpp.Server(params)
    except (RuntimeError, ValueError) as error:
        print(f"error: llama.cpp cannot load {given.model.name}: {error}", file=sys.stderr)
        return 1
    print(f"llama.cpp serves {given.served_name} on {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    os._exit(0)  # taking the server down in order may wait for its clients


def parameters(
    xlc: Any,
    *,
    model: Path,
    socket: Path,
    served_name: str,
    context: int,
    slots: int,
    threads: int,
    device: str,
    embeddings: bool = False,
    rerank: bool = False,
    kv_type: str = "f16",
    context_shift: bool = False,
) -> Any:
    """llama.cpp's ``common_params`` for one model.

    :param context: tokens a slot may hold; the KV cache is ``context * slots`` tokens
    :param kv_type: a ggml type in lower case
    :raises ValueError: the device is a GPU and this build of llama.cpp has no backend for it
    """
    params = xlc.CommonParams()
    params.model.path = str(model)
    params.model_alias = {served_name}
    params.hostnames = [str(socket)]
    params.n_ctx = context * slots
    params.n_parallel = slots
    params.ctx_shift = context_shift
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
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.n_threads_http = HTTP_THREADS
    params.cache_type_k = params.cache_type_v = getattr(
        xlc.ggml_type, f"GGML_TYPE_{kv_type.upper()}"
    )
    if embeddings or rerank:
        pooling = xlc.llama_pooling_type
        params.embedding = True
        params.pooling_type = (
            pooling.LLAMA_POOLING_TYPE_RANK if rerank else pooling.LLAMA_POOLING_TYPE_MEAN
        )
        params.n_ubatch = params.n_batch  # an input is embedded in one piece
    else:
        # Between batches other requests get their tokens, and callers that left are noticed.
        params.n_batch = params.n_ubatch
    if device == "cpu":
        params.n_gpu_layers = 0
    else:
        gpus = [d for d in xlc.get_device_info() if not str(d["name"]).startswith("CPU")]
        kind, _, index = device.partition(":")
        if int(index) >= len(gpus):
            raise ValueError(
                f"this build of xllamacpp sees {len(gpus)} GPUs and no {kind}:{index}; "
                "install a GPU build of xllamacpp, or use the CPU"
            )
        params.n_gpu_layers = -1
        params.main_gpu = int(index)
        params.split_mode = xlc.llama_split_mode.LLAMA_SPLIT_MODE_NONE
    return params


if __name__ == "__main__":
    # Threads that the C++ server starts inherit this mask, so that sigwait gets the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    sys.exit(main())
