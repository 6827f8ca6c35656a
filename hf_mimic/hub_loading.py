"""Data sets and models that other libraries load from the Hub: what goes wrong there, in the words of `hub_errors`.

Read `loading`. Those libraries tell of a Hub that refuses in many ways, some of which say only that nothing was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from hf_mimic.hub_errors import HubError, chain, hub_errors
from hf_mimic.hub_files import on_hub, pin, refusal

_NO_CONFIG = "Config name is missing"
_STEPS = {"dataset": "loading the data set", "model": "loading the model"}
_REFUSED = (httpx2.HTTPError, ConnectionError, LocalEntryNotFoundError)


@contextmanager
def loading(name: str, *, repo_type: str, revision: str | None = None) -> Iterator[None]:
    """Explain the errors of a Hub that refuses or does not answer; all others pass as they are.

    Args:
        name: Repo id; of a folder or file, every error passes.
        repo_type: "dataset" or "model".
        revision: Branch, tag or commit that is loaded.

    Raises:
        HubError: If there is no such repo or revision, it is closed to this login, or the Hub does not answer.
        ValueError: If a data set has several configurations, and none is named.
    """
    try:
        yield
    except hub_errors() as error:
        if isinstance(error, HubError) or not _is_repo_id(name):
            raise
        if not _is_of_the_hub(error):
            _ask(name, repo_type, revision)
            raise
        first = next((each for each in chain(error) if isinstance(each, HfHubHTTPError)), error)
        raise refusal(first, name, _STEPS[repo_type], repo_type) from None
    except ValueError as error:
        if not str(error).startswith(_NO_CONFIG):
            raise
        listed = str(error).partition("[")[2].partition("]")[0]
        raise ValueError(
            f"{name}: one of its configurations must be named, {listed}, got none. Give it as `dataset_config`."
        ) from None  # four lines of Python


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return on_hub(name)


def _is_of_the_hub(error: BaseException) -> bool:
    """Return whether an error tells that the Hub refused, other than that a repo lacks a file."""
    found = list(chain(error))
    lacks = any(isinstance(each, EntryNotFoundError) and not isinstance(each, _REFUSED[-1]) for each in found)
    return not lacks and any(isinstance(each, _REFUSED) for each in found)


def _ask(name: str, repo_type: str, revision: str | None) -> None:
    """Ask the Hub for a repo; where it refuses, this is why nothing was found.

    Raises:
        HubError: If it refuses.
    """
    if is_offline_mode():
        return
    pin(name, revision, repo_type=repo_type)
    try:
        HfApi().auth_check(name, repo_type=repo_type)
    except hub_errors() as error:
        raise refusal(error, name, _STEPS[repo_type], repo_type) from None
