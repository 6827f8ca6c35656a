"""The Hub of the tests, asked by the real clients: every route, and that what is pushed comes back."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import datasets
import models
import pytest
import torch
from clients import put
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from transformers import AutoModelForImageClassification


def test_whoami_and_the_life_of_a_repo(hub, api):
    me = api.whoami()
    assert me["name"] == "user"
    assert [o["name"] for o in me["orgs"]] == ["team"]
    assert me["auth"]["accessToken"]["role"] == "write"
    url = api.create_repo("life")  # in the user's own namespace
    assert url.repo_id == "user/life"
    assert api.create_repo("user/life", exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("user/life")
    api.update_repo_settings("user/life", private=True, gated="auto")
    assert api.model_info("user/life").private
    assert api.model_info("user/life").gated == "auto"
    api.move_repo("user/life", "team/life")
    assert api.model_info("user/life").id == "team/life"  # by a redirect
    assert api.file_exists("user/life", ".gitattributes")
    api.delete_repo("team/life")
    assert not api.repo_exists("team/life")
    api.delete_repo("team/life", missing_ok=True)


def test_lists(hub, api):
    for name, kind in (("lists/a-one", "models"), ("lists/b-one", "models"), ("lists/a-one", "datasets")):
        hub.create(name, kind).commit({"README.md": b"---\ntags: [mimic]\n---\n" if "a-" in name else b"x"})
    hub.create("lists/secret", private=True)
    assert [m.id for m in api.list_models(author="lists")] == ["lists/a-one", "lists/b-one"]
    assert [m.id for m in api.list_models(author="lists", search="b-", limit=1)] == ["lists/b-one"]
    assert [d.id for d in api.list_datasets(author="lists", filter="mimic")] == ["lists/a-one"]
    assert list(api.list_spaces(author="lists")) == []


def test_a_commit_adds_deletes_and_copies(hub, api):
    api.create_repo("user/ops")
    files = {"a.txt": b"one", "w.bin": b"\0\1" * 50, "old/x.txt": b"x", "old/y.txt": b"y", "empty.bin": b""}
    info = put(api, "user/ops", files)
    assert info.oid == hub.commits("user/ops")[-1].oid
    assert str(info.commit_url).endswith(info.oid)
    assert sorted(hub.uploads("user/ops")) == sorted(files)
    api.create_commit(
        "user/ops",
        [
            CommitOperationCopy("a.txt", "b.txt"),
            CommitOperationCopy("w.bin", "v.bin"),
            CommitOperationDelete("a.txt"),
            CommitOperationDelete("old/"),
        ],
        commit_message="rearrange",
        commit_description="in one go",
    )
    assert hub.repo("user/ops").files == {
        **{".gitattributes": hub.repo("user/ops").files[".gitattributes"], "b.txt": b"one", "empty.bin": b""},
        **{"v.bin": files["w.bin"], "w.bin": files["w.bin"]},
    }
    assert [c.title for c in api.list_repo_commits("user/ops")] == ["rearrange", "put", "initial commit"]
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.delete_file("a.txt", "user/ops")


def test_the_same_content_is_not_sent_again(hub, api):
    api.create_repo("user/same")
    files = {"a.txt": b"one", "w.safetensors": b"weights"}
    put(api, "user/same", files)
    hub.log.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        put(api, "user/same", files)
    assert hub.uploads("user/same") == []
    assert not hub.requests("POST", "/commit/")
    put(api, "user/same", {"again.safetensors": b"weights"})  # another name: the object is there
    assert not hub.requests("PUT")
    assert len(hub.commits("user/same")) == 3


def test_info_tree_paths_and_pages(hub, api):
    api.create_repo("user/tree", repo_type="dataset")
    first = put(api, "user/tree", {"data/train/a.parquet": b"abc", "b.txt": b"b"}, repo_type="dataset")
    put(api, "user/tree", {"b.txt": b"bb"}, repo_type="dataset")
    info = api.dataset_info("user/tree", files_metadata=True)
    sizes = {s.rfilename: (s.size, s.lfs.size if s.lfs else None) for s in info.siblings}
    assert sizes["data/train/a.parquet"] == (3, 3)
    assert sizes["b.txt"] == (2, None)
    assert api.dataset_info("user/tree", revision=first.oid).sha == first.oid
    hub.page_size = 2
    entries = {e.path: e for e in api.list_repo_tree("user/tree", recursive=True, expand=True, repo_type="dataset")}
    assert sorted(entries) == [".gitattributes", "b.txt", "data", "data/train", "data/train/a.parquet"]
    assert len(hub.requests("GET", "/tree/main")) == 3
    assert entries["data"].last_commit.oid == first.oid
    assert entries["b.txt"].last_commit.title == "put"
    assert [e.path for e in api.list_repo_tree("user/tree", "data/train", repo_type="dataset")] == [
        "data/train/a.parquet"
    ]
    with pytest.raises(EntryNotFoundError, match="Entry Not Found"):
        list(api.list_repo_tree("user/tree", "nothing", repo_type="dataset"))
    found = api.get_paths_info("user/tree", ["b.txt", "data", "no"], expand=True, repo_type="dataset")
    assert [f.path for f in found] == ["b.txt", "data"]


def test_branches_and_tags(hub, api):
    api.create_repo("user/refs")
    first = put(api, "user/refs", {"a.txt": b"1"})
    api.create_branch("user/refs", branch="feat/x")
    put(api, "user/refs", {"a.txt": b"2"}, revision="feat/x")
    api.create_tag("user/refs", tag="v1", revision="feat/x")
    api.create_branch("user/refs", branch="feat/x", exist_ok=True)
    assert hub.repo("user/refs").files["a.txt"] == b"1"
    refs = api.list_repo_refs("user/refs")
    assert {b.name: b.target_commit for b in refs.branches}["main"] == first.oid
    assert [(t.name, t.ref) for t in refs.tags] == [("v1", "refs/tags/v1")]
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_tag("user/refs", tag="v1")
    api.delete_branch("user/refs", branch="feat/x")
    api.delete_tag("user/refs", tag="v1")
    with pytest.raises(RevisionNotFoundError, match="Revision Not Found"):
        api.model_info("user/refs", revision="feat/x")
    with pytest.raises(RevisionNotFoundError, match="Revision Not Found"):
        put(api, "user/refs", {"a.txt": b"3"}, revision=first.oid)  # not a branch


def test_super_squash_and_auth_check(hub, api):
    api.create_repo("user/squash")
    put(api, "user/squash", {"a.txt": b"1"})
    api.super_squash_history("user/squash", commit_message="all of it")
    assert [c.title for c in api.list_repo_commits("user/squash")] == ["all of it"]
    assert hub.repo("user/squash").files["a.txt"] == b"1"
    api.auth_check("user/squash", write=True)


def test_pull_requests(hub, api):
    api.create_repo("user/pulls")
    base = put(api, "user/pulls", {"a.txt": b"1", "gone.txt": b""}).oid
    put(api, "user/pulls", {"other.txt": b"meanwhile"})
    operations = [CommitOperationAdd("a.txt", b"2"), CommitOperationDelete("gone.txt")]
    info = api.create_commit("user/pulls", operations, commit_message="change", create_pr=True, parent_commit=base)
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert "other.txt" not in hub.repo("user/pulls").resolve("refs/pr/1").files  # it starts at `parent_commit`
    put(api, "user/pulls", {"w.bin": b"more"}, revision="refs/pr/1")
    assert hub.repo("user/pulls").files["a.txt"] == b"1"
    details = api.get_discussion_details("user/pulls", 1)
    assert details.status == "open"
    assert details.conflicting_files == []
    assert "+2" in details.diff
    api.merge_pull_request("user/pulls", 1)
    files = {p: c for p, c in hub.repo("user/pulls").files.items() if p != ".gitattributes"}
    assert files == {"a.txt": b"2", "other.txt": b"meanwhile", "w.bin": b"more"}
    assert api.get_discussion_details("user/pulls", 1).merge_commit_oid == hub.commits("user/pulls")[-1].oid
    assert [r.ref for r in api.list_repo_refs("user/pulls", include_pull_requests=True).pull_requests] == ["refs/pr/1"]


def test_a_pull_request_in_conflict_is_not_merged(hub, api):
    api.create_repo("user/conflict")
    put(api, "user/conflict", {"a.txt": b"mine"}, create_pr=True)
    put(api, "user/conflict", {"a.txt": b"theirs"})
    with pytest.raises(HfHubHTTPError, match="Merge conflicts in a"):
        api.merge_pull_request("user/conflict", 1)
    assert hub.repo("user/conflict").files["a.txt"] == b"theirs"


def test_discussions(hub, api):
    api.create_repo("user/talk")
    api.create_discussion("user/talk", "a question", description="why?")
    api.create_pull_request("user/talk", "a draft")
    api.comment_discussion("user/talk", 1, "because")
    api.rename_discussion("user/talk", 1, "a good question")
    api.change_discussion_status("user/talk", 1, "closed")
    kinds = [e.type for e in api.get_discussion_details("user/talk", 1).events]
    assert kinds == ["comment", "comment", "title-change", "status-change"]
    found = [(d.num, d.title, d.status, d.is_pull_request) for d in api.get_repo_discussions("user/talk")]
    assert found == [(2, "a draft", "draft", True), (1, "a good question", "closed", False)]
    assert [d.num for d in api.get_repo_discussions("user/talk", discussion_status="open")] == [2]


def test_large_files_go_in_parts(hub, api, tmp_path):
    api.create_repo("user/parts")
    hub.part_size = 1000
    content = bytes(range(256)) * 10
    (tmp_path / "w.bin").write_bytes(content)
    api.upload_file(path_or_fileobj=tmp_path / "w.bin", path_in_repo="w.bin", repo_id="user/parts")
    assert [len(r.body) for r in hub.requests("PUT")] == [1000, 1000, 560]
    assert hub.repo("user/parts").files["w.bin"] == content
    assert hub.uploads("user/parts") == ["w.bin"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_folder_goes_up_and_comes_back(hub, api, tmp_path, elsewhere):
    hub.lfs_elsewhere = elsewhere
    repo_id = f"user/folder-{elsewhere}"
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    files = {
        "a.txt": b"text",
        "inner/w.safetensors": b"weights" * 9,
        "inner/b c.txt": b"space",
        ".gitignore": b"*.log\n",
    }
    for path, content in {**files, "noise.log": b"no"}.items():
        (source / path).write_bytes(content)
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=source)
    assert {p: c for p, c in hub.repo(repo_id).files.items() if p in (*files, "noise.log")} == files
    there = snapshot_download(repo_id, local_dir=tmp_path / "there")
    assert {p: (tmp_path / "there" / p).read_bytes() for p in files} == files
    assert there == str(tmp_path / "there")
    assert sorted(hub.downloads(repo_id)) == sorted([*files, ".gitattributes"])
    assert bool(hub.requests("GET", "^/stored/")) == elsewhere
    assert not any("authorization" in r.headers for r in hub.requests("GET", "^/stored/"))


def test_what_the_clients_tell_about_themselves(hub):
    session = get_session()
    assert session.get(f"{hub.url}/api/agent-harnesses").json() == {"standardEnvVars": [], "harnesses": {}}
    assert session.head(f"{hub.url}/api/telemetry/datasets/load").status_code == 200
    assert session.post(f"{hub.url}/v1/telemetry", json={}).status_code == 200


def test_ranges(hub):
    hub.create("user/ranges").commit({"a.bin": b"0123456789"})
    url = f"{hub.url}/user/ranges/resolve/main/a.bin"
    session = get_session()
    for asked, status, body in (("2-4", 206, b"234"), ("7-", 206, b"789"), ("-3", 206, b"789"), ("10-", 416, b"")):
        answer = session.get(url, headers={"Range": f"bytes={asked}"})
        assert (answer.status_code, answer.content) == (status, body)


def test_a_dataset_is_pushed_loaded_and_streamed(hub, api):
    rows = datasets.Dataset.from_dict({"x": [1, 2, 3], "label": [0, 1, 0]})
    rows.push_to_hub("user/rows")
    assert hub.uploads("user/rows") == ["data/train-00000-of-00001.parquet", "README.md"]
    assert datasets.load_dataset("user/rows", split="train").to_dict() == rows.to_dict()
    assert [r["x"] for r in datasets.load_dataset("user/rows", split="train", streaming=True)] == [1, 2, 3]
    hub.log.clear()
    rows.push_to_hub("user/rows", config_name="scored", revision="next", private=True)
    assert hub.uploads("user/rows") == ["README.md"]  # the shard is there, under another name
    assert datasets.get_dataset_config_names("user/rows", revision="next") == ["default", "scored"]


def test_a_model_is_pushed_and_loaded(hub, api):
    model = models.make("vit")
    model.push_to_hub("user/model", commit_message="weights")
    loaded = AutoModelForImageClassification.from_pretrained("user/model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert hub.commits("user/model")[-1].title == "weights"


def test_one_of_two_commits_to_the_same_head_is_refused(hub, api):
    api.create_repo("user/race")
    head = api.model_info("user/race").sha

    def commit(number):
        try:
            return put(api, "user/race", {f"{number}.txt": b"x"}, parent_commit=head).oid
        except HfHubHTTPError as error:
            return error.response.status_code

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(commit, range(6)))
    assert sorted(map(str, answers))[-6:].count("412") == 5
    assert len(hub.commits("user/race")) == 2
