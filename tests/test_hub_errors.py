"""`hub_errors`: every failure names repo, step and remedy, holds no token, and says whether to try again."""

import errno
import json
import pickle
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import httpx2
import pytest
from hub.server import as_json, failure
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from hf_mimic import hub_errors
from hf_mimic.hub_errors import HubError, explain, is_transient, retry_after, status_of, told

TOKEN = "hf_" + "aB3" * 11


def http_error(status, url="https://huggingface.co/api/models/user/model", message="no", **headers):
    response = httpx2.Response(status, headers=headers, request=httpx2.Request("GET", url))
    return HfHubHTTPError(message, response=response, server_message=message)


def raised(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except hub_errors.hub_errors() as error:
        return error
    raise AssertionError("nothing was raised")


def wrapped(inner, outer=None):
    """Return an error raised from another one, as the clients wrap them."""
    try:
        try:
            raise inner
        except type(inner) as error:
            raise (outer or RuntimeError("Error while uploading 'data.parquet' to the Hub.")) from error
    except (RuntimeError, OSError, ValueError) as error:
        return error


def test_an_error_names_repo_step_reason_and_remedy_and_survives_pickling():
    error = HubError("user/model", "reading config.json", "it is not there.", "Look again", status=404)
    assert str(error) == "user/model: reading config.json failed: it is not there. Look again"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.repo_id, again.step, again.status) == (str(error), error.repo_id, error.step, 404)
    assert explain(error, "other/repo", "something else") is error


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("RepoNotFound", 404, r"no model of this name, or it is private.*log in \(hf auth login\), or set HF_TOKEN"),
        ("RepoNotFound", 401, r"no model of this name, or it is private.*log in \(hf auth login\), or set HF_TOKEN"),
        ("GatedRepo", 403, r"must be granted\. Ask for access at http://127.0.0.1:\d+/user/refused.*hf auth login"),
        ("RevisionNotFound", 404, r"no such branch, tag or commit\. Take one that http.*/user/refused lists"),
        ("EntryNotFound", 404, r"no such file at this revision\. Look at http.*/user/refused"),
        ("", 401, r"no token was given\. Log in \(hf auth login\), or set HF_TOKEN"),
        ("", 403, r"the token must not read it .*Log in with one that may read user/refused"),
        ("", 404, r"has not what was asked for\. Check the name and the revision"),
    ],
)
def test_refusals_of_the_hub(hub, code, status, expected):
    hub.faults.append(lambda request: failure(status, code, "no"))
    error = raised(HfApi().model_info, "user/refused")
    explained = explain(error, "user/refused", "looking up the revision")
    assert explained.status == status
    with pytest.raises(HubError, match=rf"^user/refused: looking up the revision failed: .*{expected}"):
        raise explained


def test_a_token_that_is_there_changes_the_remedy(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.faults.append(lambda request: failure(401, "", "Invalid credentials in Authorization header"))
    assert "the Hub does not know the token" in str(explain(raised(HfApi().whoami), "user/model", "logging in"))
    hub.faults[:] = [lambda request: failure(404, "RepoNotFound", "no")]
    text = str(explain(raised(HfApi().dataset_info, "user/rows"), "user/rows", "reading the card"))
    assert "no data set of this name" in text
    assert "its token must be allowed to see it" in text


def test_the_words_of_the_hub_are_told_not_those_of_the_client(hub):
    hub.faults.append(lambda request: failure(422, "", "the card has no license"))
    text = str(explain(raised(HfApi().model_info, "user/x"), "user/x", "committing"))
    assert text == ("user/x: committing failed: the Hub answered 422 (the card has no license). Correct what it names")


def test_writing_with_a_token_that_only_reads():
    text = str(explain(wrapped(http_error(403, message="read-only")), "user/rows", "uploading the data", writing=True))
    assert "must not write to it (read-only). Log in with one that may write to user/rows" in text


@pytest.mark.parametrize("status", [408, 409, 412, 429, 500, 502, 503, 504])
def test_what_passes_is_told_and_may_be_tried_again(status):
    error = wrapped(http_error(status))
    assert is_transient(error)
    assert status_of(error) == status
    text = str(explain(error, "user/rows", "committing", writing=True))
    assert "again" in text
    assert "what was sent is kept" in text


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 416])
def test_what_does_not_pass(status):
    assert not is_transient(http_error(status))
    assert "Try again" not in str(explain(http_error(status), "user/rows", "committing", writing=True))


