"""How a name finds its model: full reference, last part or alias, without regard to case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from operations.errors import Conflict, NotFound


def short_forms(reference: str) -> set[str]:
    """Every lower-case name under which a reference is known.

    ``Qwen/Qwen3-0.6B-GGUF:Q8_0`` is also ``qwen3-0.6b-gguf:q8_0``, ``qwen3-0.6b-gguf``,
    ``qwen3-0.6b`` and ``qwen/qwen3-0.6b-gguf``; ``file:/models/x.gguf`` is also ``x.gguf``
    and ``x``. What a derived model's id adds (``hive-tiny+pirate``) stays with each form.
    """
    full, added = _split(reference.lower())
    return {form + added for form in _forms(full)}


def _split(full: str) -> tuple[str, str]:
    """An id, and what is added to it; a ``+`` in the name of a file or of a folder above it adds
    nothing."""
    at = full.find("+", max(0, full.rfind("/"), full.find(".gguf")))
    return (full, "") if at < 0 else (full[:at], full[at:])


def _forms(full: str) -> set[str]:
    if full.startswith("file:"):
        last = full.rsplit("/", 1)[-1]
        return {full, last, last.removesuffix(".gguf")}
    repo, _, selector = full.partition(":")
    last = repo.rsplit("/", 1)[-1]
    forms = {full, repo, last, last.removesuffix("-gguf")}
    if selector:
        forms |= {f"{last}:{selector}", f"{last.removesuffix('-gguf')}:{selector}"}
    if selector.endswith(".gguf"):
        forms |= {selector, selector.rsplit("/", 1)[-1].removesuffix(".gguf")}
    return forms


def taken_by(name: str, digest: str, models: Iterable[tuple[str, str]]) -> str | None:
    """The id of another model that answers to a name, in full or in short; None if none does.

    A new model must not have such a name: exact names come before short ones, so it would take
    the other's requests over.

    :param digest: of the new model
    :param models: pairs (id, digest) of those that are known
    """
    wanted = name.lower()
    others = (model_id for model_id, known in models if known != digest)
    return next((model_id for model_id in others if wanted in short_forms(model_id)), None)


def resolve(name: str, models: Iterable[tuple[str, str]]) -> str:
    """Find the one model that ``name`` means.

    :param name: what the caller wrote
    :param models: pairs (id, digest); one digest may stand under several ids and counts once
    :returns: the digest
    :raises NotFound: nothing matches; the message lists what there is
    :raises Conflict: two different models match; the message lists them
    """
    wanted = name.lower()
    exact: dict[str, str] = {}
    loose: dict[str, str] = {}
    known: list[str] = []
    for model_id, digest in models:
        known.append(model_id)
        if wanted in (model_id.lower(), digest.lower()):
            exact[digest] = model_id
        elif wanted in short_forms(model_id):
            loose[digest] = model_id
    found: Mapping[str, str] = exact or loose
    if len(found) == 1:
        return next(iter(found))
    if found:
        candidates = ", ".join(sorted(found.values()))
        raise Conflict(
            f"The name '{name}' fits more than one model: {candidates}. Use one of these.",
            code="model_ambiguous",
            param="model",
        )
    there_is = ", ".join(sorted(set(known))) or "none yet"
    raise NotFound(
        f"There is no model '{name}'. Known models: {there_is}. "
        "Fetch one with 'hive models pull', or use one of these.",
        code="model_not_found",
        param="model",
    )
