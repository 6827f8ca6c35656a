"""A trainer and the Hub: one commit of the reference for a whole run, and pushes that fail are told."""

import copy
import io
import json
import logging
import pickle
from concurrent.futures import Future
from types import SimpleNamespace

import models
import pytest
import torch
from hub.server import failure
from models import make_batch
from oracles import identical
from test_distributed import launch
from training import prepare, rows_of

from hf_mimic.arguments import MimicTrainingArguments
from hf_mimic.checkpoints import STATE_NAME
from hf_mimic.hub_errors import HubError
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
    assert repo.refs["refs/heads/main"] != commit
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


def test_a_base_that_is_not_there(hub, tmp_path):
    publish(hub, "user/baseless", tmp_path / "first", seed=1, **{"README.md": b"---\nbase_model: user/gone\n---\n"})
    with pytest.raises(
        ValueError, match=r"base model must .* user/gone could not be read: .* there is no model"
    ) as told:
        trainer_of(tmp_path, "user/baseless", direction="task_vector")
    assert "Name it as `reference_base_model`" in str(told.value)


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


@pytest.mark.slow
def test_two_processes_read_one_commit_that_the_first_looked_up(hub, tmp_path):
    repo, _ = publish(hub, "user/shared", tmp_path / "first", seed=1)
    second = models.make("vit", seed=2)
    second.save_pretrained(tmp_path / "second")

    def push(request):
        if request.path == "/api/models/user/shared":
            repo.commit(tmp_path / "second")

    hub.faults.append(lambda request: hub_answer(hub, request, push))
    found = launch(
        [
            ("pinned", "pinned", {"repo_id": "user/shared"}),
            ("missing", "pinned", {"repo_id": "user/shared", "revision": "v9"}),
        ],
        tmp_path,
    )
    assert len(repo.commits) == 3  # it was looked up once
    assert {found["pinned", rank]["sha"] for rank in (0, 1)} == commits_read(hub, "user/shared")
    assert torch.equal(found["pinned", 0]["bias"], found["pinned", 1]["bias"])
    assert not torch.equal(found["pinned", 0]["bias"], second.classifier.bias)
    told = {found["missing", rank]["error"] for rank in (0, 1)}
    assert len(told) == 1
    assert "user/shared: looking up v9 failed: there is no such branch, tag or commit" in told.pop()


# ---- pushes --------------------------------------------------------------------------------------------------------

TOKEN = "hf_" + "aB3" * 11
PUSHING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "hub_token": TOKEN}


def pusher(folder, **options):
    """Return a trainer that pushes its checkpoints to user/student, which it takes to be there."""
    trainer = trainer_of(folder, None, **PUSHING | options)
    trainer.args.push_to_hub, trainer.hub_model_id, trainer.push_in_progress = True, "user/student", None
    return trainer


def ended(error=None):
    job = Future()
    if error is None:
        job.set_result("pushed")
    else:
        job.set_exception(error)
    return job


@pytest.fixture
def uploads(monkeypatch):
    """Return the jobs, in order, that uploading returns from now on."""
    jobs = []
    api = SimpleNamespace(upload_folder=lambda **options: jobs.pop(0))
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: api)
    return jobs


def of_pushes(warned):
    """Return our warnings; those of the client about what it uploads are not ours."""
    return [str(each.message) for each in warned if "pushing checkpoint" in str(each.message)]


CLIENT = pytest.mark.filterwarnings("ignore:Cannot enable progress", "ignore:It seems that you are about to commit")


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        (401, "Invalid credentials in Authorization header", r"the Hub does not know the token\. Log in"),
        (401, "Invalid username or password.", r"no token was given\. Log in"),
        (403, "read-only", r"the token must not write to it \(read-only\)\. Log in with one that may write"),
        (503, "out of order", r"the Hub answered 503 \(out of order\)\. Try again later"),
    ],
)
def test_a_repo_that_cannot_be_made_for_the_checkpoints(hub, tmp_path, status, message, expected):
    hub.faults.append(lambda request: failure(status, "", message) if request.method == "POST" else None)
    with pytest.raises(HubError, match=rf"^user/student: creating the repo failed: {expected}"):
        trainer_of(tmp_path, None, push_to_hub=True, hub_model_id="user/student")


@CLIENT
def test_pushes_that_are_refused_are_told_and_training_ends(hub, tmp_path, caplog):
    hub.faults.append(
        lambda request: failure(403, "", f"read-only token {TOKEN}") if "/api/" in request.path else None
    )
    trainer = pusher(tmp_path)
    with pytest.warns(UserWarning, match=r"user/student: pushing checkpoint-\d failed") as told:
        trainer.train()
    told = of_pushes(told)
    assert told == [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    for step, text in zip((2, 4), told, strict=True):
        assert text == (
            f"user/student: pushing checkpoint-{step} failed: the token must not write to it (read-only token hf_***). "
            "Log in with one that may write to user/student: hf auth login, or set HF_TOKEN. Training goes on, and the "
            "next save pushes again; `trainer.push_to_hub()` sends what is missing."
        )
    assert trainer.failed_pushes == 2
    assert trainer.state.global_step == 4


@CLIENT
def test_each_failed_push_is_told_once_and_others_are_not(tmp_path, uploads):
    cancelled = Future()
    cancelled.cancel()
    uploads += [ended(ConnectionError("reset")), ended(), ended(), cancelled]
    trainer = pusher(tmp_path, hub_strategy="all_checkpoints")
    with pytest.warns(UserWarning, match="failed") as told:
        trainer.train()
    first, second = of_pushes(told)
    assert "pushing checkpoint-2 failed: the connection to the Hub broke off (reset)" in first
    assert "pushing checkpoint-4 failed: it was cancelled" in second
    assert trainer.failed_pushes == 2
    trainer._finish_current_push()
    assert trainer.failed_pushes == 2


@CLIENT
def test_a_push_that_still_runs_at_the_next_save_is_told_at_the_end(tmp_path, uploads):
    slow = Future()
    uploads += [slow]
    trainer = pusher(tmp_path)
    trainer.push_in_progress = None
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-2"))
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-4"))  # is left out by the Trainer
    assert trainer.failed_pushes == 0
    slow.set_exception(OSError("slow"))
    with pytest.warns(UserWarning, match="pushing checkpoint-2 failed: slow"):
        trainer._finish_current_push()


# ---- the token -----------------------------------------------------------------------------------------------------


def test_pickled_arguments_hold_no_token_and_copies_do(tmp_path):
    args = MimicTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", hub_token=TOKEN, learning_rate=0.25)
    file = io.BytesIO()
    torch.save(args, file)
    assert TOKEN.encode() not in file.getvalue()
    assert TOKEN.encode() in pickle.dumps(dict(args.__dict__))  # that is where it would be
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert (again.hub_token, again.learning_rate) == (None, 0.25)
    assert {**again.__dict__, "hub_token": TOKEN}.keys() == args.__dict__.keys()
    for copied in (copy.copy(args), copy.deepcopy(args)):
        assert type(copied) is MimicTrainingArguments
        assert copied.hub_token == TOKEN
    assert copy.deepcopy(args).mimic_layers is not args.mimic_layers
    assert copy.copy(args).mimic_layers is args.mimic_layers


def test_what_a_run_saves_holds_no_token(tmp_path):
    trainer = trainer_of(tmp_path, None, hub_token=TOKEN, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    saved = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"training_args.bin", STATE_NAME, "config.json"} <= {path.name for path in saved}
    assert [path for path in saved if TOKEN.encode() in path.read_bytes()] == []
