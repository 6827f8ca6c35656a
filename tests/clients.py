"""What tests ask of the Hub's clients, in a line: a commit of a few files, and the status that a call fails with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError


def put(api: HfApi, repo_id: str, files: Mapping[str, bytes], **options: Any) -> CommitInfo:
    """Commit these files; options are those of `create_commit`."""
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(repo_id, operations, commit_message="put", **options)


def status_of(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[int, str | None]:
    """Return the status that a call fails with, and what the Hub says."""
    try:
        call(*args, **options)
    except HfHubHTTPError as error:
        return error.response.status_code, error.response.headers.get("x-error-message")
    raise AssertionError(f"{call} did not fail")
