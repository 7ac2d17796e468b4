"""Let vLLM lay out the KV cache of models, one after another, and print what it allocated.

PYTHON tests/fit_models/vllm_cache.py SPACE_BYTES CONTEXT SLOTS KV_TYPE FOLDER…

The interpreter is one that has vLLM. Weights are made up; each line printed is the JSON of one
folder: ``allocated`` bytes in the tensors of the cache, and how many ``sequences`` of full length
vLLM says have room in them.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its tensors are in this process

from vllm import LLM

SERVER_BATCH = 2048  # tokens; the server's default, which is not that of this class


def main(space: str, context: str, slots: str, kv_type: str, *folders: str) -> None:
    for folder in folders:
        engine: Any = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=int(context),
            max_num_seqs=int(slots),
            max_num_batched_tokens=SERVER_BATCH,
            dtype="bfloat16",
            enforce_eager=True,
            kv_cache_memory_bytes=int(space),
            kv_cache_dtype=kv_type,
        ).llm_engine
        worker = engine.engine_core.engine_core.model_executor.driver_worker.worker
        stores = [tensor.untyped_storage() for tensor in worker.model_runner.kv_caches]
        found = {
            "allocated": sum({one.data_ptr(): one.nbytes() for one in stores}.values()),
            "sequences": engine.vllm_config.cache_config.kv_cache_max_concurrency,
        }
        print(f"found {json.dumps(found)}", flush=True)
        del engine, worker, stores
        gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
