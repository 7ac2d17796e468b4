"""The Hugging Face cache on disk: its layout, what is in it, and taking models out of it.

The layout is huggingface_hub's (``models--org--name/{blobs,snapshots/<commit>,refs}``): files lie
in ``blobs`` under their ETag, which is the SHA-256 of a large file and the git id of a small one;
``snapshots`` holds one tree of relative links per commit. So transformers, vLLM and ``hf cache ls``
find here what Hive fetched, and Hive finds what they fetched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from hive_agent.models.digests import FileKey
from hive_agent.models.variants import Variant, ids, variants
from operations.errors import Conflict, Forbidden, HiveError
from wire.files import open_regular

SHA256 = re.compile(r"[0-9a-f]{64}")
ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}")
_PREFIX = "models--"
_MAX_REF_BYTES = 256
_MAX_DEPTH = 4
_MAX_FILES = 20_000


@dataclass(frozen=True)
class Part:
    """One file of a model on disk.

    :param sha256: its sum in hex where the cache vouches for it
    """

    name: str
    key: FileKey
    sha256: str | None = None


@dataclass(frozen=True)
class Cached:
    """A complete model in the cache. ``parts`` are the files of ``variant``, in its order."""

    id: str
    repo: str
    variant: Variant
    snapshot: Path
    parts: tuple[Part, ...]
    projector: Part | None = None


def repo_folder(cache_dir: Path, repo: str) -> Path:
    return cache_dir / (_PREFIX + repo.replace("/", "--"))


def blob_path(cache_dir: Path, repo: str, etag: str) -> Path:
    return repo_folder(cache_dir, repo) / "blobs" / etag


def lock_path(cache_dir: Path, repo: str, etag: str) -> Path:
    """The lock that huggingface_hub holds, too, while it fetches this blob."""
    return cache_dir / ".locks" / repo_folder(cache_dir, repo).name / f"{etag}.lock"


def scan(cache_dir: Path) -> list[Cached]:
    """All complete models in the cache, by id. Blocks for a few system calls per file.

    Of a model in several snapshots, the one of ``refs/main`` counts, else the newest.
    """
    try:
        folders = sorted(name for name in os.listdir(cache_dir) if name.startswith(_PREFIX))
    except OSError:
        return []
    found: list[Cached] = []
    for name in folders:
        repo = name.removeprefix(_PREFIX).replace("--", "/")
        found.extend(_scan_repo(cache_dir / name, repo))
    return found


def files_below(folder: Path) -> list[str]:
    """The files in a folder and its subfolders, as relative paths; links to folders are left."""
    return list(_walk(os.fspath(folder), "", _MAX_DEPTH))[:_MAX_FILES]


def link(cache_dir: Path, repo: str, branch: str, commit: str, files: Mapping[str, str]) -> None:
    """Show finished blobs as files of a commit, and make it the branch's. Blocks.

    :param files: path in the repository → ETag; weights go last, so that no reader takes the first
        links for the whole model
    :raises HiveError: the file system refuses, e.g. because it knows no links
    """
    folder = repo_folder(cache_dir, repo)
    snapshot = folder / "snapshots" / commit
    try:
        for name, etag in files.items():
            path = snapshot / name
            path.parent.mkdir(parents=True, exist_ok=True)
            target = os.path.relpath(folder / "blobs" / etag, path.parent)
            if not path.is_symlink() or os.readlink(path) != target:
                _replace(path, lambda new, to=target: os.symlink(to, new))  # type: ignore[misc]
        (folder / "refs").mkdir(exist_ok=True)
        _replace(folder / "refs" / branch, lambda new: Path(new).write_text(commit))
    except OSError as error:
        raise HiveError(
            f"The files of '{repo}' cannot be linked in {folder}: {error.strerror}. Choose a "
            "folder on a file system with symbolic links with HF_HOME.",
            code="cache_not_writable",
        ) from None


def remove(cache_dir: Path, model: Cached) -> None:
    """Take a model out of the cache, in all its snapshots. Blocks.

    Blobs go when no remaining snapshot links to them; the whole repository goes when no other
    model is left in it and nobody is fetching one.

    :raises Conflict: the repository is damaged, so that nobody knows which files belong together
    :raises Forbidden: files could not be removed
    """
    from huggingface_hub import scan_cache_dir

    folder = repo_folder(cache_dir, model.repo)
    info = scan_cache_dir(cache_dir)
    repository = next((repo for repo in info.repos if repo.repo_path.name == folder.name), None)
    if repository is None:
        reasons = "; ".join(str(w) for w in info.warnings if folder.name in str(w))
        raise Conflict(
            f"The cache of '{model.repo}' is damaged, so it was left alone: "
            f"{reasons or 'it is gone'}. Remove the folder {folder} by hand.",
            code="cache_damaged",
        )
    # Revisions of forks may have the same hash: the strategies must see this repository only.
    info = dataclasses.replace(info, repos=frozenset([repository]))
    taken, others = [], False
    for revision in repository.revisions:
        names = {
            f.file_path.relative_to(revision.snapshot_path).as_posix(): f for f in revision.files
        }
        taken += [file for name, file in names.items() if name in model.variant.files]
        others |= bool(variants(names.keys() - set(model.variant.files)))
    if others or _being_fetched(cache_dir, model.repo):
        info.delete_files(*taken).execute()
    else:
        info.delete_revisions(*(r.commit_hash for r in repository.revisions)).execute()
    left = [file.file_path for file in taken if os.path.lexists(file.file_path)]
    if left:
        raise Forbidden(
            f"{left[0]} could not be removed: the hive agent has no permission to write there. "
            "Remove it as the user who fetched it."
        )


def part(folder: Path, name: str) -> Part:
    """A file of a folder outside the cache; nobody vouches for it.

    :raises OSError: it is gone or out of reach
    """
    return Part(name, FileKey.of(os.path.join(folder, name)))


def _linked_part(snapshot: Path, name: str) -> Part:
    """A file of a snapshot: where its link points to, and its sum if the blob's name is one.

    A blob may itself be a link, into the store that repositories share; its name still counts.

    :raises OSError: it is gone, a dangling link, or out of reach
    """
    path = os.path.join(snapshot, name)
    try:
        blob = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
    except OSError:  # a copy: the file system knows no links
        return part(snapshot, name)
    folder, etag = os.path.split(blob)
    vouched = SHA256.fullmatch(etag) and folder == os.path.join(snapshot.parent.parent, "blobs")
    return Part(name, FileKey.of(blob), etag if vouched else None)


def _scan_repo(folder: Path, repo: str) -> list[Cached]:
    models: dict[object, tuple[Variant, Path, tuple[Part, ...], Part | None]] = {}
    for snapshot in _snapshots(folder):
        for variant in variants(files_below(snapshot)):
            key = variant.files if variant.format == "gguf" else variant.format
            if key in models:
                continue
            try:
                parts = tuple(_linked_part(snapshot, name) for name in variant.files)
            except OSError:  # being fetched, or a link into nowhere
                continue
            models[key] = (variant, snapshot, parts, _projector(snapshot, variant))
    names = ids(repo, [variant for variant, *_ in models.values()])
    return [Cached(name, repo, *model) for name, model in zip(names, models.values(), strict=True)]


def _projector(snapshot: Path, variant: Variant) -> Part | None:
    if variant.projector is None:
        return None
    try:
        return _linked_part(snapshot, variant.projector)
    except OSError:
        return None


def _snapshots(folder: Path) -> list[Path]:
    """The snapshots of a repository, that of ``main`` first, then from new to old."""
    try:
        with os.scandir(folder / "snapshots") as entries:
            there = [(entry.stat().st_mtime_ns, entry.name) for entry in entries if entry.is_dir()]
    except OSError:
        return []
    main = ""
    if len(there) > 1:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            with open_regular(folder / "refs" / "main") as file:
                main = file.read(_MAX_REF_BYTES).decode().strip()
    there.sort(key=lambda pair: (pair[1] == main, pair[0]), reverse=True)
    return [folder / "snapshots" / name for _, name in there]


def _walk(folder: str, prefix: str, depth: int) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    yield prefix + entry.name
                elif depth > 1:
                    yield from _walk(entry.path, f"{prefix}{entry.name}/", depth - 1)
    except OSError:
        return


def _replace(path: Path, make: Callable[[str], object]) -> None:
    """Make a file or link under another name first, so that nobody sees half of it."""
    new = f"{path}.{uuid4().hex[:8]}.tmp"
    make(new)
    os.replace(new, path)


def _being_fetched(cache_dir: Path, repo: str) -> bool:
    """Whether somebody holds the lock of one of the repository's blobs."""
    partial = repo_folder(cache_dir, repo).glob("blobs/*.incomplete")
    etags: Collection[str] = {path.name.partition(".")[0] for path in partial}
    for etag in etags:
        lock = lock_path(cache_dir, repo, etag)
        if not lock.exists():
            continue
        try:
            with FileLock(lock, timeout=0):
                pass
        except Timeout:
            return True
    return False
