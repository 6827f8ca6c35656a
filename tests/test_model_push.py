"""`MimicTrainer.push_to_hub`: the model and its card in one commit, and the record of the run behind both."""

import json
import types

import models
import pytest
from datasets import load_dataset
from huggingface_hub import ModelCard
from models import make_batch
from test_distributed import launch
from training import prepare, rows_of
from transformers import AutoModelForImageClassification

from hf_mimic.hub_errors import HubError
from hf_mimic.metrics import accuracy
from hf_mimic.run_record import RunRecord


@pytest.fixture(autouse=True)
def _logged_in(api, monkeypatch):
    monkeypatch.setattr("hf_mimic.hub.time", types.SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def trained(hub, tmp_path):
    """Return a function that trains against a reference on the Hub, for a repo of the given name."""
    models.make("vit", seed=1).save_pretrained(tmp_path / "reference")
    commit = hub.create("user/teacher").commit(tmp_path / "reference")

    def make(name, arguments=None, **options):
        rows = rows_of(make_batch("vit", size=32))
        options = {"max_steps": 4, "hub_model_id": name, "strategy": "mimic", **options}
        given = {"rows": rows, "reference": "user/teacher", "arguments": arguments}
        trainer = prepare(models.make("vit"), tmp_path / "out", **given, **options)
        trainer.train()
        return trainer, commit

    return make


@pytest.mark.filterwarnings("ignore:the score")
def test_the_record_of_a_run(trained, tmp_path):
    trainer, commit = trained("user/recorded", seed=7)
    record = RunRecord.read(trainer.args.scores_dir)
    assert (record.kind, record.reference_model, record.reference_revision) == ("training", "user/teacher", commit)
    assert record.settings["strategy"] == "mimic"
    assert record.settings["mimic_layers"] == ["head"]
    assert record.seeds == {"seed": 7}
    assert record.versions["hf_mimic"]
    assert str(tmp_path) not in json.dumps(record.as_dict())


@pytest.mark.filterwarnings("ignore:the score")
def test_one_commit_with_a_card(hub, trained, tmp_path):
    trainer, commit = trained("user/pushed")
    for name in (".git/config", ".cache/huggingface/x", "runs/.git/config"):  # the client takes none of these
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True)
        path.write_text("url = https://user:password@example.com")
    done = trainer.push_to_hub(license="mit", language="en", tags=["birds"])
    assert [c.oid for c in hub.commits("user/pushed")][1:] == [done.oid]
    assert done.commit_url == f"{hub.url}/user/pushed/commit/{done.oid}"
    files = hub.repo("user/pushed").files
    assert {"README.md", "config.json", "model.safetensors", "training_args.bin"} <= {*files}
    assert not [path for path in files if path.startswith(("scores", "checkpoint-", "_", ".cache", ".git/", "runs"))]
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit"
    assert {"birds", "hf_mimic"} <= {*card.data.tags}
    assert f"user/teacher/tree/{commit}" in card.text
    AutoModelForImageClassification.from_pretrained("user/pushed")
    hub.clear_log()
    assert trainer.push_to_hub(license="mit", language="en", tags=["birds"]).oid == done.oid
    assert hub.requests("PUT") == []


@pytest.mark.filterwarnings("ignore:the score")
def test_what_people_wrote_in_the_card_stays(hub, trained):
    trainer, _ = trained("user/edited-model")
    trainer.push_to_hub()
    repo = hub.repo("user/edited-model")
    text = repo.files["README.md"].decode().replace("---\n\n#", "license: mit\n---\n\n#", 1)
    repo.commit(
        {
            "README.md": (text + "\n## Who pays\n\nNobody.\n").encode(),
            "scores/steps-0-1-rank-0.parquet": b"of a checkpoint",
            "scores/own.json": b"theirs",
        }
    )
    trainer.push_to_hub(tags=["new"])
    card = repo.files["README.md"].decode()
    assert "## Who pays\n\nNobody.\n" in card
    assert ModelCard(card).data.license == "mit"
    assert "new" in ModelCard(card).data.tags
    assert [path for path in repo.files if path.startswith("scores")] == ["scores/own.json"]


@pytest.mark.filterwarnings("ignore:the score")
def test_a_hub_that_fails(hub, trained):
    trainer, _ = trained("user/failing")
    hub.fail("POST", "/commit/", status=403)
    with pytest.raises(HubError, match="user/failing: commit failed: the token must not write to it"):
        trainer.push_to_hub()
    assert list(hub.repo("user/failing").files) == [".gitattributes"]
    hub.fail("POST", "/commit/", status=503)
    future = trainer.push_to_hub(blocking=False)
    assert future.result().oid == hub.commits("user/failing")[-1].oid
    assert len(hub.commits("user/failing")) == 2


@pytest.mark.filterwarnings("ignore:the score")
def test_branch_and_privacy(hub, trained):
    trainer, _ = trained("user/branch", hub_revision="v2", hub_private_repo=True)
    done = trainer.push_to_hub()
    repo = hub.repo("user/branch")
    assert repo.private
    assert repo.resolve("v2").oid == done.oid
    assert list(repo.files) == [".gitattributes"]


@pytest.mark.filterwarnings("ignore:the score")
def test_results_of_an_evaluation_on_hub_data(hub, trained):
    rows = rows_of(make_batch("vit", size=16))
    rows.push_to_hub("user/held-out", split="test")
    evaluation = load_dataset("user/held-out", split="test").with_format("torch")
    trainer, _ = trained("user/evaluated", {"eval_dataset": evaluation, "compute_metrics": accuracy})
    metrics = trainer.evaluate()
    trainer.push_to_hub()
    card = ModelCard(hub.repo("user/evaluated").files["README.md"].decode())
    assert card.data.pipeline_tag == "image-classification"
    result = next(entry for entry in card.data.eval_results if entry.metric_type == "accuracy")
    assert (result.dataset_type, result.dataset_split, result.task_type) == (
        "user/held-out",
        "test",
        "image-classification",
    )
    assert result.metric_value == metrics["eval_accuracy"]
    assert RunRecord.read(trainer.args.scores_dir).results["eval_accuracy"] == metrics["eval_accuracy"]


@pytest.mark.slow
def test_two_processes_push_once(hub, tmp_path):
    found = launch([("pushed", "pushed", {"repo_id": "user/by-two"})], tmp_path)
    commits = hub.commits("user/by-two")
    assert [commit.oid for commit in commits][1:] == [found["pushed", 0]["oid"]]
    assert found["pushed", 1]["oid"] is None
    assert found["pushed", 1]["steps"] == 2
    assert "processes` | 2" in hub.repo("user/by-two").files["README.md"].decode()
