"""Trains `hive-tiny` and writes its GGUF: `python -m tools.hive_tiny.train --out DIR --seed 0`.

The same seed gives the same conversations, tokenizer and first weights. Runs still differ a little:
torch's kernels depend on the processor, and `tokenizers` draws its dropout without a seed. At the
end every question is asked through the file that was written, and a table counts right answers.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from tools.hive_tiny import corpus, evaluate, gguf_file
from tools.hive_tiny.gguf_file import ModelFile
from tools.hive_tiny.model import Llama
from tools.hive_tiny.samples import IGNORED, Batch, Encoder, batches
from tools.hive_tiny.shape import Shape
from tools.hive_tiny.tokenizer import build_tokenizer, tokens_and_merges, train_tokenizer

BATCH_TOKENS = 4096
WARM_UP = 100  # steps
WEIGHT_DECAY = 0.05
CLIP = 1.0  # norm of the gradient
DROPOUT = 0.1  # share of merges left out in questions
TOKENIZER_TALKS = 20_000  # conversations that the tokenizer is trained on


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own schedule; `corpus` weighs subjects by `revision`."""

    steps: int
    peak_rate: float
    revision: bool


TRAINING = Phase(steps=2800, peak_rate=1.5e-3, revision=False)
REVISION = Phase(steps=500, peak_rate=5e-4, revision=True)
COURSE = (TRAINING, REVISION, REVISION)


def learning_rate(step: int, phase: Phase) -> float:
    """A linear warm-up to the peak, then half a cosine down to zero."""
    if step < WARM_UP:
        return phase.peak_rate * (step + 1) / WARM_UP
    through = (step - WARM_UP) / (phase.steps - WARM_UP)
    return phase.peak_rate * 0.5 * (1 + math.cos(math.pi * through))


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    """AdamW that lets matrices decay and leaves the norms alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def loss_of(model: Llama, batch: Batch) -> torch.Tensor:
    """The mean cross entropy (nats) of the tokens that are learnt."""
    learnt = batch.targets != IGNORED
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.logits(model(batch.ids)[learnt])
    return functional.cross_entropy(logits.float(), batch.targets[learnt])


def run_phase(model: Llama, encoder: Encoder, seed: int, phase: Phase) -> None:
    """Trains the model through one phase; prints the loss as it goes."""
    optimizer = optimizer_of(model)
    talks = corpus.conversations(seed, phase.revision)
    started, seen = time.monotonic(), 0
    for step, batch in enumerate(islice(batches(encoder, talks, seed, BATCH_TOKENS), phase.steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, phase)
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        seen += batch.ids.numel()
        if step % 50 == 0 or step == phase.steps - 1:
            spent = time.monotonic() - started
            print(
                f"step {step}  loss {loss.item():.4f}  {seen:,} tokens  {spent:.0f} s", flush=True
            )


def untrained(seed: int) -> ModelFile:
    """A tokenizer trained on the seed's conversations, and random weights."""
    tokens, merges = tokens_and_merges(
        train_tokenizer(
            text
            for talk in islice(corpus.conversations(seed), TOKENIZER_TALKS)
            for turn in talk.turns
            for text in (turn.ask, turn.answer, talk.system or "")
        )
    )
    shape = Shape(vocabulary=len(tokens))
    return ModelFile(shape, tokens, merges, Llama(shape).weights())


def train(start: ModelFile, seed: int, phases: tuple[Phase, ...]) -> ModelFile:
    """The same model after the phases: the mean of its weights after each revision.

    Two revisions miss different answers, and their mean misses fewer than either (weight averaging:
    Izmailov et al. 2018).
    """
    model = Llama(start.shape, start.weights)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    encoder = Encoder(
        build_tokenizer(start.tokens, start.merges),
        build_tokenizer(start.tokens, start.merges, dropout=DROPOUT),
        start.shape.context,
    )
    revised = []
    for number, phase in enumerate(phases):
        run_phase(model, encoder, seed + number, phase)
        if phase.revision:
            revised.append(model.weights())
    mean = {name: np.mean([weights[name] for weights in revised], axis=0) for name in revised[0]}
    return replace(start, weights=mean)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains hive-tiny and writes its GGUF file.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the GGUF file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--revise", type=Path, help="revise the model of this GGUF file instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / gguf_file.SHIPPED.name
    if options.revise:
        trained = train(gguf_file.read(options.revise), options.seed, COURSE[1:])
    else:
        trained = train(untrained(options.seed), options.seed, COURSE)
    gguf_file.write(path, trained)
    print(f"{path}: {path.stat().st_size:,} bytes")
    evaluate.print_table(path)


if __name__ == "__main__":
    main()
