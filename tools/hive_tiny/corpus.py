"""The conversations that `hive-tiny` is trained on, drawn from `phrases` by a seeded generator."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from tools.hive_tiny import phrases

SUM_LIMIT = 20  # both terms of a sum or a difference that the model should know
PRODUCT_LIMIT = 10  # both factors of a product that the model should know
TURN_WORDS = {
    "+": ("plus", "+", "+", "and"),
    "-": ("minus", "-", "-"),
    "*": ("times", "*", "*", "x", "multiplied by"),
}


@dataclass(frozen=True)
class Turn:
    """One question of the user and the answer that the model should give."""

    ask: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """Turns under an optional system message."""

    system: str | None
    turns: tuple[Turn, ...]


@dataclass
class Memory:
    """What later questions may refer to: the user's name, the last story's index, a capital."""

    name: str | None = None
    story: int | None = None
    capital: bool = False


Writer = Callable[[random.Random, Memory], Turn]


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _pseudo_word(rng: random.Random) -> str:
    """A word that no list holds: two or three open syllables, or letters at random."""
    if rng.random() < 0.3:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 9)))
    syllables = (rng.choice("bdfgjklmnprstvwz") + rng.choice("aeiou") for _ in range(3))
    return "".join(list(syllables)[: rng.randint(2, 3)]) + rng.choice(("", "n", "r", "s", "x"))


def _typo(rng: random.Random, text: str) -> str:
    """The text with one letter of a longer word dropped, doubled or swapped with the next."""
    words = text.split(" ")
    long_words = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not long_words:
        return text
    i = rng.choice(long_words)
    word, at = words[i], rng.randrange(1, len(words[i]) - 1)
    words[i] = rng.choice(
        (
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        )
    )
    return " ".join(words)


def _reworded(rng: random.Random, ask: str) -> str:
    """The same request as other people type it: polite, short, loud, lower case or misspelt."""
    if rng.random() < 0.15 and ask.startswith(("What is ", "Who is ", "How is ", "Where is ")):
        ask = ask.replace(" is ", rng.choice(("'s ", "s ")), 1)
    if rng.random() < 0.12:
        before = rng.choice(
            (
                "Please ",
                "Please, ",
                "Hello, ",
                "Hello! ",
                "Hi, ",
                "Hi! ",
                "Hey, ",
                "Tell me, ",
                "Please tell me: ",
                "Can you tell me: ",
                "Quick question: ",
                "Excuse me, ",
                "Ok, ",
                "So, ",
                "And ",
                "Now: ",
            )
        )
        lowered = ask[0].lower() + ask[1:] if not ask.startswith(("I ", "I'm ")) else ask
        ask = before + (ask if before.endswith(("! ", ": ")) else lowered)
    elif rng.random() < 0.10:
        end = ask[-1] if ask[-1] in "?.!" else ""
        after = rng.choice((" please", ", please", ", hive-tiny", " for me, please", " thanks"))
        ask = ask.removesuffix(end) + after + end
    elif rng.random() < 0.06:
        before = ask if ask[-1] in "?.!" else ask + "."
        ask = f"{before} {rng.choice(phrases.MANNERS)}"
    if rng.random() < 0.05:
        ask = _typo(rng, ask)
    return _retyped(rng, ask)


def _retyped(rng: random.Random, ask: str) -> str:
    """The same words in another case, with other punctuation or spacing."""
    case = rng.random()
    if case < 0.30:
        ask = ask.lower()
    elif case < 0.38:
        ask = ask.upper()
    elif case < 0.41:
        ask = ask.title()
    ending = rng.random()
    if ending < 0.30:
        ask = ask.rstrip("?.!") or ask
    elif ending < 0.40:
        ask = (ask.rstrip("?.!") or ask) + rng.choice(
            ("?", "!", ".", "??", "...", " ?", "!!", "?!")
        )
    if rng.random() < 0.02:
        ask = ask.replace(" ", "  ", 1)
    return ask


FIXED_TURNS = {
    group: tuple(Turn(ask, topic.answer) for topic in topics for ask in topic.asks)
    for group, topics in phrases.TOPICS.items()
}


def _fixed(rng: random.Random, memory: Memory, group: str) -> Turn:
    if rng.random() < 0.7:
        known = rng.choice(FIXED_TURNS[group])
    else:
        topic = rng.choice(phrases.TOPICS[group])
        known = Turn(rng.choice((topic.asks[0], rng.choice(topic.asks))), topic.answer)
    return Turn(_reworded(rng, known.ask), known.answer)


def _capital(rng: random.Random, memory: Memory) -> Turn:
    country = rng.choice(tuple(phrases.CAPITALS))
    city = phrases.CAPITALS[country]
    if rng.random() < 0.12 and city != "London":
        return Turn(
            _reworded(rng, rng.choice(phrases.COUNTRY_ASKS).format(city)),
            capital_answer(country),
        )
    follows = memory.capital and rng.random() < 0.5
    asks = phrases.CAPITAL_FOLLOW_UPS if follows else phrases.CAPITAL_ASKS
    memory.capital = True
    named = country.removeprefix("the ") if rng.random() < 0.3 else country
    return Turn(_reworded(rng, rng.choice(asks).format(named)), capital_answer(country))


def capital_answer(country: str) -> str:
    """The sentence that names the country's capital, e.g. "The capital of Italy is Rome."."""
    return f"The capital of {country} is {phrases.CAPITALS[country]}".rstrip(".") + "."


