"""What pip says: how far it is, and why it gave up. Pure.

pip has no output for programs that tells of both; these lines are the same from pip 22 to 26.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from packaging.utils import canonicalize_name

from hive_agent.processes import signal_name
from operations.errors import HiveError, InvalidRequest, Unavailable, WontFit

UNITS = {"bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}

_DOWNLOADING = re.compile(r"\s*Downloading (?P<from>\S+) \((?P<size>[\d.]+) (?P<unit>\w+)\)")
_INSTALLING = re.compile(r"\s*Installing collected packages: (?P<names>.+)")
_BUILDING = re.compile(r"\s*Building wheel for (?P<name>\S+) \(.+\): started")


@dataclass(frozen=True)
class Downloading:
    """A file comes in. ``size_bytes`` is rounded to what pip prints."""

    file: str
    size_bytes: int


@dataclass(frozen=True)
class Building:
    """A source distribution is made into a wheel."""

    name: str


@dataclass(frozen=True)
class Installing:
    """All is there; so many packages are unpacked and compiled."""

    packages: int


Step = Downloading | Building | Installing


def parse(line: str) -> Step | None:
    """The step that a line of pip's output begins; None for any other line."""
    if match := _DOWNLOADING.match(line):
        size = int(float(match["size"]) * UNITS.get(match["unit"], 1))
        return Downloading(unquote(match["from"].rpartition("/")[2]), size)
    if match := _BUILDING.match(line):
        return Building(match["name"])
    if match := _INSTALLING.match(line):
        return Installing(len(match["names"].split(",")))
    return None


@dataclass(frozen=True)
class Failure:
    """A command of an installation that failed.

    :param what: what was being installed (``vllm 0.33.0``)
    :param distribution: the engine's own, whose version callers can choose
    :param lines: the last lines of its output
    :param status: its exit status; negative for the signal that ended it
    :param python: version of the interpreter that it is for
    :param log: path of its whole output
    """

    what: str
    distribution: str
    lines: Sequence[str]
    status: int
    python: str
    log: str


CODE = "engine_install_failed"

_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError"
    r"|CERTIFICATE_VERIFY_FAILED|Connection (?:refused|reset|aborted)|Network is unreachable"
    r"|Temporary failure in name resolution|Name or service not known|Max retries exceeded"
    r"|IncompleteRead|ProtocolError|ConnectionError"
)
_NO_VERSION = re.compile(
    r"Could not find a version that satisfies the requirement (?P<wanted>\S+).*"
    r"\(from versions: (?P<versions>[^)]*)\)"
)
_OTHER_PYTHON = re.compile(
    r"(?P<version>\S+) Requires-Python (?P<wanted>[^;]+)"
    r"|requires a different Python: \S+ not in '(?P<range>[^']+)'"
)
_AFTER_NAME = re.compile(r"[^A-Za-z0-9._-]")
_REFUSED = re.compile(r"\b(?:HTTP error )?(?P<status>401|403)\b.*(?:Error|error|Forbidden|Unauth)")
_BUILD = re.compile(r"(?:Failed building wheel for|Failed to build) '?(?P<name>[^\s']+)")
_CONFLICT = re.compile(r"ResolutionImpossible|conflicting dependencies")
_HASHES = re.compile(
    r"DO NOT MATCH THE HASHES|BadZipFile|has an invalid wheel|Wheel .* is invalid|zlib\.error"
)
_FULL = re.compile(r"No space left on device|\[Errno (?:28|122)\]|Disk quota exceeded")
_NO_VENV = re.compile(r"No module named '?(?:venv|ensurepip)|ensurepip is not\s+available")


def explain(failure: Failure) -> HiveError:
    """Why it failed and what to do, from what the command said."""
    what, text = failure.what, "\n".join(failure.lines)
    see = f"The whole output is {failure.log}."

    def failed(why: str, cure: str, *, retryable: bool = False) -> Unavailable:
        return Unavailable(
            f"{what} could not be installed: {why}. {see} {cure}", code=CODE, retryable=retryable
        )

    if failure.status < 0:
        name = signal_name(-failure.status)
        return failed(
            f"the installation was ended from outside by {name}",
            "If nobody did that, the machine may have run out of memory. Install it again.",
            retryable=True,
        )
    if _FULL.search(text):
        return WontFit(
            f"{what} could not be installed: the disk is full. {see} Free some space, or give the "
            "agent a --state-dir on a larger disk, and install it again.",
            code="disk_full",
        )
    if _NO_VENV.search(text):
        minor = ".".join(failure.python.split(".")[:2])
        return failed(
            "this Python cannot make environments, for its module venv or ensurepip is missing",
            f"On Debian and Ubuntu run 'apt install python{minor}-venv', then install it again.",
        )
    if match := _REFUSED.search(text):
        return failed(
            f"the package index refused with {match['status']}",
            "Correct its address or password in pip's own settings ('pip config list').",
        )
    if _HASHES.search(text):
        return failed("a downloaded file is damaged", "Run 'pip cache purge' and install it again.")
    if match := _BUILD.search(text):
        return failed(
            f"{match['name']} has no wheel for this machine and could not be built here",
            "Install what its build needs (the output tells), or choose another --version.",
        )
    if _CONFLICT.search(text):
        return failed("its requirements contradict each other", "Choose another --version.")
    missing = _NO_VERSION.search(text)
    nothing_known = missing is None or missing["versions"] in ("", "none")
    if nothing_known and _NETWORK.search(text):
        return failed(
            "the package index cannot be reached",
            "Check the network, and proxy and index in pip's settings ('pip config list'), and "
            "install it again.",
            retryable=True,
        )
    if missing is not None or _OTHER_PYTHON.search(text):
        return _not_found(failure, missing, see)
    said = [line for line in failure.lines if line.startswith("ERROR:")] or [
        line for line in failure.lines if line.strip()
    ]
    last = said[-1].removeprefix("ERROR:").strip()[:300] if said else "it said nothing"
    return failed(f"it ended with status {failure.status}: {last.rstrip('.')}", "Install it again.")


def _not_found(failure: Failure, missing: re.Match[str] | None, see: str) -> HiveError:
    """No such version, none for this Python, or none for this machine."""
    wanted = missing["wanted"] if missing else failure.distribution
    version = wanted.rpartition("==")[2]
    for line in failure.lines:
        for match in _OTHER_PYTHON.finditer(line):
            if match["range"] or match["version"] == version:
                return Unavailable(
                    f"{failure.what} could not be installed: {wanted} is for Python "
                    f"{(match['range'] or match['wanted']).strip()}, and this hive runs on "
                    f"{failure.python}. {see} Run the agent with such a Python, or choose another "
                    "--version.",
                    code=CODE,
                    retryable=False,
                )
    known = [v.strip() for v in (missing["versions"] if missing else "").split(",")]
    some = known[0] not in ("", "none")
    newest = f"; the newest that it has are {', '.join(known[-5:])}" if some else ""
    own = canonicalize_name(_AFTER_NAME.split(wanted)[0]) == canonicalize_name(failure.distribution)
    if some and own:
        return InvalidRequest(
            f"{failure.what} could not be installed: the package index has no {wanted} for this "
            f"machine{newest}. {see} Choose one with --version.",
            code="no_such_version",
            param="version",
        )
    needs = "" if own else f"it needs {wanted}, and "
    lacks = wanted if own else "such version"
    return Unavailable(
        f"{failure.what} could not be installed: {needs}the package index has no {lacks} for this "
        f"machine{newest}. {see} Check the index in pip's settings ('pip config list'), or "
        "choose another --version.",
        code=CODE,
        retryable=False,
    )
