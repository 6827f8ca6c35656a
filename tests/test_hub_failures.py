"""The Hub of the tests when it breaks: every kind of fault, as the real clients meet it."""

import json
import time

import datasets
import httpx2
import pytest
from clients import put, status_of
from hub import Hub
from hub.server import failure
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

LARGE = bytes(range(256)) * 8192  # 2 MB


@pytest.mark.parametrize(
    "options", [{"status": 503}, {"status": 429, "headers": {"Retry-After": "7"}}, {"reset": True}]
)
def test_an_upload_that_fails_once_is_tried_again(hub, api, waits, options):
    repo_id = f"user/once-{options.get('status')}"
    api.create_repo(repo_id)
    fault = hub.fail("PUT", "/lfs/", **options)
    put(api, repo_id, {"w.bin": b"w"})
    assert fault.hits == 1
    assert waits == [8.0 if "headers" in options else 1]
    assert [r.status for r in hub.requests("PUT")] == [options.get("status", 0), 200]


def test_an_upload_that_always_fails(hub, api, waits):
    api.create_repo("user/never")
    fault = hub.fail("PUT", "/lfs/", status=500, times=None)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        put(api, "user/never", {"w.bin": b"w"})
    assert fault.hits == 6
    assert sum(waits) == 23
    assert len(hub.commits("user/never")) == 1


def test_a_commit_fails_before_or_after_it_took_place(hub, api):
    api.create_repo("user/lost")
    for after in (False, True):
        before = len(hub.commits("user/lost"))
        hub.fail("POST", "/commit/main", reset=True, after=after)
        with pytest.raises(httpx2.ReadError, match="reset"):
            put(api, "user/lost", {f"{after}.txt": b"x"})
        assert len(hub.commits("user/lost")) - before == after
        hub.fail("POST", "/commit/main", status=504, after=after)
        assert status_of(put, api, "user/lost", {f"{after}2.txt": b"x"})[0] == 504
        assert len(hub.commits("user/lost")) - before == 2 * after


def test_something_happens_in_between(hub, api):
    repo = hub.create("user/between")
    head = repo.resolve("main").oid
    hub.fail("POST", "/commit/main", call=lambda request: repo.commit({"other.txt": b"theirs"}))
    assert status_of(put, api, "user/between", {"a.txt": b"1"}, parent_commit=head)[0] == 412
    assert [c.title for c in hub.commits("user/between")] == ["initial commit", "Upload"]


def test_skip_and_times(hub, api):
    fault = hub.fail("GET", "/api/models/user/count", status=500, skip=1, times=2)
    hub.create("user/count")
    answers = [get_session().get(f"{hub.url}/api/models/user/count").status_code for _ in range(5)]
    assert answers == [200, 500, 500, 200, 200]
    assert fault.hits == 2


def test_a_download_that_is_cut_goes_on(hub, waits):
    hub.create("user/cut").commit({"w.bin": LARGE})
    hub.fail("GET", "/resolve/", truncate=1_000_000)
    with open(hf_hub_download("user/cut", "w.bin"), "rb") as file:
        assert file.read() == LARGE
    assert len(hub.downloads("user/cut")) == 2


def test_a_short_answer_and_a_wrong_one(hub, waits, tmp_path):
    hub.create("user/wrong").commit({"w.bin": LARGE, "v.bin": LARGE[1:]})
    hub.fail("GET", "w.bin", body=b"short")
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download("user/wrong", "w.bin")
    hub.fail("GET", "v.bin", corrupt=True)
    for forced, equal in ((False, False), (False, False), (True, True)):  # right size: taken, and kept
        with open(hf_hub_download("user/wrong", "v.bin", force_download=forced), "rb") as file:
            content = file.read()
        assert len(content) == len(LARGE) - 1
        assert (content == LARGE[1:]) == equal


def test_a_slow_answer(hub, api):
    hub.create("user/slow")
    hub.fail("GET", "/api/models/user/slow", delay=0.2)
    start = time.monotonic()
    api.model_info("user/slow")
    assert time.monotonic() - start >= 0.2
    assert hub.requests("GET")[0].time >= start


