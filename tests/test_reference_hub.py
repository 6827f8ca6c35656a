"""Reading a reference from the Hub: what is downloaded, revisions, and failures; against a server on 127.0.0.1."""

import json
from pathlib import Path

import models
import pytest
import torch
from hub.server import failure
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from oracles import identical

from hf_mimic.layers import match_parameters
from hf_mimic.mimic import MimicDirection, reference_direction
from hf_mimic.reference import read_tensors


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
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        reference_direction(models.make("vit"), "user/nothing")
    with pytest.raises(RevisionNotFoundError, match="Revision Not Found"):
        reference_direction(models.make("vit"), "user/empty", revision="v9")


def test_a_hub_that_fails_is_not_a_repo_without_files(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    publish(hub, "user/down", models.make("vit"), tmp_path)
    hub.faults.append(lambda request: failure(500, "", "out of order") if "/resolve/" in request.path else None)
    with pytest.raises(LocalEntryNotFoundError, match="check your connection"):
        reference_direction(models.make("vit"), "user/down")


def test_the_cache_serves_when_the_hub_fails(hub, tmp_path, monkeypatch):

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    student, reference = pair("vit")
    publish(hub, "user/cached", reference, tmp_path)
    first = reference_direction(student, "user/cached")
    hub.faults.append(lambda request: failure(500, "", "out of order"))
    assert identical(reference_direction(student, "user/cached"), first)
