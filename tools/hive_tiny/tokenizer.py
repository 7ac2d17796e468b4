"""The byte-level BPE of `hive-tiny`, its special tokens and its chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 768  # tokens, the special ones included
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (TURN_START, TURN_END)

# How text is split before merging. llama.cpp knows this pattern by the name in PRE_TOKENIZER, so
# both tokenizers split alike (llama.cpp: src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_QWEN2).
PRE_TOKENIZER = "qwen2"
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What the user and the system say is trimmed; what the assistant said is kept to the byte, so a cut
# answer can be continued.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}"
    "{% else %}{{ message['content'] | trim }}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _assemble(bpe: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of VOCABULARY tokens: special ones first, then the bytes, then the merges."""
    tokenizer = _assemble(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_tokenizer(
    tokens: list[str], merges: list[tuple[str, str]], dropout: float | None = None
) -> Tokenizer:
    """The tokenizer of a token list (index is id) and its merges.

    dropout: the share of merges left out at random, which shows a model other spellings of a text.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = _assemble(models.BPE(vocabulary, merges, dropout=dropout))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def tokens_and_merges(tokenizer: Tokenizer) -> tuple[list[str], list[tuple[str, str]]]:
    """The token list (index is id) and the merges, most frequent first."""
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    return tokens, [(left, right) for left, right in state["model"]["merges"]]


def special_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids of TURN_START and TURN_END."""
    start, end = (tokenizer.get_vocab()[token] for token in SPECIAL_TOKENS)
    return start, end


def render(messages: Iterable[Mapping[str, str]]) -> str:
    """The messages as CHAT_TEMPLATE writes them before an answer."""
    parts = []
    for message in messages:
        content = message["content"]
        content = content if message["role"] == "assistant" else content.strip()
        parts.append(f"{TURN_START}{message['role']}\n{content}{TURN_END}\n")
    return "".join(parts) + f"{TURN_START}assistant\n"
