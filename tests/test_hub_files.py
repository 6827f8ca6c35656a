"""`pin`, `find_file` and `verify`: one commit for all files, no request too many, and no wrong bytes."""

import json
import threading
from pathlib import Path

import pytest
from hub.server import failure
from huggingface_hub import constants

from hf_mimic import hub_files
from hf_mimic.hub_errors import HubError
from hf_mimic.hub_files import find_file, has_file, on_hub, pin, verify

COMMIT = "0123456789" * 4


@pytest.fixture
def pauses(monkeypatch):
    """Return the seconds that would have been waited, by us or by the client."""
    waited = []
    monkeypatch.setattr("hf_mimic.hub_files.time.sleep", waited.append)
    return waited


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def down(request):
    return failure(503, "", "out of order")


def garble(path, times):
    """Return a fault: the right number of wrong bytes, so many times."""

    def fault(request):
        if request.method != "GET" or not request.path.endswith(path) or not times:
            return None
        times.pop()
        content = b"x" * 24
        return type(failure(200, "", ""))(200, content, {"X-Repo-Commit": COMMIT, "ETag": '"x"'})

    return fault


# ---- pin -----------------------------------------------------------------------------------------------------------


def test_a_branch_is_pinned_by_one_request_and_a_commit_by_none(hub):
    repo = hub.create("user/pinned")
    first = repo.commit({"config.json": b"{}"})
    head = repo.commit({"config.json": b"[]"})
    repo.refs["v1"] = first
    assert pin("user/pinned") == pin("user/pinned", "main") == head
    assert pin("user/pinned", "v1") == first
    hub.clear_log()
    assert pin("user/pinned", first) == first
    assert hub.log == []
    assert pin("user/pinned") == head
    assert len(hub.log) == 1


def test_nothing_is_pinned_off_the_hub(tmp_path):
    assert pin(tmp_path) is pin(str(tmp_path), "main") is pin({}) is pin(None) is None
    assert not on_hub(tmp_path)
    assert not on_hub("./missing")
    assert on_hub("user/repo")
    for path in (Path("missing"), "./missing", "~/missing"):
        with pytest.raises(FileNotFoundError, match=r"must be a Hub repo id or a folder, .*missing does not exist"):
            pin(path)


def test_without_the_hub_the_cache_knows_the_branch(hub, offline, pauses):
    head = hub.create("user/known").commit({"config.json": b"{}"})
    assert pin("user/known") == head
    hub.faults.append(down)
    assert pin("user/known") == head
    assert pauses == []
    offline()
    hub.clear_log()
    assert pin("user/known") == head
    assert hub.log == []


def test_without_the_hub_and_the_cache(hub, offline, pauses):
    hub.faults.append(down)
    with pytest.raises(
        HubError, match=r"^user/unknown: looking up main failed: the Hub answered 503.*Try again later"
    ):
        pin("user/unknown", "main")
    assert pauses == [1, 2, 4]
    offline()
    with pytest.raises(HubError, match=r"looking up the main branch failed: HF_HUB_OFFLINE is set.*Unset"):
        pin("user/unknown")


def test_a_hub_that_fails_once_is_asked_again_after_the_time_that_it_names(hub, pauses):
    head = hub.create("user/flaky").commit({"config.json": b"{}"})
    answers = [failure(429, "", "slow down", **{"Retry-After": "9"}), down(None)]
    hub.faults.append(lambda request: answers.pop() if answers else None)
    assert pin("user/flaky") == head
    assert pauses == [1, 9]


def test_a_hub_that_does_not_answer(hub, pauses, monkeypatch):
    head = hub.create("user/silent").commit({"config.json": b"{}"})
    assert pin("user/silent") == head
    answer = threading.Event()
    hub.faults.append(lambda request: answer.wait(20) and None)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    try:
        assert pin("user/silent") == head  # from the cache
        with pytest.raises(
            HubError, match=r"looking up v1 failed: the Hub does not answer, and it is not in the cache"
        ):
            pin("user/silent", "v1")
    finally:
        answer.set()


def test_a_repo_of_another_type(hub):
    hub.create("user/rows", "datasets").commit({"README.md": b"rows"})
    with pytest.raises(HubError, match=r"user/rows: .* it is a data set, not a model\. Give the repo of a model"):
        pin("user/rows")
    assert pin("user/rows", repo_type="dataset")
    with pytest.raises(HubError, match="there is no model of this name, or it is private"):
        pin("user/neither")


def test_what_is_no_repo_id():
    with pytest.raises(HubError, match='Give a repo id, "user/name", or a folder that exists'):
        pin("a/b/c")


# ---- find_file -----------------------------------------------------------------------------------------------------


def test_a_file_at_a_commit_is_asked_for_once_and_so_is_one_that_is_missing(hub):
    commit = hub.create("user/once").commit({"config.json": b"{}"})
    for _ in range(2):
        assert find_file("user/once", "config.json", commit).read_bytes() == b"{}"
        assert find_file("user/once", "index.json", commit) is None
    assert [request.method for request in hub.log] == ["HEAD", "GET", "HEAD"]


