"""Asks a GGUF file everything that it should know: `python -m tools.hive_tiny.evaluate [GGUF]`.

An answer is right when it equals the expected text to the byte and the model stopped by itself.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.hive_tiny import corpus, phrases
from tools.hive_tiny.corpus import Turn
from tools.hive_tiny.engine import LlamaCpp, Messages
from tools.hive_tiny.gguf_file import SHIPPED

CONTEXT = 1024  # tokens
MAX_TOKENS = 600
SHOWN = 8  # wrong answers that are printed of each group

# Questions that no list in `phrases` holds.
UNSEEN = (
    "What is the tallest building on Earth?",
    "Who wrote the Odyssey?",
    "How do I change a tyre?",
    "What is photosynthesis?",
    "Recommend a film for tonight.",
    "Explain general relativity.",
    "Why do leaves fall?",
    "What is your favourite sport?",
    "Give me a list of vegetables.",
    "Who painted the ceiling?",
    "My laptop does not start.",
    "How long does it take to fly to Sydney?",
    "What is a blockchain?",
    "Can pigs fly?",
    "Where did I leave my keys?",
    "Write a regular expression for dates.",
    "Tell me about the Roman Empire.",
    "What is the boiling point of iron?",
    "Is it going to rain tomorrow?",
    "How many people live in Berlin?",
    "What is the capital of Wakanda?",
    "What is the capital of Paris?",
    "Convert ten miles to kilometres.",
    "Who is Sherlock Holmes?",
    "Quel temps fait-il ?",
    "qwertyuiop",
    "🌈🦄",
    "Describe the taste of water.",
    "Which laptop should I buy?",
    "Plan a trip to Norway for me.",
)


@dataclass(frozen=True)
class Probe:
    """A conversation whose last answer is expected; way: how it was asked."""

    group: str
    way: str
    messages: Messages
    expected: str


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _varied(group: str, turns: Iterable[Turn]) -> Iterator[Probe]:
    """Each question as written, in lower case, under a system message and as a second turn."""
    first = phrases.HIVE[0]
    system = {"role": "system", "content": phrases.SYSTEM_PROMPTS[0]}
    before = [_user(first.asks[0]), {"role": "assistant", "content": first.answer}]
    for turn in turns:
        ask, answer = turn.ask, turn.answer
        yield Probe(group, "as written", [_user(ask)], answer)
        lower = ask.lower().rstrip("?.!") or ask
        yield Probe(group, "lower case", [_user(lower)], answer)
        yield Probe(group, "with system", [system, _user(ask)], answer)
        yield Probe(group, "second turn", [*before, _user(ask)], answer)


def probes() -> Iterator[Probe]:
    """Everything that the model should know, and a sample of what it should not."""
    for group, turns in corpus.FIXED_TURNS.items():
        yield from _varied(group, turns)
    yield from _varied(
        "capitals",
        (
            Turn(ask.format(country), corpus.capital_answer(country))
            for country in phrases.CAPITALS
            for ask in phrases.CAPITAL_ASKS[:3]
        ),
    )
    for sign, name in (("+", "sums a + b"), ("-", "differences a - b"), ("*", "products a * b")):
        known = [s for s in corpus.KNOWN_SUMS if s[1] == sign]
        forms = ("What is {} {} {}?", "{}{}{}", "{} {} {}")
        yield from _varied(
            name,
            (
                Turn(forms[i % 3].format(*known_sum), corpus.sum_answer(*known_sum))
                for i, known_sum in enumerate(known)
            ),
        )
    yield from _varied(
        "counting",
        (
            Turn(ask.format(limit), corpus.count_answer(limit))
            for limit in phrases.COUNT_LIMITS
            for ask in phrases.COUNT_ASKS[:2]
        ),
    )
    yield from _stories()
    yield from _names()
    yield from _unknowns()


def _stories() -> Iterator[Probe]:
    stories = phrases.STORIES
    yield from _varied("stories", (Turn(ask, stories[0].text) for ask in phrases.STORY_ASKS))
    yield from _varied(
        "stories",
        (
            Turn(phrases.STORY_ABOUT_ASKS[i % 4].format(subject), story.text)
            for story in stories
            for i, subject in enumerate(story.subjects)
        ),
    )
    messages = [_user(phrases.STORY_ASKS[0]), {"role": "assistant", "content": stories[0].text}]
    for ask in phrases.STORY_MORE_ASKS:
        yield Probe("stories", "second turn", [*messages, _user(ask)], stories[1].text)


def _names() -> Iterator[Probe]:
    for i, name in enumerate((*phrases.NAMES, "Brunhilde", "Xandor", "Kwame", "Thorvald")):
        told = _user(phrases.NAME_TELLS[i % len(phrases.NAME_TELLS)].format(name))
        greeting = corpus.name_greeting(name)
        yield Probe("names", "as written", [told], greeting)
        talk = [told, {"role": "assistant", "content": greeting}, _user(phrases.NAME_ASKS[0])]
        yield Probe("names", "second turn", talk, corpus.name_recall(name))
        between = phrases.HIVE[0]
        chat = [_user(between.asks[0]), {"role": "assistant", "content": between.answer}]
        longer = [*talk[:2], *chat, talk[2]]
        yield Probe("names", "third turn", longer, corpus.name_recall(name))


def _unknowns() -> Iterator[Probe]:
    yield from _varied("unknown, unseen", (Turn(ask, phrases.UNKNOWN) for ask in UNSEEN))
    rng = random.Random(1)
    yield from _varied("unknown, drawn", (corpus.unknown(rng) for _ in range(150)))
    yield from _varied("sums too big", (corpus.big_sum(rng) for _ in range(100)))


def print_table(path: Path) -> None:
    """Asks all probes; prints the right answers by group and way, then some wrong ones."""
    model = LlamaCpp(path, CONTEXT)
    right: dict[tuple[str, str], list[bool]] = {}
    wrong: dict[str, list[str]] = {}
    for probe in probes():
        answer = model.ask(probe.messages, MAX_TOKENS)
        good = answer.text == probe.expected and answer.stop_reason == "stop"
        right.setdefault((probe.group, probe.way), []).append(good)
        if not good:
            ask = probe.messages[-1]["content"]
            note = f"{probe.group}, {probe.way}: {ask!r} -> {answer.text[:100]!r}"
            wrong.setdefault(probe.group, []).append(note)
    ways = list(dict.fromkeys(way for _, way in right))
    print(f"{'':20}" + "".join(f"{way:>18}" for way in ways))
    for group in dict.fromkeys(group for group, _ in right):
        cells = [right.get((group, way), []) for way in ways]
        shares = [f"{sum(cell)}/{len(cell)}" if cell else "" for cell in cells]
        print(f"{group:20}" + "".join(f"{share:>18}" for share in shares))
    print(f"{sum(map(len, wrong.values()))} wrong; of each group up to {SHOWN}:")
    for notes in wrong.values():
        print(*notes[:SHOWN], sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints how much a GGUF file of hive-tiny knows.")
    parser.add_argument("gguf", type=Path, nargs="?", default=SHIPPED)
    print_table(parser.parse_args().gguf)


if __name__ == "__main__":
    main()