def test_broken_connections_are_transient_and_broken_disks_are_not():
    for error in (
        httpx2.ReadError("reset"),
        httpx2.ConnectTimeout("slow"),
        httpx2.RemoteProtocolError("cut"),
        ConnectionError("Network error: ..."),
        TimeoutError("slow"),
        wrapped(httpx2.ReadError("reset")),
        OSError("Consistency check failed: file should be of size 10 but has size 5"),
        json.JSONDecodeError("Expecting value", "<html>", 0),
    ):
        assert is_transient(error), error
    for error in (OSError(errno.ENOSPC, "No space left on device"), PermissionError("no"), RuntimeError("other")):
        assert not is_transient(error), error
    assert not is_transient(httpx2.ProxyError("no proxy"))
    assert not is_transient(OfflineModeIsEnabled("offline"))


def test_an_explained_error_still_says_whether_it_passes():
    assert is_transient(explain(http_error(503), "user/rows", "committing"))
    assert not is_transient(explain(http_error(403), "user/rows", "committing"))


def test_seconds_to_wait():
    assert retry_after(wrapped(http_error(429, **{"Retry-After": "7"}))) == 7
    assert retry_after(http_error(429, RateLimit='"api";r=0;t=55')) == 55
    assert retry_after(http_error(429, RateLimit='"api";r=3;t=55')) is None
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=100), usegmt=True)
    assert 90 < retry_after(http_error(503, **{"Retry-After": date})) <= 100
    assert retry_after(http_error(503, **{"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})) == 0
    assert retry_after(http_error(503, **{"Retry-After": "soon"})) is None
    assert retry_after(http_error(429, **{"Retry-After": "nan"})) == 0
    assert retry_after(ValueError("no answer at all")) is None
    assert "in 55 seconds" in str(explain(http_error(429, RateLimit='"api";r=0;t=55'), "user/rows", "committing"))


def test_no_token_and_no_query_is_told(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "an-organisation's-own")
    text = told(
        OSError(
            f"Bearer abc.def refused\nfor {TOKEN} hf_oauth_{'x1' * 20} s3cret an-organisation's-own\n"
            "at https://user:word@host/a/b?X-Signature=abc&y=1 in me/hf_mimic_vit-base-patch16 with hf_transfer"
        ),
        token="s3cret",
    )
    assert text == (
        "Bearer hf_*** refused for hf_*** hf_*** hf_*** hf_*** at https://host/a/b in me/hf_mimic_vit-base-patch16 with "
        "hf_transfer"
    )
    explained = explain(http_error(400, message=f"bad {TOKEN} at https://host/x?sig=1"), "user/rows", "committing")
    assert TOKEN not in repr(explained) + pickle.dumps(explained).decode("latin-1")
    assert "sig" not in str(explained)


def test_offline(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for function, args in ((HfApi().model_info, ("user/x",)), (hf_hub_download, ("user/x", "config.json"))):
        error = raised(function, *args)
        assert not is_transient(error)
        assert "HF_HUB_OFFLINE is set, and it is not in the cache. Unset" in str(explain(error, "user/x", "reading"))
    assert hub.log == []


def test_the_hub_is_down_and_nothing_is_cached(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.faults.append(lambda request: failure(503, "", "out of order"))
    error = raised(hf_hub_download, "user/down", "config.json")
    assert isinstance(error, LocalEntryNotFoundError)
    assert is_transient(error)
    assert "Try again later; what was downloaded is kept" in str(explain(error, "user/down", "reading config.json"))


def test_this_machine():
    full, closed = OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "Permission denied")
    assert "Free some space in" in str(explain(full, "user/x", "reading"))
    assert "must be writable; HF_HOME can name" in str(explain(closed, "user/x", "reading"))
    assert "connection to the Hub broke off (reset)" in str(explain(httpx2.ReadError("reset"), "user/x", "reading"))
    assert '"user/name", or a folder' in str(explain(HFValidationError("bad id"), "a/b/c", "reading"))
    assert "something. Try again; if it stays" in str(explain(RuntimeError("something"), "user/x", "reading"))


def test_an_error_that_was_raised_from_none_tells_nothing_of_what_it_hides():
    hiding = wrapped(http_error(503), ValueError("other"))
    hiding.__cause__, hiding.__suppress_context__ = None, True
    assert status_of(hiding) is None
    hiding.__suppress_context__ = False
    assert status_of(hiding) == 503


def test_an_answer_that_is_no_json(hub):
    def html(request):
        response = as_json({})
        response.body = b"<html>"
        return response

    hub.faults.append(html)
    assert is_transient(raised(HfApi().model_info, "user/html"))
