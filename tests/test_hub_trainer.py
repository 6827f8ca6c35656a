"""A trainer and the Hub: one commit of the reference for a whole run, and pushes that fail are told."""

import json
import logging

import models
import pytest
from models import make_batch
from oracles import identical
from training import prepare, rows_of

from hf_mimic.checkpoints import STATE_NAME
from hf_mimic.mimic import reference_direction


def publish(hub, repo_id, folder, *, seed, **changes):
    """Commit a model, with other files if asked; return the repo and the commit."""
    models.make("vit", seed=seed).save_pretrained(folder)
    repo = hub.create(repo_id)
    return repo, repo.commit(folder) if not changes else repo.commit({**files(folder), **changes})


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def trainer_of(folder, repo_id, *, size=32, **options):
    model = models.make("vit")
    options = {"max_steps": 2, "learning_rate": 1e-3, **options}
    return prepare(model, folder, rows=rows_of(make_batch("vit", size=size)), reference=repo_id, **options)


def commits_read(hub, repo_id):
    """Return the revisions at which files of a repo were asked for."""
    return {request.path.split("/")[4] for request in hub.log if request.path.startswith(f"/{repo_id}/resolve/")}


# ---- one commit ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the reference agrees with")  # it knows nothing
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "ref_loss", "head_init": "reference", "mimic_layers": ["all"]},
        {"direction": "task_vector"},
    ],
)
def test_a_branch_that_moves_is_read_where_it_was(hub, tmp_path, options):
    names = {"reference": f"user/moves-{len(options)}", "base": f"user/base-{len(options)}"}
    card = f"---\nbase_model: {names['base']}\n---\n".encode()
    base, _ = publish(hub, names["base"], tmp_path / "base", seed=3)
    repo, _ = publish(hub, names["reference"], tmp_path / "first", seed=1, **{"README.md": card})
    models.make("vit", seed=2).save_pretrained(tmp_path / "second")

    def push(request):  # after every request that looks up a branch
        if request.path.startswith("/api/models/"):
            repo.commit(tmp_path / "second")
            base.commit(tmp_path / "second")

    hub.faults.append(lambda request: hub_answer(hub, request, push))
    trainer = trainer_of(tmp_path / "out", names["reference"], **options)
    trainer.train()
    commit = trainer.reference.sha
    assert repo.refs["main"] != commit
    assert [r.path for r in hub.log].count(f"/api/models/{repo.id}") == 1
    assert commits_read(hub, names["reference"]) == {commit}
    assert trainer.run_settings()["reference_revision"] == commit
    if "direction" in options:
        assert commits_read(hub, names["base"]) == {trainer.run_settings()["reference_base_revision"]}
        assert trainer.run_settings()["reference_base_model"] == names["base"]


def hub_answer(hub, request, afterwards):
    """Answer as the Hub does, then let something happen to it."""
    faults, hub.faults = hub.faults, []
    try:
        return hub.answer(request)
    finally:
        hub.faults = faults
        afterwards(request)


def test_settings_of_a_reference_that_is_not_on_the_hub(tmp_path):
    models.make("vit", seed=1).save_pretrained(tmp_path / "reference")
    found = trainer_of(tmp_path / "out", tmp_path / "reference").run_settings()
    assert found["reference_model"] == str(tmp_path / "reference")
    assert found["reference_revision"] is None
    assert "reference_base_model" not in found


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.fixture
def interrupted(hub, tmp_path):
    """Return what trains two steps of four and moves the reference's main branch; it returns its two commits."""

    def start(repo_id, **options):
        repo, commit = publish(hub, repo_id, tmp_path / "first", seed=1)
        repo.refs["v1"] = commit
        trainer_of(tmp_path / "out", repo_id, **SAVING | {"max_steps": 2} | options).train()
        _, moved = publish(hub, repo_id, tmp_path / "second", seed=2)
        return commit, moved

    return start


def phases(folder):
    return [each["settings"] for each in json.loads((folder / "checkpoint-4" / STATE_NAME).read_text())["phases"]]


def test_a_resumed_run_reads_where_it_began(interrupted, tmp_path, caplog):
    first, moved = interrupted("user/resumed")
    trainer = trainer_of(tmp_path / "out", "user/resumed", **SAVING)
    assert trainer.reference.sha == moved
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert f"user/resumed has moved since the run began: it goes on with {first}" in caplog.text
    assert trainer.reference.sha == first
    assert [each["reference_revision"] for each in phases(tmp_path / "out")] == [first]
    expected = reference_direction(trainer.model, "user/resumed", revision=first)
    assert identical(dict(trainer.direction()), expected)


def test_another_revision_that_is_asked_for_begins_a_phase(interrupted, tmp_path):
    first, moved = interrupted("user/switched", reference_revision="v1")
    trainer = trainer_of(tmp_path / "out", "user/switched", reference_revision="main", **SAVING)
    with pytest.warns(UserWarning, match=rf"other settings \(reference_revision: '{first}' -> '{moved}'\)"):
        trainer.train(resume_from_checkpoint=True)
    assert [each["reference_revision"] for each in phases(tmp_path / "out")] == [first, moved]


def test_a_checkpoint_that_does_not_know_its_commit(interrupted, tmp_path):
    _, moved = interrupted("user/older")
    path = tmp_path / "out" / "checkpoint-2" / STATE_NAME
    state = json.loads(path.read_text())
    del state["phases"][0]["settings"]["reference_revision"]
    path.write_text(json.dumps(state))
    trainer = trainer_of(tmp_path / "out", "user/older", **SAVING)
    with pytest.warns(UserWarning, match=rf"other settings \(reference_revision: None -> '{moved}'\)"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.reference.sha == moved
