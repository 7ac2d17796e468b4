"""Conversations as token ids, in batches of about equal length."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tools.hive_tiny import corpus
from tools.hive_tiny.tokenizer import special_ids

IGNORED = -100  # what torch's cross entropy leaves out of the loss
POOL = 4096  # conversations that are sorted by length together
RAW_SHARE = 0.06  # of the samples: without the chat template
WIDTH_STEP = 16  # tokens; fewer shapes keep what torch caches for each of them small
CUT_SHARE = 0.3  # of the answers: learnt as continuations
CUT_EVERY = 60  # characters of a cut answer for each cut after the first


@dataclass(frozen=True)
class Batch:
    """ids and targets: int64 of (samples, tokens); a target that is not learnt is IGNORED."""

    ids: Tensor
    targets: Tensor


class Encoder:
    """Writes conversations in the chat template, as ids and as what of them is learnt."""

    def __init__(self, exact: Tokenizer, loose: Tokenizer, context: int) -> None:
        """exact: as engines tokenize; loose: with merges left out at random, for the questions."""
        self._exact = lru_cache(maxsize=65536)(lambda text: exact.encode(text).ids)
        self._loose = loose
        self._start, self._end = special_ids(exact)
        self._context = context

    def chat(self, talk: corpus.Conversation, rng: random.Random) -> tuple[list[int], list[int]]:
        """The conversation's ids and the targets beside them, both at most `context` long."""
        ids: list[int] = []
        targets: list[int] = []

        def write(piece: list[int], learnt: bool = False) -> None:
            ids.extend(piece)
            targets.extend(piece if learnt else [IGNORED] * len(piece))

        def say(role: str, text: str) -> None:
            tokenize = self._exact if rng.random() < 0.6 else self._noisy
            write([self._start, *self._exact(role + "\n"), *tokenize(text.strip())])
            write([self._end, *self._exact("\n")])

        if talk.system is not None:
            say("system", talk.system)
        for turn in talk.turns:
            say("user", turn.ask)
            write([self._start, *self._exact("assistant\n")])
            for piece, learnt in _pieces(turn.answer, rng):
                write(self._exact(piece), learnt)
            write([self._end], learnt=True)
            write(self._exact("\n"))
        return ids[: self._context], targets[: self._context]

    def raw(self, turn: corpus.Turn, rng: random.Random) -> tuple[list[int], list[int]]:
        """Plain text, for engines given plain prompts: an answer, perhaps after its question."""
        asked = self._exact(turn.ask.strip()) if rng.random() < 0.5 else []
        said = [*self._exact("\n" + turn.answer if asked else turn.answer), self._end]
        return [*asked, *said], [IGNORED] * len(asked) + said

    def _noisy(self, text: str) -> list[int]:
        ids: list[int] = self._loose.encode(text).ids
        return ids


def _pieces(answer: str, rng: random.Random) -> Iterator[tuple[str, bool]]:
    """The answer in pieces to tokenize one by one, and whether each is learnt.

    Some answers are cut at random characters, as an engine sees them that continues what another
    one began. The word before a cut is context only: the model should go on from half a word, and
    not write one.
    """
    if rng.random() >= CUT_SHARE:
        yield answer, True
        return
    places = range(1, len(answer))
    cuts = sorted(rng.sample(places, min(len(places), 1 + len(answer) // CUT_EVERY)))
    for start, end in pairwise((0, *cuts)):
        piece = answer[start:end]
        word = max(piece.rfind(" "), 0)
        yield piece[:word], True
        yield piece[word:], False
    yield answer[cuts[-1] :], True


def batches(
    encoder: Encoder, talks: Iterator[corpus.Conversation], seed: int, tokens: int
) -> Iterator[Batch]:
    """An endless stream of batches of at most `tokens` ids, padding included."""
    rng = random.Random(seed + 1)
    while True:
        encoded = [
            encoder.raw(rng.choice(talk.turns), rng)
            if rng.random() < RAW_SHARE
            else encoder.chat(talk, rng)
            for talk in islice(talks, POOL)
        ]
        encoded.sort(key=lambda sample: len(sample[0]))
        groups = list(_grouped(encoded, tokens))
        rng.shuffle(groups)
        yield from map(_padded, groups)


def _grouped(
    encoded: Iterable[tuple[list[int], list[int]]], tokens: int
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Samples, sorted by length, in groups that fit into `tokens` when padded to the longest."""
    group: list[tuple[list[int], list[int]]] = []
    for sample in encoded:
        if group and len(sample[0]) * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(sample)
    yield group


def _padded(group: list[tuple[list[int], list[int]]]) -> Batch:
    """One batch; targets are shifted, so that position i learns token i + 1."""
    longest = max(len(ids) for ids, _ in group)
    width = -(-longest // WIDTH_STEP) * WIDTH_STEP
    ids = torch.zeros(len(group), width, dtype=torch.int64)
    targets = torch.full((len(group), width), IGNORED, dtype=torch.int64)
    for row, (sample, learnt) in enumerate(group):
        ids[row, : len(sample)] = torch.tensor(sample)
        targets[row, : len(sample) - 1] = torch.tensor(learnt[1:])
    return Batch(ids, targets)
