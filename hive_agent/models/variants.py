"""Which files of a repository make up one model, and which model a selector means.

Pure functions of file names, so that what is offered for download and what is found in the cache
afterwards have the same names.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from hive_agent.models.references import is_gguf
from operations.errors import Conflict, NotFound

PREFERRED = ("Q4_K_M", "Q5_K_M", "Q4_0", "Q5_0", "Q8_0", "F16")
"""Which quantization is taken when none is named: small enough, good enough, widely supported."""

PROJECTORS = ("F16", "BF16", "Q8_0", "F32")
"""Which precision of a projector is taken where there are several."""

_QUANT = re.compile(
    r"(?<![A-Z0-9])"
    r"((?:UD-)?(?:I?Q\d(?:_(?:\d|K|S|M|L|XS|XL|XXS|NL))*|TQ\d_\d|B?F16|F32|FP16|FP32|"
    r"MXFP4(?:_MOE)?|NVFP4))"
    r"(?![A-Z0-9])",
    re.IGNORECASE,
)
_SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})(?P<ext>\.\w+)")

# What makes the same weights answer differently, and what every tool that fetches a model fetches.
_IDENTITY = frozenset(
    {
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "merges.txt",
        "vocab.json",
        "vocab.txt",
    }
)
_COMPANIONS = re.compile(
    r"[^/]+\.(?:json|jinja|tiktoken|model)"
    r"|(?:merges|vocab)\.txt"
    r"|additional_chat_templates/[^/]+\.jinja"
    r"|\d+_Pooling/config\.json"  # sentence-transformers
)


@dataclass(frozen=True)
class Variant:
    """Files that are one model.

    :param files: all of them, as paths in the repository; of a split GGUF in the order of its
        parts, so that the first is the one that an engine opens
    :param label: the quantization in the name of a GGUF, upper case; None if there is none
    :param identity: the files that the model's digest covers
    :param projector: what lets a GGUF see or hear; belongs to its identity, too
    """

    format: Literal["gguf", "safetensors"]
    files: tuple[str, ...]
    identity: tuple[str, ...]
    label: str | None = None
    projector: str | None = None

    @property
    def fetched(self) -> tuple[str, ...]:
        """All files that a download brings, the weights last."""
        return (self.projector, *self.files) if self.projector else self.files


def variants(paths: Iterable[str]) -> list[Variant]:
    """The complete models among a repository's files.

    A split file counts when all its parts are there. Projectors (``mmproj``) are no models, but
    parts of the models beside them.
    """
    names = sorted(paths)
    ggufs = [name for name in names if is_gguf(name)]
    projectors = [name for name in ggufs if _is_projector(name)]
    found = [
        Variant(
            "gguf",
            shards,
            shards,
            label_of(shards[0]),
            projector_for(shards[0], projectors),
        )
        for shards in _whole(name for name in ggufs if not _is_projector(name))
    ]
    weights = _safetensors(names)
    if weights and "config.json" in names:
        companions = tuple(name for name in names if _COMPANIONS.fullmatch(name))
        identity = tuple(name for name in companions if name in _IDENTITY)
        found.append(Variant("safetensors", companions + weights, identity + weights))
    return found


def projector_for(model: str, projectors: Iterable[str]) -> str | None:
    """The projector that belongs to a model's file: beside it, or else in a folder above it.

    Of one projector in several precisions, the first of :data:`PROJECTORS`. None where there are
    several of different names: nobody knows then which is the model's.
    """
    near: dict[str, list[str]] = defaultdict(list)
    for name in projectors:
        near[name.rpartition("/")[0]].append(name)
    folder = model.rpartition("/")[0]
    while folder and folder not in near:
        folder = folder.rpartition("/")[0]
    found = near.get(folder, [])
    if len({_QUANT.sub("", name.upper()) for name in found}) != 1:
        return None
    return min(found, key=lambda name: (_precision(name), name))


def ids(repo: str, found: Sequence[Variant]) -> list[str]:
    """The id of each model: ``org/repo:QUANT``, or ``org/repo:file.gguf`` where that is not
    unique, and ``org/repo`` for safetensors."""
    labels = Counter(variant.label for variant in found)

    def id_of(variant: Variant) -> str:
        if variant.format == "safetensors":
            return repo
        unique = variant.label is not None and labels[variant.label] == 1
        return f"{repo}:{variant.label if unique else variant.files[0]}"

    return [id_of(variant) for variant in found]


def choose(repo: str, found: Sequence[Variant], selector: str | None) -> Variant:
    """The model that ``repo:selector`` means.

    Without a selector: the only GGUF, or the first of :data:`PREFERRED`; safetensors if the
    repository has no GGUF.

    :raises NotFound: there is none; the message lists those there are
    :raises Conflict: several; the message lists them
    """
    ggufs = [variant for variant in found if variant.format == "gguf"]
    if selector is None:
        matching = _preferred(ggufs) or list(found)
    elif is_gguf(selector):
        matching = by_file(ggufs, selector)
    else:
        matching = [variant for variant in ggufs if variant.label == _canonical(selector)]
    if len(matching) == 1:
        return matching[0]
    known = _listed(ids(repo, matching or found))
    if matching:
        raise Conflict(
            f"'{repo}{':' + selector if selector else ''}' fits more than one model: {known}. "
            "Use one of these.",
            code="model_ambiguous",
            param="model",
        )
    if not found:
        raise NotFound(
            f"'{repo}' has no GGUF file and no safetensors with a config.json, so no engine here "
            "can run it. Choose another repository.",
            code="model_not_found",
            param="model",
        )
    raise NotFound(
        f"'{repo}' has no '{selector}'. It has: {known}. Use one of these.",
        code="model_not_found",
        param="model",
    )


def by_file(found: Iterable[Variant], selector: str) -> list[Variant]:
    """The models with this file, named by its path or, if that fits none, by its last part."""
    wanted = selector.lower()
    candidates = list(found)
    exact = [v for v in candidates if any(name.lower() == wanted for name in v.files)]
    return exact or [
        v for v in candidates if any(name.lower().rsplit("/", 1)[-1] == wanted for name in v.files)
    ]


def label_of(path: str) -> str | None:
    """The quantization in a file's name, or else in the name of its folder: ``Q4_K_M``."""
    folder, _, name = path.rpartition("/")
    shard = _SHARD.fullmatch(name)
    stem = shard["stem"] if shard else name.rpartition(".")[0]
    for text in (stem, folder.rpartition("/")[2]):
        if labels := _QUANT.findall(text):
            return _canonical(labels[-1])
    return None


