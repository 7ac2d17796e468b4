"""How a model is written down: ``org/repo``, ``org/repo:Q4_K_M``, ``org/repo:file.gguf``,
``file:/path``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from operations.errors import InvalidRequest

MAX_LENGTH = 1024
"""Characters of a whole reference."""

_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_QUANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FORMS = "org/repo, org/repo:Q4_K_M, org/repo:file.gguf or file:/path/to/file.gguf"


@dataclass(frozen=True)
class Reference:
    """Either ``repo`` with an optional ``selector``, or ``path``; never both.

    :param repo: ``org/name`` on the hub
    :param selector: a quantization (``Q4_K_M``) or a file of the repository (``a/b.gguf``)
    :param path: an absolute path on this machine
    """

    repo: str | None = None
    selector: str | None = None
    path: Path | None = None

    @property
    def selects_file(self) -> bool:
        """Whether the selector is a file's name rather than a quantization."""
        return self.selector is not None and is_gguf(self.selector)

    def __str__(self) -> str:
        if self.path is not None:
            return f"file:{self.path}"
        return f"{self.repo}:{self.selector}" if self.selector else f"{self.repo}"


def parse_reference(text: str) -> Reference:
    """Read a reference.

    :raises InvalidRequest: it is empty, too long, relative, or has parts or characters that no
        repository and no path of ours has
    """
    if len(text) > MAX_LENGTH:
        raise _wrong(f"A model's name of {len(text)} characters is too long")
    if not text or not text.isprintable():
        raise _wrong("The model's name is empty or holds characters that cannot be printed")
    if text[:5].lower() == "file:":
        return Reference(path=_absolute(text[5:]))
    repo, colon, selector = text.partition(":")
    if not is_repo(repo):
        raise _wrong(f"'{repo}' is no repository of the hub")
    if not colon:
        return Reference(repo=repo)
    if is_gguf(selector):
        if not is_safe_path(selector):
            raise _wrong(f"'{selector}' is no file of a repository")
    elif not _QUANT.fullmatch(selector):
        raise _wrong(f"'{selector}' is neither a quantization nor a .gguf file")
    return Reference(repo=repo, selector=selector)


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def is_repo(name: str) -> bool:
    """Whether this may be a repository's ``org/name``: the hub's own rules for names."""
    parts = name.split("/")
    return (
        len(parts) == 2
        and all(_REPO_PART.fullmatch(part) for part in parts)
        and "--" not in name
        and ".." not in name
        and not name.endswith(".git")
    )


def is_safe_path(path: str) -> bool:
    """Whether a relative path, asked for or told by a hub, stays inside its folder."""
    return (
        0 < len(path) <= MAX_LENGTH
        and path.isprintable()
        and not set(path) & {"\\", ":"}
        and all(part not in ("", ".", "..") and len(part) <= 255 for part in path.split("/"))
    )


def _absolute(path: str) -> Path:
    if path.startswith("///"):  # file:///path, as a URL
        path = path[2:]
    if not path.startswith("/"):
        raise _wrong(f"'file:{path}' is not absolute")
    parts = path.removesuffix("/")[1:].split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise _wrong(f"'file:{path}' has empty, '.' or '..' parts")
    return Path("/", *parts)


def _wrong(what: str) -> InvalidRequest:
    return InvalidRequest(f"{what}. Write {_FORMS}.", code="invalid_model_name", param="model")