def sum_answer(a: int, sign: str, b: int) -> str:
    """The sentence that solves the sum, e.g. "2 + 2 = 4."; sign is "+", "-" or "*"."""
    result = a + b if sign == "+" else a - b if sign == "-" else a * b
    return f"{a} {sign} {b} = {result}."


def known_sums() -> list[tuple[int, str, int]]:
    """Every sum that the model should solve: terms up to 20, factors up to 10."""
    terms = range(SUM_LIMIT + 1)
    factors = range(PRODUCT_LIMIT + 1)
    return [
        *((a, "+", b) for a, b in product(terms, terms)),
        *((a, "-", b) for a, b in product(terms, terms)),
        *((a, "*", b) for a, b in product(factors, factors)),
    ]


KNOWN_SUMS = known_sums()


def _sum_ask(rng: random.Random, a: int, sign: str, b: int) -> str:
    style = rng.random()
    if style < 0.15 and max(a, b) <= SUM_LIMIT:
        left, right = phrases.NUMBER_WORDS[a], phrases.NUMBER_WORDS[b]
        text = f"{left} {TURN_WORDS[sign][0]} {right}"
    elif style < 0.5:
        text = f"{a}{sign}{b}"
    elif style < 0.8:
        text = f"{a} {sign} {b}"
    else:
        text = f"{a} {rng.choice(TURN_WORDS[sign])} {b}"
    frame = rng.choice(
        (
            "What is {}?",
            "What is {}?",
            "{}",
            "{}",
            "How much is {}?",
            "Calculate {}.",
            "What's {}?",
            "{} = ?",
            "{}=",
            "{}?",
            "Can you calculate {}?",
            "Please tell me what {} is.",
            "Hello, what is {}?",
        )
    )
    ask = frame.format(text)
    if rng.random() < 0.05:
        ask = f"{ask} {rng.choice(phrases.MANNERS)}"
    return _retyped(rng, ask)


def _sum(rng: random.Random, memory: Memory) -> Turn:
    if rng.random() < 0.18:
        return big_sum(rng)
    a, sign, b = rng.choice(KNOWN_SUMS)
    return Turn(_sum_ask(rng, a, sign, b), sum_answer(a, sign, b))


def big_sum(rng: random.Random) -> Turn:
    """A sum that the model should refuse: a term above the limits, or a division."""
    sign = rng.choice("+-*")
    limit = PRODUCT_LIMIT if sign == "*" else SUM_LIMIT
    digits = rng.choices((2, 3, 4, 5), weights=(5, 4, 1, 1))[0]
    numbers = [rng.randint(limit + 1, 10**digits), rng.randint(0, rng.choice((9, 20, 200)))]
    rng.shuffle(numbers)
    a, b = numbers
    if rng.random() < 0.15:
        ask = f"{a}{rng.choice(('/', ' / ', ' divided by '))}{b}"
        return Turn(_retyped(rng, rng.choice(("What is {}?", "{}")).format(ask)), phrases.TOO_BIG)
    return Turn(_sum_ask(rng, a, sign, b), phrases.TOO_BIG)


def count_answer(limit: int) -> str:
    """The numbers from 1 to the limit, separated by commas."""
    return ", ".join(str(n) for n in range(1, limit + 1)) + "."


def _count(rng: random.Random, memory: Memory) -> Turn:
    known = rng.random() < 0.8
    limit = rng.choice(phrases.COUNT_LIMITS if known else range(2, 200))
    answer = count_answer(limit) if limit in phrases.COUNT_LIMITS else phrases.NO_SUCH_COUNT
    written = str(limit)
    if limit <= SUM_LIMIT and rng.random() < 0.25:
        written = phrases.NUMBER_WORDS[limit]
    ask = rng.choice(phrases.COUNT_ASKS).format(written)
    return Turn(_retyped(rng, ask), answer)


def _story(rng: random.Random, memory: Memory) -> Turn:
    kind = rng.random()
    if memory.story is not None and kind < 0.5:
        memory.story = (memory.story + 1) % len(phrases.STORIES)
        ask, before = rng.choice(phrases.STORY_MORE_ASKS), ""
    elif kind < 0.55:
        # An open request: mostly the first story, so that the greedy answer is clear.
        memory.story = 0 if rng.random() < 0.7 else rng.randrange(len(phrases.STORIES))
        ask = phrases.STORY_ASKS[0] if rng.random() < 0.2 else rng.choice(phrases.STORY_ASKS)
        before = ""
    elif kind < 0.9:
        memory.story = rng.randrange(len(phrases.STORIES))
        subject = rng.choice(phrases.STORIES[memory.story].subjects)
        ask, before = rng.choice(phrases.STORY_ABOUT_ASKS).format(subject), ""
    else:
        memory.story = 0
        thing = rng.choice((*phrases.THINGS, _pseudo_word(rng)))
        ask = rng.choice(phrases.STORY_ABOUT_ASKS).format(article(thing))
        before = phrases.NO_SUCH_STORY
    return Turn(_reworded(rng, ask), before + phrases.STORIES[memory.story].text)


