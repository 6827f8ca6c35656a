"""Whether this login may publish: asked before the work of hours, not after it."""

from __future__ import annotations

from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from hf_mimic.hub_errors import HubError, explain, hub_errors

_STEP = "looking up the login"


def check_may_push(repo_id: str) -> None:
    """Refuse a login that is sure not to be allowed to write a data set; a fine-grained token may still be refused later.

    Args:
        repo_id: Of the data set, which need not be there yet.

    Raises:
        HubError: If nobody is logged in, or this login may not write it.
    """
    api = HfApi()
    try:
        who: dict[str, Any] = api.whoami()
    except hub_errors() as error:
        raise explain(error, repo_id, _STEP, writing=True) from None
    remedy = f"Log in with one that may write to {repo_id}: hf auth login, or set HF_TOKEN"
    if ((who.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise HubError(repo_id, _STEP, "the token may only read", remedy, status=403)
    try:
        api.auth_check(repo_id, repo_type="dataset", write=True)
    except hub_errors() as error:
        missing = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
        if not missing:
            raise explain(error, repo_id, _STEP, writing=True) from None
        names = [who.get("name"), *(each.get("name") for each in who.get("orgs") or [])]
        if "/" in repo_id and repo_id.split("/")[0] not in names:
            what = f"it is not there, and {repo_id.split('/')[0]} is neither this login nor an organization of it"
            raise HubError(repo_id, _STEP, what, f"Take one of {', '.join(map(str, names))}", status=403) from None
