"""What went wrong on the Hub, in one line that a person can act on: which repo, which step, what came, what to do.

Read `explain`. The clients raise many kinds of errors, wrapped in each other; `status_of`, `is_transient` and
`retry_after` look through the wrapping. No message holds a token or the query of a URL (which may be signed).
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from huggingface_hub import constants, get_token, is_offline_mode
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

_TRANSIENT = (408, 409, 412, 429)  # and every 5xx
_BROKEN_OFF = (httpx2.TransportError, ConnectionError, TimeoutError)
_OURS_TO_MEND = (OfflineModeIsEnabled, httpx2.ProxyError, httpx2.UnsupportedProtocol)  # trying again does not help
_TOKEN = re.compile(r"\b(?:hf|hf_oauth|hf_jwt|api_org)_[A-Za-z0-9]{16,}[\w.\-]*|(?<=Bearer )\S+")
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3}) ")  # hf-xet has it in its text only
_LOG_IN = "Log in (hf auth login), or set HF_TOKEN"


class HubError(OSError):
    """A step on the Hub that failed: names repo, step, what came, and the remedy; holds no token.

    Args:
        repo_id: Of the repo.
        step: What was done: "reading config.json".
        what: What came.
        remedy: What to do about it.
        status: The HTTP status, where there is one.
    """

    def __init__(self, repo_id: str, step: str, what: str, remedy: str, *, status: int | None = None) -> None:
        self.repo_id, self.step, self.status = repo_id, step, status
        self._parts = what, remedy
        super().__init__(_clean(f"{repo_id}: {step} failed: {what.rstrip('.')}. {remedy}"))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self.repo_id, self.step, *self._parts, self.status)  # it is sent to other processes


def _rebuilt(repo_id: str, step: str, what: str, remedy: str, status: int | None) -> HubError:
    return HubError(repo_id, step, what, remedy, status=status)


def hub_errors() -> tuple[type[BaseException], ...]:
    """Return what the clients raise when a step on the Hub fails: for `except` around one call of them."""
    return (
        OSError,  # also the builtin ConnectionError of hf-xet, and DatasetNotFoundError
        httpx2.HTTPError,  # also HfHubHTTPError
        EntryNotFoundError,
        RevisionResolutionError,
        HFValidationError,
        json.JSONDecodeError,  # a gateway's HTML where an answer was expected
        RuntimeError,  # "Error while uploading ... to the Hub"
    )


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, None if no answer came."""
    response = _response(error)
    if response is not None:
        return int(response.status_code)
    told = next((match for each in chain(error) if (match := _XET_STATUS.search(str(each)))), None)
    return int(told[1]) if told else None


def request_of(error: BaseException) -> tuple[str, str]:
    """Return method and path of the request that failed, empty where it is not known."""
    for each in chain(error):
        request = getattr(each, "_request", None) or getattr(getattr(each, "response", None), "_request", None)
        if request is not None:
            return str(request.method), str(request.url.path)
    return "", ""


