"""Reading a reference from the Hub: what is downloaded, revisions, and failures; against a server on 127.0.0.1."""

import json
from pathlib import Path

import models
import pytest
import torch
from hub.server import Response, failure
from oracles import identical

from hf_mimic.hub_errors import HubError
from hf_mimic.layers import match_parameters
from hf_mimic.mimic import MimicDirection, reference_direction
from hf_mimic.reference import read_tensors
from hf_mimic.reference_pass import runnable_tensors


@pytest.fixture
def pauses(monkeypatch):
    """Return the seconds that would have been waited."""
    waited = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    return waited


def pair(family):
    """Return a student and a reference of the same architecture and other weights."""
    return models.make(family), models.make(family, seed=1)


def named(model, names):
    every = dict(model.named_parameters())
    return {name: every[name].detach() for name in names}


def publish(hub, repo_id, model, folder, **options):
    model.save_pretrained(folder, **options)
    repo = hub.create(repo_id)
    return repo, repo.commit(Path(folder))


def test_only_the_shard_with_the_head_is_downloaded(hub, tmp_path):
    student, reference = pair("vit")
    publish(hub, "user/sharded", reference, tmp_path, max_shard_size="50KB")
    shards = sorted(p.name for p in tmp_path.glob("model-*.safetensors"))
    assert len(shards) == 3
    direction = reference_direction(student, "user/sharded", revision="main")
    names = match_parameters(student, "head")
    assert identical(direction, {n: x - named(student, names)[n] for n, x in named(reference, names).items()})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    expected = ["config.json", "model.safetensors.index.json", index["classifier.weight"]]
    assert hub.downloads("user/sharded") == expected
    reference_direction(student, "user/sharded")
    assert hub.downloads("user/sharded") == expected  # the second time from the cache


def test_branch_and_commit(hub, tmp_path):
    student, first = pair("vit")
    repo, commit = publish(hub, "user/moving", first, tmp_path / "first")
    second = models.make("vit", seed=2)
    _, head = publish(hub, "user/moving", second, tmp_path / "second")
    repo.commit(tmp_path / "first", branch="stable")
    for revision, expected in (("main", second), (None, second), (commit, first), (head, second), ("stable", first)):
        read = read_tensors("user/moving", student, ["classifier.weight"], revision=revision)
        assert identical(read, named(expected, ["classifier.weight"]))


def test_task_vector_from_the_hub(hub, tmp_path):
    student, reference = pair("vit")
    publish(hub, "user/tuned", reference, tmp_path / "tuned")
    base = models.make("vit", seed=2)
    publish(hub, "user/base", base, tmp_path / "base")
    direction = MimicDirection(student, "user/tuned", "head", kind="task_vector", base="user/base")
    weight = reference.classifier.weight - base.classifier.weight
    assert torch.equal(direction()["classifier.weight"], weight.detach())


def test_pickles_on_the_hub_are_not_even_downloaded(hub):
    hub.create("user/pickled").commit({"config.json": b"{}", "pytorch_model.bin": b"never read"})
    with pytest.raises(FileNotFoundError, match=r"user/pickled has only pytorch_model.bin"):
        reference_direction(models.make("vit"), "user/pickled")
    assert hub.downloads("user/pickled") == ["config.json"]


def test_unknown_repo_and_revision(hub):
    hub.create("user/empty")
    with pytest.raises(HubError, match=r"^user/nothing: looking up the main branch failed: there is no model of"):
        reference_direction(models.make("vit"), "user/nothing")
    with pytest.raises(HubError, match=r"^user/empty: looking up v9 failed: there is no such branch, tag or commit"):
        reference_direction(models.make("vit"), "user/empty", revision="v9")
    with pytest.raises(HubError, match=r"^user/empty: reading config.json failed: there is no such branch, tag or"):
        reference_direction(models.make("vit"), "user/empty", revision="0" * 40)


def test_a_hub_that_fails_is_not_a_repo_without_files(hub, tmp_path, pauses):
    publish(hub, "user/down", models.make("vit"), tmp_path)
    hub.faults.append(lambda request: failure(500, "", "out of order") if "/resolve/" in request.path else None)
    with pytest.raises(
        HubError, match=r"reading config.json failed: the Hub answered 500 \(out of order\). Try again"
    ):
        reference_direction(models.make("vit"), "user/down")


def test_the_cache_serves_when_the_hub_fails_and_offline(hub, tmp_path, pauses, monkeypatch):
    student, reference = pair("vit")
    publish(hub, "user/cached", reference, tmp_path)
    first = reference_direction(student, "user/cached")
    hub.faults.append(lambda request: failure(500, "", "out of order"))
    assert identical(reference_direction(student, "user/cached"), first)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.clear_log()
    assert identical(reference_direction(student, "user/cached"), first)
    assert hub.log == []


def test_offline_without_cache(hub, tmp_path, monkeypatch):
    _, commit = publish(hub, "user/uncached", models.make("vit"), tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in (None, commit):
        with pytest.raises(
            HubError, match=r"^user/uncached: .* HF_HUB_OFFLINE is set, and .* not in the cache. Unset"
        ):
            reference_direction(models.make("vit"), "user/uncached", revision=revision)


def test_offline_with_a_part_of_the_cache(hub, tmp_path, monkeypatch):
    student, reference = pair("vit")
    publish(hub, "user/partial", reference, tmp_path, max_shard_size="50KB")
    head = reference_direction(student, "user/partial")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert identical(reference_direction(student, "user/partial"), head)
    with pytest.raises(HubError, match=r"reading model-0000\d-of-00003.safetensors failed: HF_HUB_OFFLINE is set"):
        reference_direction(student, "user/partial", "all")


def test_a_branch_that_moves_while_it_is_read(hub, tmp_path):
    student, first = pair("vit")
    repo, _ = publish(hub, "user/busy", first, tmp_path / "first", max_shard_size="50KB")
    models.make("vit", seed=2).save_pretrained(tmp_path / "second", max_shard_size="50KB")

    def push(request):
        if request.path.endswith("index.json"):
            repo.commit(tmp_path / "second")

    hub.faults.append(push)
    names = match_parameters(student, "all")
    assert identical(read_tensors("user/busy", student, names), named(first, names))
    assert len(repo.commits) > 2


def test_code_in_the_repo_is_refused(hub, tmp_path):
    student, reference = pair("vit")
    repo, _ = publish(hub, "user/code", reference, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"auto_map": {"AutoModel": "code.Model"}}
    repo.commit({"config.json": json.dumps(config).encode(), "code.py": b"raise SystemExit"})
    for read in (reference_direction, runnable_tensors):
        with pytest.raises(ValueError, match=r"user/code has code of its own .*Load it yourself.*its state dict"):
            read(student, "user/code")
    assert "code.py" not in hub.downloads("user/code")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_tensors(tmp_path, student, ["classifier.bias"])  # a folder's weights are read, its code is not


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00003-of-00003.safetensors"])
def test_wrong_bytes_are_not_used(hub, tmp_path, name):
    student, reference = pair("vit")
    publish(hub, f"user/wrong-{len(name)}", reference, tmp_path, max_shard_size="50KB")
    size = (tmp_path / name).stat().st_size

    def fault(request):
        wrong = request.method == "GET" and request.path.endswith(name)
        return Response(200, bytes(size), {"X-Repo-Commit": "0" * 40}) if wrong else None

    hub.faults.append(fault)
    with pytest.raises(HubError, match=rf"verifying {name} failed: its hash must be .* nothing of it was used"):
        read_tensors(f"user/wrong-{len(name)}", student, match_parameters(student, "all"))