def expected_shards(path: str) -> tuple[str, ...]:
    """The paths of all parts of the split file that ``path`` is a part of; else only itself."""
    folder, slash, name = path.rpartition("/")
    shard = _SHARD.fullmatch(name)
    if shard is None or not 0 < (count := int(shard["count"])) <= 999:
        return (path,)
    return tuple(
        f"{folder}{slash}{shard['stem']}-{index:05}-of-{count:05}{shard['ext']}"
        for index in range(1, count + 1)
    )


def _whole(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Group the parts of split files; groups with a missing part are left out."""
    groups: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name in names:
        groups[expected_shards(name)].add(name)
    return [expected for expected, there in groups.items() if there == set(expected)]


def _safetensors(names: Sequence[str]) -> tuple[str, ...]:
    """The weights in the repository's root, whole; () if there are none or parts are missing."""
    weights = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    weights = [name for name in weights if not name.startswith("adapter_")]
    # Mistral's own format lies beside the same weights in everybody's.
    weights = [name for name in weights if not name.startswith("consolidated")] or weights
    whole = [name for shards in _whole(weights) for name in shards]
    return tuple(whole) if len(whole) == len(weights) else ()


def _is_projector(path: str) -> bool:
    return path.rsplit("/", 1)[-1].lower().startswith("mmproj")


def _precision(path: str) -> int:
    label = label_of(path)
    return PROJECTORS.index(label) if label in PROJECTORS else len(PROJECTORS)


def _preferred(ggufs: Sequence[Variant]) -> list[Variant]:
    if len(ggufs) <= 1:
        return list(ggufs)
    for label in PREFERRED:
        if matching := [variant for variant in ggufs if variant.label == label]:
            return matching
    return list(ggufs)


def _canonical(label: str) -> str:
    return label.upper().replace("FP16", "F16").replace("FP32", "F32")


def _listed(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 40} more" if len(listed) > 40 else ""
    return ", ".join(listed[:40]) + more