def retry_after(error: BaseException) -> float | None:
    """Return how many seconds the Hub asks to wait: its `Retry-After` (seconds or a date) or exhausted `RateLimit`."""
    response = _response(error)
    if response is None:
        return None
    told = response.headers.get("Retry-After")
    if told is not None:
        try:
            return max(0.0, float(told))  # in this order also 0 for "nan"
        except ValueError:
            return _seconds_until(told)
    limit = re.search(r'"\w+"\s*;\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)', response.headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


def _seconds_until(date: str) -> float | None:
    try:
        moment = parsedate_to_datetime(date)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return max((moment - datetime.now(timezone.utc)).total_seconds(), 0.0)


def is_transient(error: BaseException) -> bool:
    """Return whether the same step may succeed a little later: 408, 409, 412, 429, 5xx, broken connections."""
    if isinstance(error, HubError):
        return error.status is not None and _passes(error.status)
    if is_offline_mode() or _first(error, *_OURS_TO_MEND):
        return False
    status = status_of(error)
    if status is not None:
        return _passes(status)
    cut_off = any("Consistency check failed" in str(each) for each in chain(error))
    return cut_off or _first(error, *_BROKEN_OFF, json.JSONDecodeError, UnicodeDecodeError) is not None


def _passes(status: int) -> bool:
    return status in _TRANSIENT or status >= 500


def told(error: BaseException, *, token: str | None = None) -> str:
    """Return an error's message in one line, without tokens and without the queries of URLs.

    Args:
        error: Any.
        token: One that must not be told, in whatever form it is.
    """
    text = str(error) or type(error).__name__
    if token:
        text = text.replace(token, "hf_***")
    return _clean(text)


def _clean(text: str) -> str:
    token = get_token()
    if token:
        text = text.replace(token, "hf_***")
    text = re.sub(r"(https?://)[^\s/@]+@", r"\1", text)  # user:password@
    text = re.sub(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>]*", r"\1", text)
    return " ".join(_TOKEN.sub("hf_***", text).split())


# ---- the remedies --------------------------------------------------------------------------------------------------


def explain(error: BaseException, repo_id: str, step: str, *, writing: bool = False) -> HubError:
    """Return what to raise (`from None`) for an error of the clients: with repo, step, reason and remedy.

    Args:
        error: What a client raised.
        repo_id: Of the repo.
        step: What was done: "reading config.json", "uploading the data".
        writing: Whether it was to change the repo.
    """
    if isinstance(error, HubError):
        return error
    status = status_of(error)
    what, remedy = _of_kind(error, repo_id) or _of_status(error, status, repo_id, writing) or _of_machine(error)
    return HubError(repo_id, step, what, remedy, status=status)


def _of_kind(error: BaseException, repo_id: str) -> tuple[str, str] | None:
    """Return reason and remedy of what the clients have a class for."""
    unreachable = _first(error, LocalEntryNotFoundError, RevisionResolutionError, *_BROKEN_OFF) is not None
    if _first(error, OfflineModeIsEnabled) or (is_offline_mode() and unreachable):
        return "HF_HUB_OFFLINE is set, and it is not in the cache", "Unset HF_HUB_OFFLINE, or load it once before"
    page = _page(error, repo_id)
    if _first(error, GatedRepoError):
        return (
            "access to this repo must be granted",
            f"Ask for access at {page}; then log in with that account (hf auth login), or set HF_TOKEN",
        )
    if _first(error, RepositoryNotFoundError):
        return _not_found(error)
    if _first(error, RevisionNotFoundError):
        return "there is no such branch, tag or commit", f"Take one that {page} lists, or none for the main branch"
    if _first(error, DisabledRepoError):
        return "the Hub has disabled this repo", f"See {page}, or take another one"
    if _first(error, HFValidationError):
        return told(error), 'Give a repo id, "user/name", or a folder that exists'
    if _first(error, EntryNotFoundError) and status_of(error) == 404:
        return "the repo has no such file at this revision", f"Look at {page} for what it has"
    return None


def _not_found(error: BaseException) -> tuple[str, str]:
    kind = {"dataset": "data set", "space": "space"}.get(_kind(error), "model")
    log_in = "its token must be allowed to see it" if get_token() else _LOG_IN[0].lower() + _LOG_IN[1:]
    return (
        f"there is no {kind} of this name, or it is private and not open to {'this login' if get_token() else 'you'}",
        f"Check the name, and that it is a {kind}'s; for a private one {log_in}",
    )


def _of_status(error: BaseException, status: int | None, repo_id: str, writing: bool) -> tuple[str, str] | None:
    """Return reason and remedy of an HTTP status."""
    if status is None:
        return None
    came = f"the Hub answered {status} ({_answer(error)})"
    wait = retry_after(error)
    later = "Try again " + ("later" if wait is None else f"in {wait:.0f} seconds") + f"; {_kept(writing)}"
    if status == 401:
        unknown = get_token() or "Invalid credentials" in _answer(error)
        return ("the Hub does not know the token" if unknown else "no token was given"), _LOG_IN
    if status == 403:
        allowed = "write to" if writing else "read"
        return (
            f"the token must not {allowed} it ({_answer(error)})",
            f"Log in with one that may {allowed} {repo_id}: hf auth login, or set HF_TOKEN",
        )
    if status in (409, 412):
        return "the repo was changed by someone else meanwhile", f"Run it again; {_kept(writing)}"
    if status == 404:
        return "the Hub has not what was asked for", f"Check the name and the revision at {_page(error, repo_id)}"
    if status == 413:
        return came, "Send smaller files"
    return (came, later) if _passes(status) else (came, "Correct what it names")


def _of_machine(error: BaseException) -> tuple[str, str]:
    """Return reason and remedy of what happened on this machine, or on the way."""
    what, number = told(error), getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return what, f"Free some space in {constants.HF_HOME}, or let HF_HOME name another folder"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return what, "The folder must be writable; HF_HOME can name another one for the cache"
    if isinstance(error, (LocalEntryNotFoundError, RevisionResolutionError)):
        return "the Hub does not answer, and it is not in the cache", "Check the connection and try again"
    if is_transient(error) or _first(error, *_BROKEN_OFF):
        return (
            f"the connection to the Hub broke off ({what})",
            "Check the connection and try again; what is done is kept",
        )
    return what, "Try again; if it stays, check the name, the files and the login"


def _kept(writing: bool) -> str:
    return "what was sent is kept" if writing else "what was downloaded is kept"


# ---- looking into an error -----------------------------------------------------------------------------------------


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, then what it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _first(error: BaseException, *kinds: type[BaseException]) -> BaseException | None:
    return next((each for each in chain(error) if isinstance(each, kinds)), None)


def _answer(error: BaseException) -> str:
    """Return what the Hub said, in its own words if it found any."""
    refused = _first(error, HfHubHTTPError)
    text = getattr(refused, "server_message", None) or getattr(_response(error), "reason_phrase", "")
    return _clean(str(text or "")) or told(refused or error)


def _response(error: BaseException) -> Any:
    found = (getattr(each, "response", None) for each in chain(error))
    return next((response for response in found if getattr(response, "status_code", None) is not None), None)


def _kind(error: BaseException) -> str:
    """Return "model", "dataset" or "space": what was asked for, by the URL."""
    response = _response(error)
    url = str(getattr(response, "url", "") or "") if response is not None else ""
    match = re.search(r"/(dataset|space)s/", url)
    return match[1] if match else "model"


def _page(error: BaseException, repo_id: str) -> str:
    kind = _kind(error)
    return f"{constants.ENDPOINT}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
