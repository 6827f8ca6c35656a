"""The Hub of the tests, asked by the real clients: every route, who may do what, and every kind of fault."""

import warnings

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RevisionNotFoundError,
)


@pytest.fixture
def api(hub, monkeypatch, waits):
    """Return a client with a token of "user"."""
    token = hub.token("user", orgs=["team"])
    monkeypatch.setenv("HF_TOKEN", token)
    return HfApi()


def add(path, content):
    return CommitOperationAdd(path, content)


def put(api, repo_id, files, **options):
    return api.create_commit(repo_id, [add(*f) for f in files.items()], commit_message="put", **options)


# ---- routes --------------------------------------------------------------------------------------------------------


def test_whoami_and_the_life_of_a_repo(hub, api):
    me = api.whoami()
    assert me["name"] == "user" and [o["name"] for o in me["orgs"]] == ["team"]
    assert me["auth"]["accessToken"]["role"] == "write"
    url = api.create_repo("life")  # in the user's own namespace
    assert url.repo_id == "user/life" and api.create_repo("user/life", exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("user/life")
    api.update_repo_settings("user/life", private=True, gated="auto")
    assert api.model_info("user/life").private and api.model_info("user/life").gated == "auto"
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
    assert info.oid == hub.commits("user/ops")[-1].oid and str(info.commit_url).endswith(info.oid)
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
    assert hub.uploads("user/same") == [] and not hub.requests("POST", "/commit/")
    put(api, "user/same", {"again.safetensors": b"weights"})  # another name: the object is there
    assert not hub.requests("PUT") and len(hub.commits("user/same")) == 3


def test_info_tree_paths_and_pages(hub, api):
    api.create_repo("user/tree", repo_type="dataset")
    first = put(api, "user/tree", {"data/train/a.parquet": b"abc", "b.txt": b"b"}, repo_type="dataset")
    put(api, "user/tree", {"b.txt": b"bb"}, repo_type="dataset")
    info = api.dataset_info("user/tree", files_metadata=True)
    sizes = {s.rfilename: (s.size, s.lfs.size if s.lfs else None) for s in info.siblings}
    assert sizes["data/train/a.parquet"] == (3, 3) and sizes["b.txt"] == (2, None)
    assert api.dataset_info("user/tree", revision=first.oid).sha == first.oid
    hub.page_size = 2
    entries = {e.path: e for e in api.list_repo_tree("user/tree", recursive=True, expand=True, repo_type="dataset")}
    assert sorted(entries) == [".gitattributes", "b.txt", "data", "data/train", "data/train/a.parquet"]
    assert len(hub.requests("GET", "/tree/main")) == 3
    assert entries["data"].last_commit.oid == first.oid and entries["b.txt"].last_commit.title == "put"
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
