"""Flags of an engine that Hive has no option for: passed on, if the engine has them and Hive does
not set them itself."""

from __future__ import annotations

import asyncio
import difflib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from operations.errors import InvalidRequest, Unavailable
from operations.operations import FlagValue

HELP_S: Final = 60.0
PARAM: Final = "options.flags"

OTHER_MEMORY: Final = "it would change what memory the engine takes, and Hive counts on that"
OTHER_MODEL: Final = "it would make another model of the one that is asked for"

_FLAG = re.compile(
    r"^ {1,4}--(?P<name>[a-z][a-z0-9-]*)"
    r"(?P<off>, --no-[a-z0-9-]+)?"
    r"(?: (?:\{(?P<choices>[^}]*)\}|(?P<value>[A-Z][A-Z0-9_]*)(?P<many> \[[^\]]*\])?))?",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Flag:
    """One flag of an engine, as its help tells it.

    :param switch: takes no value
    :param off: a switch that can be turned off: there is a ``--no-x``
    :param choices: the values that it takes; () where it takes any
    :param many: takes several values
    """

    switch: bool
    off: bool = False
    choices: tuple[str, ...] = ()
    many: bool = False


@dataclass(frozen=True)
class FlagRules:
    """What of an engine's flags may be passed on.

    :param set_by_hive: flag → the field of the request that sets it
    :param refused: flags that are never passed on, and why, which completes "--x is refused: …";
        one that ends in a dash is a beginning
    :param counted: flags whose value Hive counts with: a whole number above 0
    """

    engine: str
    set_by_hive: Mapping[str, str]
    refused: Mapping[str, str]
    counted: Collection[str] = ()

    def check(self, flags: Mapping[str, FlagValue], known: Mapping[str, Flag]) -> None:
        """Hold what was asked against what there is.

        :raises InvalidRequest: a flag that the engine does not have, a value that it does not
            take, or a flag that Hive sets
        """
        for name, value in flags.items():
            if (field := self.set_by_hive.get(name)) is not None:
                raise _refused(f"--{name} of {self.engine} is set by Hive. Use '{field}' instead.")
            if (why := self.refusal(name)) is not None:
                raise _refused(f"--{name} of {self.engine} is refused: {why}. Leave it out.")
            if name not in known:
                near = difflib.get_close_matches(name, known, 3)
                meant = f" Did you mean {' or '.join('--' + one for one in near)}?" if near else ""
                raise _refused(f"{self.engine} has no flag --{name}.{meant} Leave it out.")
            self._check_value(name, value, known[name])

    def refusal(self, name: str) -> str | None:
        """Why a flag is never passed on; None where it may be."""
        return next(
            (
                why
                for one, why in self.refused.items()
                if name == one or (one[-1] == "-" and name.startswith(one))
            ),
            None,
        )

    def _check_value(self, name: str, value: FlagValue, flag: Flag) -> None:
        where = f"--{name} of {self.engine}"
        if flag.switch != isinstance(value, bool):
            kind = "is true or false" if flag.switch else "takes a value, not true or false"
            raise _refused(f"{where} {kind}. Correct it.")
        if value is False and not flag.off:
            raise _refused(f"{where} can only be turned on. Leave it out.")
        if isinstance(value, list) and not flag.many:
            raise _refused(f"{where} takes one value. Give no list.")
        if name in self.counted and (type(value) is not int or value < 1):
            raise _refused(f"{where} takes a whole number above 0. Correct it.")
        if isinstance(value, list):
            _check_words(where, value)
        values = value if isinstance(value, list) else [value]
        if flag.choices and (bad := [one for one in values if str(one) not in flag.choices]):
            there = ", ".join(flag.choices)
            raise _refused(f"{where} does not take '{bad[0]}'. Give one of: {there}.")

    @staticmethod
    def argv(flags: Mapping[str, FlagValue]) -> list[str]:
        """The arguments for flags that were checked."""
        given: list[str] = []
        for name, value in flags.items():
            match value:
                case True:
                    given += [f"--{name}"]
                case False:
                    given += [f"--no-{name}"]
                case list():
                    given += [f"--{name}", *value]
                case _:
                    given += [f"--{name}={value}"]
        return given


def from_help(text: str) -> dict[str, Flag]:
    """The flags that an argparse help tells."""
    found = {}
    for flag in _FLAG.finditer(text):
        choices = tuple(c.strip() for c in (flag["choices"] or "").split(",") if c.strip())
        off = flag["off"] is not None
        switch = off or (not choices and flag["value"] is None)
        found[flag["name"]] = Flag(switch, off, choices, flag["many"] is not None)
    return found


async def flags_of(python: str, module: str, env: Mapping[str, str]) -> dict[str, Flag]:
    """Ask an engine for its flags; takes as long as it takes to import it.

    :raises Unavailable: it does not say
    """
    process = await asyncio.create_subprocess_exec(
        python,
        "-m",
        module,
        "--help=all",
        env={**env, "COLUMNS": "200"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=os.sep,
    )
    try:
        async with asyncio.timeout(HELP_S):
            said, _ = await process.communicate()
    except TimeoutError:
        said = b""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if not (known := from_help(said.decode("utf-8", "replace"))):
        raise Unavailable(
            "The engine does not tell which flags it has. See 'hive engines ls', or leave out "
            "'flags'.",
            code="engine_broken",
            param=PARAM,
            retryable=False,
        )
    return known


def _check_words(where: str, words: Sequence[str]) -> None:
    """Each is an argument of its own, and must not be taken for another flag.

    :raises InvalidRequest: one would be, or there is none
    """
    if not words:
        raise _refused(f"{where} takes at least one value. Leave it out, or give some.")
    if bad := [word for word in words if word.startswith("-")]:
        raise _refused(f"{where} does not take '{bad[0]}': it begins like a flag. Correct it.")


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, param=PARAM)
