"""What names, ids and the like may look like, and the same in words."""

from __future__ import annotations

from typing import Final

HIVE_ID: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
WORKER_ID: Final = r"^[a-z0-9][a-z0-9._-]{0,62}$"
DEVICE_ID: Final = r"^(cpu|[a-z]{2,10}:\d{1,3})$"
ENGINE_NAME: Final = r"^[a-z0-9][a-z0-9-]{0,31}$"
ENGINE_VERSION: Final = r"^[0-9][0-9A-Za-z.+!-]{0,63}$"
KEY: Final = r"^[\x21-\x7e]+$"
ABSOLUTE_PATH: Final = r"^/"
QUANTIZATION: Final = r"^[a-z0-9_]{1,32}$"
FLAG: Final = r"^[a-z][a-z0-9-]{1,63}$"
ONE_LINE: Final = r"^[^\x00-\x1f\x7f]+$"

_NAME = "begin with a letter or digit; then come letters, digits, '.', '_' and '-', 63 in all"

IN_WORDS: Final = {
    HIVE_ID: _NAME,
    WORKER_ID: f"{_NAME}, in lower case",
    DEVICE_ID: "be 'cpu', or a kind and a number such as 'cuda:0'",
    ENGINE_NAME: "have lower-case letters, digits and '-', 32 at most, such as 'vllm'",
    ENGINE_VERSION: "begin with a digit, such as '0.32.0', and have 64 characters at most",
    KEY: "have printable ASCII characters alone, and no spaces",
    ABSOLUTE_PATH: "be a path on the hive's machine that begins with '/'",
    QUANTIZATION: "have lower-case letters, digits and '_', 32 at most, such as 'awq'",
    FLAG: "be a long name without its dashes: lower-case letters, digits and '-'",
    ONE_LINE: "be one line of text, without control characters",
}
"""By pattern, what a value must do to match it."""