def test_content_that_is_not_what_was_announced(hub):
    hub.create("user/sum")
    url, session = f"{hub.url}/lfs/models/user/sum/{'0' * 64}", get_session()
    headers = {"Authorization": f"Bearer {hub.token('user')}"}
    assert session.put(url, content=b"x").status_code == 400
    assert session.put(f"{url}/1", content=b"x").status_code == 200
    parts = {"oid": "0" * 64, "parts": [{"partNumber": 1, "etag": "another"}]}
    assert "The parts are [1]" in session.post(f"{url}/complete", json=parts).json()["error"]
    assert session.post(f"{url}/verify", json={"size": 1}, headers=headers).status_code == 404
    line = '{"key": "header", "value": {"summary": "s"}}\n{"key": "lfsFile", "value": {"path": "w.bin", "oid": "00"}}'
    answer = session.post(f"{hub.url}/api/models/user/sum/commit/main", content=line, headers=headers)
    assert (answer.status_code, answer.headers["x-error-message"][:11]) == (400, "LFS pointer")


def test_an_error_in_a_route_is_its_traceback(hub):
    answer = get_session().post(f"{hub.url}/api/validate-yaml", json={"content": "x"})
    assert answer.status_code == 500
    assert "KeyError: 'repoType'" in answer.text
    assert get_session().get(f"{hub.url}/no/such/route").status_code == 404


def test_a_hub_that_stops_drops_its_connections():
    with Hub() as hub, httpx2.Client() as client:
        hub.create("user/gone").commit({"a.txt": b"1"})
        assert client.get(f"{hub.url}/user/gone/resolve/main/a.txt").content == b"1"
        hub.close()
        with pytest.raises(httpx2.TransportError, match=r"."):
            client.get(f"{hub.url}/user/gone/resolve/main/a.txt")


def test_names_that_are_not_there(hub, waits):
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        hf_hub_download("gpt2", "config.json")
    hub.create("user/there")
    with pytest.raises(RevisionNotFoundError, match="Revision Not Found"):
        hf_hub_download("user/there", "a.txt", revision="v9")
    hub.fail(None, ".", status=503, times=None)
    with pytest.raises(LocalEntryNotFoundError, match="check your connection"):
        hf_hub_download("user/there", ".gitattributes")
    with pytest.raises(KeyError, match="0 repos are called 'user/nothing'"):
        hub.repo("user/nothing")
    with pytest.raises(ValueError, match="`role` must be one of"):
        hub.token("user", "admin")


def test_a_large_download_goes_on_where_it_was_cut(hub, waits):
    content = LARGE * 12  # 25 MB
    hub.create("user/resume").commit({"w.bin": content})
    hub.fail("GET", "/resolve/", truncate=len(content) - 5)
    with open(hf_hub_download("user/resume", "w.bin"), "rb") as file:
        assert file.read() == content
    assert [r.headers.get("range") for r in hub.requests("GET", "/resolve/")] == [None, "bytes=20971520-"]


def test_a_stream_goes_on_after_a_reset(hub, api, waits):
    rows = datasets.Dataset.from_dict({"x": list(range(5))})
    rows.push_to_hub("user/stream")
    stream = datasets.load_dataset("user/stream", split="train", streaming=True)
    fault = hub.fail("GET", "/resolve/.*parquet", reset=True, times=2)
    assert [row["x"] for row in stream] == list(range(5))
    assert fault.hits == 2


def test_of_two_pushes_at_once_the_second_is_refused(hub, api):
    def rows(split):
        return datasets.Dataset.from_dict({"x": [1, 2]}).push_to_hub("user/two", split=split)

    api.create_repo("user/two", repo_type="dataset")
    hub.fail("POST", "/commit/main", call=lambda request: rows("first"))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        rows("second")
    assert list(datasets.load_dataset("user/two")) == ["first"]
    rows("second")
    assert sorted(datasets.load_dataset("user/two")) == ["first", "second"]


def test_an_upload_that_is_not_verified_is_not_committed(hub, api):
    api.create_repo("user/verify")
    hub.fail("POST", "/verify$", status=404)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        put(api, "user/verify", {"w.bin": b"w"})
    assert len(hub.commits("user/verify")) == 1
    assert [len(name) for name in hub.uploads("user/verify")] == [64]  # the object stays
    put(api, "user/verify", {"w.bin": b"w"})
    assert hub.uploads("user/verify") == ["w.bin"]


def test_answers_that_are_not_json(hub, api):
    hub.fail("POST", "/api/validate-yaml", status=502, body="<html>Bad gateway</html>")
    api.create_repo("user/html")
    with pytest.raises(json.JSONDecodeError, match="Expecting value"):
        put(api, "user/html", {"README.md": b"---\ntags: [a]\n---\n"})


def test_a_fault_may_be_any_function(hub, api):
    hub.create("user/function")
    hub.faults.append(lambda request: failure(418, "", "tea") if request.method == "GET" else None)
    assert status_of(api.model_info, "user/function") == (418, "tea")
    hub.clear_log()
    assert api.model_info("user/function").id == "user/function"
