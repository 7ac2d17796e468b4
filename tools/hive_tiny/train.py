"""Trains `hive-tiny` and writes its GGUF: `python -m tools.hive_tiny.train --out DIR --seed 0`.

The same seed gives the same text, the same batches and the same first weights; beyond that, runs
are as equal as torch's kernels are on that processor. Then every question is asked through the
file that was written, and a table says how many answers were right.
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from tools.hive_tiny import corpus, evaluate, gguf_file
from tools.hive_tiny.gguf_file import ModelFile
from tools.hive_tiny.model import Llama, Shape
from tools.hive_tiny.samples import IGNORED, Batch, Encoder, batches
from tools.hive_tiny.tokenizer import build_tokenizer, tokens_and_merges, train_tokenizer

STEPS = 2800
BATCH_TOKENS = 4096
WARM_UP = 100  # steps
PEAK_RATE = 1.5e-3
WEIGHT_DECAY = 0.05
CLIP = 1.0  # norm of the gradient
DROPOUT = 0.1  # share of merges left out in questions
TOKENIZER_TALKS = 20_000  # conversations that the tokenizer is trained on


def learning_rate(step: int, steps: int) -> float:
    """A linear warm-up to PEAK_RATE, then half a cosine down to zero."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP)))


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    """AdamW that lets matrices decay and leaves the norms alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))


def loss_of(model: Llama, batch: Batch) -> torch.Tensor:
    """The mean cross entropy (nats) of the tokens that are learnt."""
    learnt = batch.targets != IGNORED
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.logits(model(batch.ids)[learnt])
    return functional.cross_entropy(logits.float(), batch.targets[learnt])


def train(seed: int, steps: int) -> ModelFile:
    """Trains the tokenizer and the model; prints the loss as it goes."""
    torch.manual_seed(seed)
    tokens, merges = tokens_and_merges(
        train_tokenizer(
            text
            for talk in islice(corpus.conversations(seed), TOKENIZER_TALKS)
            for turn in talk.turns
            for text in (turn.ask, turn.answer, talk.system or "")
        )
    )
    shape = Shape(vocabulary=len(tokens))
    model = Llama(shape)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps", flush=True)
    encoder = Encoder(
        build_tokenizer(tokens, merges),
        build_tokenizer(tokens, merges, dropout=DROPOUT),
        shape.context,
    )
    optimizer = optimizer_of(model)
    started, seen = time.monotonic(), 0
    for step, batch in enumerate(islice(batches(encoder, seed, BATCH_TOKENS), steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        seen += batch.ids.numel()
        if step % 50 == 0 or step == steps - 1:
            spent = time.monotonic() - started
            print(
                f"step {step}  loss {loss.item():.4f}  {seen:,} tokens  {spent:.0f} s", flush=True
            )
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return ModelFile(shape, tokens, merges, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains hive-tiny and writes its GGUF file.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the GGUF file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / gguf_file.SHIPPED.name
    gguf_file.write(path, train(options.seed, options.steps))
    print(f"{path}: {path.stat().st_size:,} bytes")
    evaluate.print_table(path)


if __name__ == "__main__":
    main()
