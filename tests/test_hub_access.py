"""Who may do what on the Hub of the tests, and which cards it takes: tokens, private and gated repos, YAML blocks."""

from contextlib import nullcontext

import pytest
from clients import put, status_of
from huggingface_hub import HfApi, hf_hub_download, metadata_update
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError


def test_without_a_token_public_repos_are_read_only(hub, waits):
    hub.create("user/public").commit({"a.txt": b"1"})
    nobody = HfApi(token=False)
    assert nobody.file_exists("user/public", "a.txt")
    refused = (401, "Invalid username or password.")
    assert status_of(nobody.create_repo, "user/new") == refused
    assert status_of(put, nobody, "user/public", {"a.txt": b"2"}) == refused
    assert status_of(put, nobody, "user/public", {"a.txt": b"2"}, create_pr=True) == refused
    hub.login_required = True
    assert not nobody.repo_exists("user/public")
    assert HfApi(token=hub.token("other", "read")).repo_exists("user/public")


def test_an_unknown_token_is_refused_everywhere(hub, waits):
    hub.create("user/known")
    api = HfApi(token="hf_unknown")
    refused = (401, "Invalid credentials in Authorization header")
    assert status_of(api.model_info, "user/known") == refused
    assert status_of(api.create_repo, "user/new") == refused
    token = hub.token("user")
    assert HfApi(token=token).model_info("user/known").id == "user/known"
    del hub.tokens[token]
    assert status_of(HfApi(token=token).model_info, "user/known") == refused


def test_a_read_token_may_only_propose(hub, waits):
    hub.create("user/reads")
    api = HfApi(token=hub.token("user", "read"))
    assert status_of(api.create_repo, "user/new")[0] == 403
    assert status_of(put, api, "user/reads", {"a.txt": b"1"})[0] == 403
    assert not hub.requests("POST", "/commit/")  # refused before anything is sent
    assert put(api, "user/reads", {"w.bin": b"1"}, create_pr=True).pr_num == 1
    put(api, "user/reads", {"w.bin": b"2"}, revision="refs/pr/1")  # the caller's own
    stranger = HfApi(token=hub.token("stranger"))
    assert status_of(put, stranger, "user/reads", {"w.bin": b"3"}, revision="refs/pr/1")[0] == 403
    assert status_of(api.merge_pull_request, "user/reads", 1)[0] == 403


def test_a_private_repo_is_not_there_for_others(hub, waits):
    hub.create("user/private", private=True).commit({"a.txt": b"1"})
    for token in (hub.token("user", "read"), hub.token("other", orgs=["user"])):
        assert HfApi(token=token).model_info("user/private").private
    for token, status in ((False, 401), (hub.token("other"), 404)):
        api = HfApi(token=token)
        assert not api.repo_exists("user/private")
        assert status_of(api.hf_hub_download, "user/private", "a.txt") == (status, "Repository not found")
        assert list(api.list_models(author="user", search="private")) == []
    assert status_of(HfApi(token=hub.token("other")).create_repo, "user/private", exist_ok=True)[0] in (403, 404)


def test_a_fine_grained_token_is_for_some_repos(hub, waits):
    for name in ("one", "two"):
        hub.create(f"user/{name}", private=True)
    api = HfApi(token=hub.token("user", "fine-grained", repos=["user/one"]))
    assert api.whoami()["auth"]["accessToken"]["role"] == "fineGrained"
    put(api, "user/one", {"a.txt": b"1"})
    hub.create("user/three")
    assert api.repo_exists("user/three")
    assert status_of(put, api, "user/three", {"a.txt": b"1"})[0] == 403
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        put(api, "user/two", {"a.txt": b"1"})


def test_a_gated_repo_shows_its_files_to_few(hub, waits, tmp_path):
    repo = hub.create("user/gated", gated="manual", allowed={"friend"})
    repo.commit({"a.txt": b"1"})
    assert HfApi(token=False).model_info("user/gated").gated == "manual"
    for token in (hub.token("user", "read"), hub.token("friend")):
        assert hf_hub_download("user/gated", "a.txt", token=token, cache_dir=tmp_path / str(token))
    for token, status in ((False, 401), (hub.token("other"), 403)):
        with pytest.raises(GatedRepoError, match="is restricted") as caught:
            hf_hub_download("user/gated", "a.txt", token=token, cache_dir=tmp_path / str(token))
        assert caught.value.response.status_code == status
        with pytest.raises(GatedRepoError, match="is restricted"):
            HfApi(token=token).auth_check("user/gated")


# ---- cards ----------------------------------------------------------------------------------------------------------

RESULT = "{task: {type: a}, dataset: {type: b, name: c}, metrics: [{type: d, value: 0.5}]}"


@pytest.mark.parametrize(
    ("kind", "card", "message"),
    [
        (
            "model",
            f"license: mit\nbase_model: [a/b]\ndatasets: c/d\nmodel-index: [{{name: e, results: [{RESULT}]}}]",
            "",
        ),
        ("model", "license: [", "YAML"),
        ("model", "license: mit\nlicense: mit", "duplicated"),
        ("model", "license: mine", "license"),
        ("model", "tags: a", "tags"),
        ("model", "language: no", "language"),
        ("model", "base_model: ./local/folder", "base_model"),
        ("model", "datasets: [{a: 1}]", "datasets"),
        ("model", "model-index: [{name: a, results: [{task: {type: b}, metrics: []}]}]", "dataset.type"),
        ("model", "model-index: [{name: a, results: [{}]}]", "task.type"),
        ("dataset", "task_ids: [1]", "task_ids"),
        (
            "dataset",
            "configs: [{config_name: a, data_files: [{split: b, path: c}]}]\ndataset_info: {features: []}",
            "",
        ),
        ("dataset", "configs: [{config_name: a}, {config_name: a}]", "unique"),
        ("dataset", "configs: [{config_name: a, data_files: [{path: c}]}]", "split"),
        ("dataset", "dataset_info: {features: [{dtype: int64}]}", "features"),
        ("dataset", "dataset_info: {splits: [{name: a, num_examples: x}]}", "num_examples"),
    ],
)
def test_cards_are_checked(api, kind, card, message):
    expected = pytest.raises(ValueError, match=rf"Invalid metadata in README.md.[\s\S]*{message}")
    with expected if message else nullcontext():
        api._validate_yaml(f"---\n{card}\n---\n# Title", repo_type=kind)


def test_a_card_is_checked_before_the_commit(hub, api):
    api.create_repo("user/card")
    with pytest.raises(ValueError, match='"license" must be'):
        put(api, "user/card", {"README.md": b"---\nlicense: mine\n---\n"})
    assert len(hub.commits("user/card")) == 1
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        put(api, "user/card", {"README.md": b"# No metadata"})
    with pytest.warns(UserWarning, match='"magic" is not a known pipeline_tag'):
        metadata_update("user/card", {"pipeline_tag": "magic", "tags": ["a"]}, repo_type="model")
    assert api.model_info("user/card").tags == ["a"]
