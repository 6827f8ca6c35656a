"""What is written to the Hub: all files of a publication in one commit, repeated until it is there or cannot be.

Read `publish`. Nothing is visible before the commit; files that the Hub has already are not sent again, so that an
interrupted publication goes on where it was, and one that is repeated sends nothing.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from hf_mimic.hub_errors import HubError, explain, hub_errors, is_transient, request_of, retry_after, status_of, told
from hf_mimic.hub_files import verify

CARD = "README.md"
_FAILURES, _CONFLICTS = 5, 25  # that are tried again, of a Hub that fails and of others who publish meanwhile
_LONGEST = 300  # seconds that a Hub may ask us to wait; the window of its rate limits
_RAISED: tuple[type[BaseException], ...] = (*hub_errors(), ValueError)  # also for an answer that is no JSON
_STEPS = {  # part of an address: what is done there
    "/repos/create": "create the repo",
    "/validate-yaml": "check the card",
    "/preupload/": "preupload",
    "/objects/batch": "LFS batch",
    "/verify": "verify an upload",
    "/commit/": "commit",
}
logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Destination:
    """Where a publication goes.

    Args:
        repo_id: "user/name", or "name" for the user of the token.
        repo_type: "dataset" or "model".
        revision: Branch; made if it is not there. By default main.
        create_pr: Open a pull request instead of writing to the branch.
        private: Whether a repo that is made is private; of one that is there, True asks that it is.
        token: By default the one that `hf auth login` stored, or HF_TOKEN.
    """

    repo_id: str
    repo_type: str = "dataset"
    revision: str | None = None
    create_pr: bool = False
    private: bool | None = None
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Present:
    """What a branch holds before a commit.

    Args:
        repo_id: With its namespace, and as the Hub calls it now.
        commit: Its id.
        paths: Of its files.
        card: Its README.md, None if there is none.
    """

    repo_id: str
    commit: str
    paths: frozenset[str]
    card: str | None


@dataclass(frozen=True)
class Contents:
    """The files of a publication.

    Args:
        files: Path in the repo to a local file or bytes.
        stale: Paths of the repo that they replace.
    """

    files: Mapping[str, Path | bytes]
    stale: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Published:
    """Where a publication is.

    Args:
        repo_id: With its namespace.
        url: Of the repo, or of the pull request.
        commit: Id of the commit that holds it.
        changed: Whether something was committed; False if all of it was there.
    """

    repo_id: str
    url: str
    commit: str
    changed: bool


def publish(to: Destination, contents: Callable[[Present], Contents], *, message: str) -> Published:
    """Commit files to a repo, which is made if it is not there.

    Conflicts with others who commit (409, 412), limits (429), failures (5xx) and broken connections are waited for and tried
    again, with what the branch holds then.

    Args:
        to: Where they go.
        contents: What the branch holds -> what is to be committed on top of it.
        message: Of the commit; the title of the pull request.

    Raises:
        HubError: If it cannot be published; names the repo, the step and what to do. The branch is as it was.
        ValueError: If the destination contradicts itself, or a repo that should be private is public.
    """
    if to.create_pr and to.revision not in (None, "main"):
        raise ValueError(
            f"`create_pr` must go to main, got the revision {to.revision!r}. Leave one of the two out: a pull request "
            "has a branch of its own."
        )
    if re.fullmatch("[0-9a-f]{40}", to.revision or ""):
        raise ValueError(
            f"`revision` must be a branch to write to, got the commit {to.revision}. Name a branch, or none."
        )
    api = HfApi(token=to.token, library_name="hf_mimic")
    retries = _Retries(to)
    repo_id, private = retries.until_done("open the repo", lambda: _open(api, to))
    if to.private and not private:
        raise ValueError(
            f"{repo_id} must be private, got a public repo. Make it private in its settings first, or choose another name."
        )
    first = None
    while True:
        present = retries.until_done("read the branch", lambda: _present(api, repo_id, to))
        first = first or present.commit
        operations = _operations(contents(present), present)
        known = retries.until_done("list pull requests", lambda: _pull_requests(api, repo_id, to, message))
        try:
            info = api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                repo_type=to.repo_type,
                revision=to.revision,
                create_pr=to.create_pr,
                parent_commit=present.commit,
            )
        except _RAISED as error:
            retries.wait(error, "commit")
            opened = (
                retries.until_done("list pull requests", lambda: _pull_requests(api, repo_id, to, message)) - known
            )
            if opened:  # the answer was lost, not the pull request
                return _of_pull_request(api, repo_id, to, max(opened))
            continue
        url = info.pr_url or f"{api.endpoint}/{'' if to.repo_type == 'model' else to.repo_type + 's/'}{repo_id}"
        return Published(repo_id, url, info.oid, changed=info.oid != first)


def _open(api: HfApi, to: Destination) -> tuple[str, bool]:
    """Return the full id of the repo, which is made if it is not there, with its branch; and whether it is private."""
    try:
        info: Any = api.repo_info(to.repo_id, repo_type=to.repo_type)
    except RepositoryNotFoundError:
        info = None
    if info is None:  # NOTE: with exist_ok=True a 409 without "url" is a KeyError of the client
        repo_id = api.create_repo(to.repo_id, repo_type=to.repo_type, private=to.private).repo_id
    else:
        repo_id = str(info.id)
    if to.revision is not None and to.revision != "main" and not to.revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=to.revision, repo_type=to.repo_type, exist_ok=True)
    return repo_id, info is None or bool(info.private)


def _present(api: HfApi, repo_id: str, to: Destination) -> Present:
    commit = str(api.repo_info(repo_id, repo_type=to.repo_type, revision=to.revision).sha)
    paths = frozenset(api.list_repo_files(repo_id, repo_type=to.repo_type, revision=commit))
    card = None
    if CARD in paths:
        file = Path(api.hf_hub_download(repo_id, CARD, repo_type=to.repo_type, revision=commit))
        try:
            card = verify(file, token=to.token).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise HubError(
                repo_id, f"reading {CARD}", f"it must be UTF-8, got {error}", "Correct or delete it, and publish again"
            ) from None
    return Present(repo_id, commit, paths, card)


def _operations(contents: Contents, present: Present) -> list[Any]:
    """Return fresh operations: the client keeps in them what it found on the branch."""
    stale = sorted((contents.stale & present.paths) - contents.files.keys())
    added = [
        CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
        for path, content in sorted(contents.files.items())
    ]
    return [*added, *(CommitOperationDelete(path) for path in stale)]


def _pull_requests(api: HfApi, repo_id: str, to: Destination, title: str) -> set[int]:
    """Return the numbers of the open pull requests with this title, if one is to be opened."""
    if not to.create_pr:
        return set()
    found = api.get_repo_discussions(
        repo_id, repo_type=to.repo_type, discussion_type="pull_request", discussion_status="open"
    )
    return {discussion.num for discussion in found if discussion.title == title}


def _of_pull_request(api: HfApi, repo_id: str, to: Destination, number: int) -> Published:
    details = api.get_discussion_details(repo_id, number, repo_type=to.repo_type)
    commit = api.repo_info(repo_id, repo_type=to.repo_type, revision=f"refs/pr/{number}").sha
    return Published(repo_id, details.url, str(commit), changed=True)


class _Retries:
    """How often a publication has met what passes, and how long to wait."""

    def __init__(self, to: Destination) -> None:
        self.to = to
        self.failures = self.conflicts = 0

    def until_done(self, step: str, do: Callable[[], _T]) -> _T:
        """Return what a step returns; it may be tried several times."""
        while True:
            try:
                return do()
            except _RAISED as error:
                self.wait(error, step)

    def wait(self, error: BaseException, step: str) -> None:
        """Wait before the next attempt.

        Raises:
            HubError: If it would not help.
        """
        conflict = status_of(error) in (409, 412)
        self.conflicts += conflict
        self.failures += not conflict
        asked = retry_after(error)
        passes = is_transient(error)
        if not passes or self.failures > _FAILURES or self.conflicts > _CONFLICTS or (asked or 0) > _LONGEST:
            raise explain(
                error, self.to.repo_id, _step(error, step), writing=True
            ) from None  # the cause may show a token
        if asked is None:
            asked = (
                random.uniform(0.05, 0.2 * min(self.conflicts, 10))
                if conflict
                else min(2.0 ** (self.failures - 1), 30)
            )
        what = told(error, token=self.to.token)
        logger.warning("%s: %s failed (%s); again in %.1f s", self.to.repo_id, _step(error, step), what, asked)
        time.sleep(asked)


def _step(error: BaseException, step: str) -> str:
    """Return which of the requests of a step failed, if the error tells."""
    method, url = request_of(error)
    if method == "PUT":
        return "upload a file"
    return next((name for part, name in _STEPS.items() if part in url), step)