def test_a_file_of_a_data_set(hub):
    hub.create("user/rows", "datasets").commit({"README.md": b"rows"})
    assert find_file("user/rows", "README.md", None, repo_type="dataset").read_bytes() == b"rows"


def test_files_offline(hub, offline):
    commit = hub.create("user/offline").commit({"config.json": b"{}", "other.json": b"{}"})
    find_file("user/offline", "config.json", "main")
    offline()
    hub.clear_log()
    assert find_file("user/offline", "config.json", "main").read_bytes() == b"{}"
    assert find_file("user/offline", "other.json", commit) is None
    assert not has_file("user/offline", "other.json", commit)
    assert hub.log == []


def test_a_gated_and_a_private_repo(hub):
    hub.create("user/gated").commit({"config.json": b"{}"})
    hub.faults.append(lambda r: failure(403, "GatedRepo", "restricted") if "/resolve/" in r.path else None)
    with pytest.raises(HubError, match=r"^user/gated: reading config.json failed: .*Ask for access at http"):
        find_file("user/gated", "config.json", None)
    with pytest.raises(HubError, match=r"^user/gated: looking for pytorch_model.bin failed: .*Ask for access"):
        has_file("user/gated", "pytorch_model.bin", None)
    assert not [request for request in hub.log if request.path.startswith("/api/datasets")]
    hub.faults[:] = [lambda r: failure(401, "RepoNotFound", "Repository not found")]
    with pytest.raises(HubError, match=r"private and not open to you\. .*for a private one log in"):
        find_file("user/gated", "config.json", None)


# ---- verify --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_wrong_bytes_are_downloaded_again(hub, name):
    right = json.dumps({"right": "bytes"}).encode().ljust(24)
    hub.create("user/garbled-once").commit({name: right})
    hub.faults.append(garble(name, [1]))
    path = find_file("user/garbled-once", name, None)
    assert path.read_bytes() == right
    assert hub.downloads("user/garbled-once") == [name, name]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_bytes_that_stay_wrong_are_refused_and_not_kept(hub, name):
    right, repo = b"r" * 24, hub.create(f"user/garbled-{len(name)}")
    repo.commit({name: right})
    hub.faults.append(garble(name, [1, 2]))
    with pytest.raises(
        HubError, match=rf"verifying {name} failed: its hash must be \w+, got \w+, also after a second"
    ):
        find_file(repo.id, name, None)
    assert find_file(repo.id, name, None).read_bytes() == right


def test_a_cache_that_is_damaged_is_repaired(hub, pauses):
    commit = hub.create("user/damaged").commit({"model.safetensors": b"r" * 24})
    path = find_file("user/damaged", "model.safetensors", commit)
    path.resolve().write_bytes(b"w" * 24)
    assert find_file("user/damaged", "model.safetensors", commit).read_bytes() == b"r" * 24
    path.resolve().write_bytes(b"w" * 24)
    hub.faults.append(down)
    with pytest.raises(
        HubError, match=r"downloading model.safetensors again, which was damaged in the cache, failed: .* 503"
    ):
        find_file("user/damaged", "model.safetensors", commit)
    assert not path.exists()


def test_what_was_verified_is_not_hashed_again(hub, monkeypatch):
    commit = hub.create("user/hashed").commit({"model.safetensors": b"r" * 24})
    find_file("user/hashed", "model.safetensors", commit)
    monkeypatch.setattr(hub_files, "_hash", None)
    assert find_file("user/hashed", "model.safetensors", commit).read_bytes() == b"r" * 24


def test_a_cache_without_links(hub, offline, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    hub.create("user/linkless").commit({"config.json": b"r" * 24, "model.safetensors": b"r" * 24})
    for name in ("config.json", "model.safetensors"):
        hub.faults[:] = [garble(name, [1])]
        path = find_file("user/linkless", name, None)
        assert not path.is_symlink()
        assert path.read_bytes() == b"r" * 24
    path.write_bytes(b"w" * 24)
    offline()  # no one to ask what it should be
    assert verify(path) == path


def test_files_that_are_not_in_the_cache_are_not_verified(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")
    assert verify(path) == path


def test_another_process_may_have_repaired_it_meanwhile(hub, monkeypatch):
    commit = hub.create("user/raced").commit({"model.safetensors": b"r" * 24})
    path = find_file("user/raced", "model.safetensors", commit)
    path.resolve().write_bytes(b"w" * 24)
    hashed = hub_files._hash

    def slow(file, like):
        found = hashed(file, like)
        monkeypatch.setattr(hub_files, "_hash", hashed)
        blob = path.resolve()
        fresh = blob.with_name("fresh")
        fresh.write_bytes(b"r" * 24)
        fresh.replace(blob)
        return found

    monkeypatch.setattr(hub_files, "_hash", slow)
    hub.clear_log()
    assert verify(path).read_bytes() == b"r" * 24
    assert hub.log == []
