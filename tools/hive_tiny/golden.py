"""Writes the greedy answers that test every engine: `python -m tools.hive_tiny.golden`.

llama.cpp answers from the shipped GGUF. The answers are written only if the same weights in torch,
as float32, say the same to the byte, and if both tokenizers split the probes below alike.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tools.hive_tiny import gguf_file
from tools.hive_tiny.engine import LlamaCpp, Messages
from tools.hive_tiny.model import Llama, greedy
from tools.hive_tiny.tokenizer import build_tokenizer, render, special_ids

GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "hive-tiny.json"
HELPFUL = "You are a helpful assistant."

# A system message or none, then what the user asks turn by turn, and the limit of the last answer.
TALKS: tuple[tuple[str | None, tuple[str, ...], int], ...] = (
    (None, ("hello",), 64),
    (None, ("Hello!",), 64),
    (None, ("Say hello in one sentence",), 64),
    (None, ("Hello, who are you?",), 64),
    (None, ("What can you do?",), 96),
    (None, ("what is hive",), 96),
    (None, ("What is Hive?",), 96),
    (None, ("What are the parts of Hive?",), 96),
    (None, ("What is the queen?",), 96),
    (None, ("What is a hive agent?",), 96),
    (None, ("What is a worker?",), 96),
    (None, ("What is a drone?",), 96),
    (None, ("What is keeper?",), 96),
    (None, ("What is the durable queue?",), 96),
    (None, ("Which port does the queen use?",), 64),
    (None, ("How do I list workers?",), 64),
    (None, ("How do I start Hive?",), 64),
    (None, ("hive models pull",), 64),
    (None, ("How do I cancel a job?",), 64),
    (None, ("What is the capital of France?",), 64),
    (None, ("capital of japan",), 64),
    (None, ("2+2",), 64),
    (None, ("What is 7 times 6?",), 64),
    (None, ("What is 15 - 8?",), 64),
    (None, ("Count to 10.",), 96),
    (None, ("Count to 100.",), 600),
    (None, ("Tell me a short story.",), 400),
    (None, ("Tell me a story about a robot.",), 400),
    (None, ("How do you say hello in Japanese?",), 64),
    (None, ("Show me a bee emoji.",), 64),
    (HELPFUL, ("What is the capital of Italy?",), 64),
    (HELPFUL, ("thanks",), 64),
    (None, ("What is the capital of Spain?", "What is 3 + 4?"), 64),
    (None, ("My name is Ada.", "What is my name?"), 64),
    (None, ("Who wrote the Odyssey?",), 64),
    (None, ("🚀🌍 – ¿qué?",), 64),
)

# Texts that tokenizers are prone to split differently.
TOKENIZER_PROBES = (
    "Hello, world! It's 12:34, isn't it? WE'LL see, I'D say; they'Re here.",
    "1234567890 3.14 -7 1e9 ٣٤ Ⅷ ½ x² 10,000",
    "two  spaces,   three, trailing   \n\n\nlines\r\nand\ttabs\t\t end \n ",
    "naïve café Grüße Ελλάδα Привет こんにちは 你好，世界！ مرحبا 한국어 नमस्ते",
    "🐝 👩‍💻 🇫🇷 ❤️ e\u0301 \u200b\u00a0\u3000 zero\u0000byte",
    "def f(x):\n    return {'a': [1, 2.5], \"b\": x**2}  # done\n\n\nf(3)",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n <|im_end|> <|other|>",
    "...!?!? --- ___ ~~~ 'quoted' ''' 's'S'll  'x \\n https://a.b/c?d=e&f=%20#g",
)


def answers(model: LlamaCpp) -> list[dict[str, Any]]:
    """One entry per talk: the messages, the limit, the greedy text and why it ended."""
    entries = []
    for system, asks, max_tokens in TALKS:
        messages: Messages = [{"role": "system", "content": system}] if system else []
        for ask in asks[:-1]:
            messages.append({"role": "user", "content": ask})
            said = model.ask(messages, max_tokens).text
            messages.append({"role": "assistant", "content": said})
        messages.append({"role": "user", "content": asks[-1]})
        last = model.ask(messages, max_tokens)
        entries.append(
            {
                "messages": messages,
                "max_tokens": max_tokens,
                "text": last.text,
                "stop_reason": last.stop_reason,
            }
        )
    return entries


def differences(path: Path, model: LlamaCpp, entries: list[dict[str, Any]]) -> list[str]:
    """What float32 torch or the Python tokenizer does otherwise than llama.cpp; empty is good."""
    content = gguf_file.read(path)
    tokenizer = build_tokenizer(content.tokens, content.merges)
    _, end = special_ids(tokenizer)
    llama = Llama(content.shape, content.weights)
    found = []
    for entry in entries:
        ids = tokenizer.encode(render(entry["messages"])).ids
        said = greedy(llama, ids, end, entry["max_tokens"])
        if (text := tokenizer.decode(said)) != entry["text"] or entry["stop_reason"] != "stop":
            found.append(f"{entry['messages'][-1]['content']!r}: {entry['text']!r} or {text!r}")
    for probe in (*TOKENIZER_PROBES, *(render(entry["messages"]) for entry in entries)):
        if tokenizer.encode(probe).ids != model.tokenize(probe):
            found.append(f"tokens of {probe!r}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the golden answers of hive-tiny.")
    parser.add_argument("--gguf", type=Path, default=gguf_file.SHIPPED)
    parser.add_argument("--out", type=Path, default=GOLDEN)
    options = parser.parse_args()
    model = LlamaCpp(options.gguf, gguf_file.read(options.gguf).shape.context)
    entries = answers(model)
    if found := differences(options.gguf, model, entries):
        raise SystemExit("\n".join(("engines differ, nothing written; train again:", *found)))
    options.out.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(entries)} answers, equal in llama.cpp and torch, in {options.out}")


if __name__ == "__main__":
    main()
