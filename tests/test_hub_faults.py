"""A Hub that fails: at every step, in every way, a publication is there whole or not at all, and the error says what to do."""

import itertools
import logging
import types

import pytest
from datasets import load_dataset
from publications import rows, scores

from hf_mimic import TrustFilter, load_scores, push_curated_dataset
from hf_mimic.hub_errors import HubError

STEPS = {
    "create": ("POST", "/api/repos/create"),
    "preupload": ("POST", "/preupload/"),
    "LFS batch": ("POST", "/objects/batch"),
    "upload": ("PUT", "/lfs/"),
    "verify": ("POST", "/verify$"),
    "commit": ("POST", "/commit/"),
    "HEAD": ("HEAD", "/resolve/.*README"),
    "GET": ("GET", "/resolve/.*README"),
}
FAULTS = {
    "500": {"status": 500},
    "503": {"status": 503},
    "429": {"status": 429, "headers": {"Retry-After": "7"}},
    "409": {"status": 409},
    "412": {"status": 412},
    "401": {"status": 401},
    "403": {"status": 403},
    "reset": {"reset": True},
    "reset after": {"reset": True, "after": True},
    "truncated": {"truncate": 9},
    "wrong bytes": {"corrupt": True},
}
PASSING = {"500", "503", "429", "409", "412", "reset", "reset after", "truncated"}
WORDS = {
    "create": "create the repo",
    "upload": "upload a file",
    "verify": "verify an upload",
    "HEAD": "read the branch",
}
WORDS |= {"GET": "read the branch"}
UNREADABLE = {"preupload": "commit", "LFS batch": "commit", "GET": "verifying README.md"}  # the error names no request


@pytest.fixture(scope="module")
def table():
    return scores()


@pytest.fixture
def slept(monkeypatch):
    waited = []
    monkeypatch.setattr("hf_mimic.hub.time", types.SimpleNamespace(sleep=waited.append))
    return waited


def push(repo_id, table, **options):
    return push_curated_dataset(rows(), repo_id, scores=table, rule=TrustFilter(), figures=False, **options)


def prepared(hub, repo_id, step):
    """Make what must be there before a step: a repo with a card, for the steps that read it."""
    if step in ("HEAD", "GET"):
        hub.create(repo_id, "datasets").commit({"README.md": b"---\nlicense: mit\n---\n# Theirs\n"})
    elif step != "create":
        hub.create(repo_id, "datasets")


@pytest.mark.parametrize("times", [1, pytest.param(None, marks=pytest.mark.slow)], ids=["once", "always"])
@pytest.mark.parametrize(("step", "fault"), list(itertools.product(STEPS, FAULTS)))
def test_whole_or_not_at_all(hub, api, table, slept, caplog, monkeypatch, step, fault, times):
    caplog.set_level(logging.INFO)
    token = hub.token("user")
    monkeypatch.setenv("HF_TOKEN", token)
    repo_id = f"user/{step}-{fault}-{times}".lower().replace(" ", "-")
    prepared(hub, repo_id, step)
    struck = hub.fail(*STEPS[step], times=times, **FAULTS[fault])
    try:
        done, error = push(repo_id, table), None
    except HubError as raised:
        done, error = None, raised
    assert struck.hits
    if times == 1 and fault in PASSING:
        assert error is None
    hub.clear_log()
    there = hub.repos.get(("datasets", repo_id))
    if error is None:
        assert there.resolve("main").oid == done.commit
        assert load_dataset(repo_id, split="train").num_rows == 24
        assert load_dataset(repo_id, "selection", split="train").num_rows == 30
        assert len(load_scores(repo_id)) == 60
        assert not push(repo_id, table).changed
    else:
        assert there is None or "selection.json" not in there.files
        assert there is None or not [path for path in there.files if path.startswith(("data/", "scores/"))]
        message = str(error)
        assert message.startswith(f"{repo_id}: ")
        words = UNREADABLE if fault == "wrong bytes" and step in UNREADABLE else WORDS
        assert f" {words.get(step, step)} failed: " in message
        assert any(f". {word}" in message for word in ("Try again", "Run it again", "Log in", "Correct", "Check")), (
            message
        )
        assert push(repo_id, table).changed  # once the fault is gone
    texts = [str(error), repr(done), caplog.text, *(str(c, "utf-8", "replace") for c in there_files(hub, repo_id))]
    assert not any(token in text for text in texts)


def there_files(hub, repo_id):
    return [bytes(content) for content in hub.repo(repo_id).files.values()]
