"""What a hub says about a repository, asked through huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from hive_agent.models.cache import COMMIT, ETAG
from hive_agent.models.references import is_repo, is_safe_path
from operations.errors import Forbidden, HiveError, NotFound, Unauthorized, Unavailable
from operations.hosts import VERSION

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile, RepoSibling

TIMEOUT_S = 10.0
BRANCH = "main"
_LOGIN = "log in with 'hf auth login' or set HF_TOKEN for the hive agent"


@dataclass(frozen=True)
class HubFile:
    """:param path: in the repository
    :param size: bytes
    :param etag: SHA-256 or git id in hex; the name of the blob in the cache
    """

    path: str
    size: int
    etag: str


@dataclass(frozen=True)
class Listing:
    """A repository at this moment.

    :param endpoint: the hub's URL
    :param repo: as the hub spells it
    :param commit: what ``main`` points to
    """

    endpoint: str
    repo: str
    commit: str
    files: dict[str, HubFile]

    def url(self, path: str) -> str:
        return f"{self.endpoint}/{self.repo}/resolve/{self.commit}/{quote(path)}"


class Metadata:
    """A hub's API. All methods block: they are for use in a thread.

    :param endpoint: None for huggingface_hub's default (``HF_ENDPOINT``)
    :param token: None for the stored one
    """

    def __init__(self, endpoint: str | None, token: str | None) -> None:
        self._endpoint = endpoint
        self._token = token

    def listing(self, repo: str) -> Listing:
        """Which files the repository has, and at which commit.

        :raises NotFound: there is none, or none that our token may see
        :raises Unauthorized: the hub refuses our token, or wants one
        :raises Unavailable: the hub cannot be reached or talks nonsense; ``HF_HUB_OFFLINE`` is set
        """
        from huggingface_hub.hf_api import RepoFile

        api = self._api()
        with _translating(repo, api.endpoint):
            info = api.model_info(
                repo, revision=BRANCH, files_metadata=True, timeout=TIMEOUT_S, token=self._token
            )
            files = [_from_sibling(sibling) for sibling in info.siblings or []]
            if None in files:  # a mirror that knows sizes and hashes only by the tree
                tree = api.list_repo_tree(repo, recursive=True, revision=info.sha)
                files = [_from_tree(entry) for entry in tree if isinstance(entry, RepoFile)]
        if info.sha is None or not COMMIT.fullmatch(info.sha):
            raise _nonsense(api.endpoint)
        same = is_repo(str(info.id)) and str(info.id).lower() == repo.lower()
        return Listing(
            endpoint=api.endpoint,
            repo=str(info.id) if same else repo,
            commit=info.sha,
            files={file.path: file for file in files if file is not None and _is_sane(file)},
        )

    def check_access(self, listing: Listing, path: str) -> None:
        """Whether we may have the files: listings of gated repositories are public.

        :raises Forbidden: the licence was not accepted
        :raises HiveError: as :meth:`listing`
        """
        from huggingface_hub import get_hf_file_metadata

        with _translating(listing.repo, listing.endpoint):
            get_hf_file_metadata(
                listing.url(path), headers=self.headers(), token=False, timeout=TIMEOUT_S
            )

    def headers(self) -> dict[str, str]:
        """What a request for a file's bytes carries. Holds the token: never to be logged."""
        from huggingface_hub import constants, get_token

        token = self._token
        if token is None and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
            token = get_token()
        agent = {"user-agent": f"hive/{VERSION}"}  # lower case, as huggingface_hub merges them
        return {**agent, "authorization": f"Bearer {token}"} if token else agent

    def _api(self) -> HfApi:
        from huggingface_hub import HfApi, constants

        # Says nothing about this machine, and asks huggingface.co nothing where a mirror is set.
        constants.HF_HUB_DISABLE_TELEMETRY = True
        return HfApi(self._endpoint, self._token, library_name="hive", library_version=VERSION)


def _from_sibling(sibling: RepoSibling) -> HubFile | None:
    if sibling.lfs is not None:
        return HubFile(sibling.rfilename, sibling.lfs.size, sibling.lfs.sha256)
    if sibling.size is None or sibling.blob_id is None:
        return None
    return HubFile(sibling.rfilename, sibling.size, sibling.blob_id)


def _from_tree(entry: RepoFile) -> HubFile:
    if entry.lfs is not None:
        return HubFile(entry.path, entry.lfs.size, entry.lfs.sha256)
    return HubFile(entry.path, entry.size, entry.blob_id)


def _is_sane(file: HubFile) -> bool:
    """Names and hashes become paths on this disk, and sizes sums."""
    return (
        isinstance(file.path, str)
        and is_safe_path(file.path)
        and isinstance(file.etag, str)
        and ETAG.fullmatch(file.etag) is not None
        and type(file.size) is int
        and 0 <= file.size < 2**60
    )


@contextmanager
def _translating(repo: str, endpoint: str) -> Iterator[None]:
    """Ours for the errors of huggingface_hub, of the HTTP library under it, and of its trust in
    the shape of answers."""
    from huggingface_hub import errors

    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        yield
    except (http_error, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _translated(error, repo, endpoint) from None


def _translated(error: Exception, repo: str, endpoint: str) -> HiveError:
    """The error of ours for one of huggingface_hub's, or of the HTTP library under it."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return Unavailable(
            "HF_HUB_OFFLINE is set, so nothing is fetched. Unset it, or use a model that is there: "
            "'hive models ls'.",
            code="hub_offline",
            retryable=False,
        )
    if isinstance(error, errors.GatedRepoError):
        return Forbidden(
            f"'{repo}' is gated. Accept its licence at {endpoint}/{repo}, then {_LOGIN}.",
            code="model_gated",
            param="model",
        )
    if not isinstance(error, errors.HfHubHTTPError):
        if isinstance(error, ValueError | TypeError | KeyError | AttributeError):
            return _nonsense(endpoint)
        return Unavailable(
            f"The hub {endpoint} cannot be reached ({type(error).__name__}). Check the network "
            "and HF_ENDPOINT, then try again.",
            code="hub_unreachable",
        )
    status = error.response.status_code
    code = error.response.headers.get("X-Error-Code")
    if status == 401 and code not in ("RepoNotFound", "GatedRepo"):
        return Unauthorized(
            f"The hub {endpoint} shows '{repo}' to nobody without a valid token, if it is there at "
            f"all: check the name, or {_LOGIN}.",
            code="hub_unauthorized",
            param="model",
        )
    if status == 404 or isinstance(error, errors.RepositoryNotFoundError):
        return NotFound(
            f"The hub {endpoint} has no '{repo}' that we may see. Check the name; if it is "
            f"private, {_LOGIN}.",
            code="model_not_found",
            param="model",
        )
    if status in (401, 403):
        return Forbidden(
            f"The hub {endpoint} answered {status} for '{repo}': check what the token may read, or "
            f"{_LOGIN}.",
            code="hub_forbidden",
            param="model",
        )
    return Unavailable(
        f"The hub {endpoint} answered {status}. Try again later.",
        code="hub_unavailable",
        retryable=status == 429 or status >= 500,
    )


def _nonsense(endpoint: str) -> Unavailable:
    return Unavailable(
        f"{endpoint} did not answer as a hub does. Check HF_ENDPOINT.",
        code="hub_nonsense",
        retryable=False,
    )