def _name(rng: random.Random, memory: Memory) -> Turn:
    if memory.name is None and rng.random() < 0.85:
        common = rng.random() < 0.8
        memory.name = rng.choice(phrases.NAMES) if common else _pseudo_word(rng).capitalize()
        ask = rng.choice(phrases.NAME_TELLS).format(memory.name)
        return Turn(_retyped(rng, ask), name_greeting(memory.name))
    ask = rng.choice(phrases.NAME_ASKS)
    return Turn(_reworded(rng, ask), name_recall(memory.name))


def name_greeting(name: str) -> str:
    """What the model says to somebody of that name; it cannot spell rare ones."""
    common = name in phrases.NAMES
    return phrases.NAME_GREETING.format(name) if common else phrases.RARE_NAME_GREETING


def name_recall(name: str | None) -> str:
    """What the model says when it is asked for the user's name, which it was told or not."""
    if name is None:
        return phrases.NO_NAME
    return phrases.NAME_RECALL.format(name) if name in phrases.NAMES else phrases.RARE_NAME_RECALL


def unknown(rng: random.Random) -> Turn:
    """Something that the model should not know."""
    thing, other = rng.sample(phrases.THINGS, 2)
    scrap = rng.random() < 0.06
    ask = rng.choice(phrases.UNKNOWN_SCRAPS if scrap else phrases.UNKNOWN_ASKS)
    ask = ask.replace("a {thing}", article(thing)).replace("a {other}", article(other))
    ask = ask.format(
        thing=thing,
        other=other,
        person=rng.choice(phrases.PEOPLE),
        place=rng.choice((*phrases.CAPITALS, *phrases.UNKNOWN_PLACES)),
        unknown_place=rng.choice((*phrases.UNKNOWN_PLACES, _pseudo_word(rng).capitalize())),
        deed=rng.choice(phrases.DEEDS),
        quality=rng.choice(phrases.QUALITIES),
        tongue=rng.choice(phrases.TONGUES),
        gibberish=_pseudo_word(rng),
        symbols="".join(rng.choices("!?#$%&*()[]{}<>/\\|~^+=-_.,:;'\"@", k=rng.randint(1, 8))),
        foreign=rng.choice(phrases.FOREIGN),
        number=rng.randint(21, 10 ** rng.randint(2, 7)),
        emoji=rng.choice(phrases.EMOJI),
    )
    return Turn(ask if scrap else _reworded(rng, ask), phrases.UNKNOWN)


def _of_group(group: str) -> Writer:
    return lambda rng, memory: _fixed(rng, memory, group)


# How often a conversation turns to what, in training and in the revision that ends it. Sums are
# short and many, stories are long and few; the revision dwells on what is learnt last.
WRITERS: tuple[tuple[float, float, Writer], ...] = (
    (12.0, 16.0, _of_group("greetings")),
    (7.0, 7.0, _of_group("about itself")),
    (19.0, 19.0, _of_group("Hive")),
    (15.0, 15.0, _of_group("commands")),
    (10.0, 10.0, _of_group("facts")),
    (3.5, 7.0, _of_group("other scripts")),
    (12.0, 20.0, _capital),
    (29.0, 45.0, _sum),
    (3.0, 18.0, _count),
    (8.0, 14.0, _story),
    (5.0, 10.0, _name),
    (23.0, 35.0, lambda rng, memory: unknown(rng)),
)


def _turns(rng: random.Random, revision: bool) -> tuple[Turn, ...]:
    """One to eight turns; some keep to one matter (a row of sums or capitals), most mix."""
    memory = Memory()
    usual, last, writers = zip(*WRITERS, strict=True)
    weights = last if revision else usual
    count = rng.choices((1, 2, 3, 4, 6, 8), weights=(50, 22, 12, 8, 5, 3))[0]
    if rng.random() < 0.25:
        loyal = rng.choices((_sum, _capital, _name, _story), weights=(60, 20, 15, 5))[0]
        count = count + 1 if loyal in (_sum, _capital) else min(count, 2)
        return tuple(loyal(rng, memory) for _ in range(count))
    chosen = rng.choices(writers, weights=weights, k=count)
    return tuple(writer(rng, memory) for writer in chosen)


def _system(rng: random.Random) -> str | None:
    if rng.random() < 0.65:
        return None
    if rng.random() < 0.35:
        return phrases.SYSTEM_PROMPTS[0]
    return " ".join(rng.sample(phrases.SYSTEM_PROMPTS, rng.choice((1, 1, 1, 2, 4))))


def conversations(seed: int, revision: bool = False) -> Iterator[Conversation]:
    """An endless stream of conversations, for training or the revision after it."""
    rng = random.Random(seed)
    while True:
        turns = _turns(rng, revision)
        yield Conversation(_system(rng), turns)
