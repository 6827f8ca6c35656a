"""A resumed run is the uninterrupted one: weights to the last bit, batches in order, the same rows in the score table."""

import json
import shutil
from pathlib import Path

import models
import pytest
import torch
from splits import AcceleratorState
from training import QUIET, rows_of, same_weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_mimic.arguments import MimicTrainingArguments
from hf_mimic.checkpoints import STATE_NAME, last_complete, load_weights, read_state
from hf_mimic.scores import ScoreTable
from hf_mimic.trainer import MimicTrainer

ROWS = 22
OPTIONS = {
    **QUIET,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "random",
    "max_grad_norm": 1.0,
}


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    """Ends the run before an optimizer step, as a killed process would: without any clean-up of ours."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def data(family="vit", stream=0):
    rows = rows_of(models.make_batch(family, size=ROWS))
    return rows.to_iterable_dataset(num_shards=stream).shuffle(seed=1, buffer_size=8) if stream else rows


def trainer_of(
    folder, *, family="vit", kill=None, model=None, rows=None, stream=0, plain=False, eval_rows=None, **options
):
    AcceleratorState._reset_state()
    torch.manual_seed(7)
    config = {"hidden_dropout_prob": 0.1} if family == "vit" else {}
    student = models.make(family, **config) if model is None else model
    options = {**OPTIONS, **options}
    rows = data(family, stream) if rows is None else rows
    if plain:
        trainer = Trainer(student, TrainingArguments(str(folder), **options), train_dataset=rows)
    else:
        args = MimicTrainingArguments(str(folder), **{"strategy": "mimic", **options})
        reference = models.moved(models.make(family, **config))
        trainer = MimicTrainer(student, args, train_dataset=rows, eval_dataset=eval_rows, reference_model=reference)
    if kill is not None:
        trainer.add_callback(KillAt(kill))
    return trainer


def interrupted(folder, *, kill, start=None, **options):
    """Train, be killed, make everything anew from another start, resume from the last checkpoint; return the trainer."""
    with pytest.raises(Killed):
        trainer_of(folder, kill=kill, **options).train()
    trainer = trainer_of(folder, model=start, **options)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def other(family="vit", **config):
    """Return a model that starts somewhere else: a resumed run must not care."""
    return models.make(family, seed=9, **config)


def rows_in(folder):
    return ScoreTable.load(Path(folder) / "scores").to_arrow().to_pydict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a function that trains without interruption, once for each setting."""
    known = {}

    def train(**options):
        key = tuple(sorted((k, str(v)) for k, v in options.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("whole")
            trainer = trainer_of(folder, **options)
            trainer.train()
            known[key] = (trainer, rows_in(folder))
        return known[key]

    return train


def assert_same_run(trainer, folder, expected):
    reference, rows = expected
    assert same_weights(trainer.model, reference.model)
    assert rows_in(folder) == rows


# ---- interrupted anywhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill", range(3, 18))
def test_killed_before_any_step(whole, tmp_path, kill):
    """Six steps an epoch, a checkpoint after every second: in the middle of an epoch and at its end."""
    dropout = {"hidden_dropout_prob": 0.1}
    trainer = interrupted(tmp_path, kill=kill, start=other(**dropout))
    assert_same_run(trainer, tmp_path, whole())
    assert len(rows_in(tmp_path)["step"]) == 3 * ROWS


OTHERS = {
    "accumulated": {"gradient_accumulation_steps": 3, "save_steps": 1},
    "fixed temperature": {"temperature": 0.3},
    "by epoch": {"save_strategy": "epoch"},
    "one checkpoint": {"save_total_limit": 1},
    "device": {"weight_scope": "device"},
    "start": {"direction": "start"},
    "all layers": {"mimic_layers": "all"},
    "workers": {"dataloader_num_workers": 2},
    "resnet": {"family": "resnet"},
    "dinov2": {"family": "dinov2"},
    "clip": {"family": "clip"},
    "stream": {"stream": 1, "max_steps": 16, "num_train_epochs": 1},
    "stream in shards": {"stream": 3, "max_steps": 16, "num_train_epochs": 1},
}


@pytest.mark.parametrize("kill", [5, 8])
@pytest.mark.parametrize("name", OTHERS)
def test_killed_with_other_settings(whole, tmp_path, name, kill):
    """A stream of six batches is in its second pass at step 8."""
    options = OTHERS[name]
    kill = 5 if name == "accumulated" and kill == 8 else kill - (name == "accumulated")
    kill = kill if name != "by epoch" else kill + 5
    start = other(options.get("family", "vit"), **({} if "family" in options else {"hidden_dropout_prob": 0.1}))
    trainer = interrupted(tmp_path, kill=kill, start=start, **options)
    assert_same_run(trainer, tmp_path, whole(**options))


def test_killed_twice(whole, tmp_path):
    with pytest.raises(Killed):
        trainer_of(tmp_path, kill=5).train()
    with pytest.raises(Killed):
        trainer_of(tmp_path, kill=11).train(resume_from_checkpoint=True)
    trainer = trainer_of(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert_same_run(trainer, tmp_path, whole())


def test_a_checkpoint_by_name(whole, tmp_path):
    trainer_of(tmp_path).train()
    trainer = trainer_of(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_run(trainer, tmp_path, whole())


def test_adapters_resume(tmp_path):
    def run(folder, **options):
        torch.manual_seed(3)
        model = models.with_lora(models.make("clip_classifier"))
        AcceleratorState._reset_state()
        args = MimicTrainingArguments(str(folder), **{**OPTIONS, "strategy": "mimic", **options})
        return MimicTrainer(model, args, train_dataset=data(), reference_model=models.moved(model))

    expected = run(tmp_path / "whole")
    expected.train()
    first = run(tmp_path)
    first.add_callback(KillAt(9))
    with pytest.raises(Killed):
        first.train()
    trainer = run(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert same_weights(trainer.model, expected.model)


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_the_stock_trainer_does_not_resume(tmp_path, family):
    """transformers issues 43701, 48805: most tensors keep the values of the model that was given."""
    options = {
        "family": family,
        "plain": True,
        "rows": data().remove_columns("sample_id"),
        "train_sampling_strategy": "sequential",
    }
    expected = trainer_of(tmp_path / "whole", **options)
    expected.train()
    with pytest.raises(Killed):
        trainer_of(tmp_path, kill=9, **options).train()
    trainer = trainer_of(tmp_path, model=other(family), **options)
    trainer.train(resume_from_checkpoint=True)
    assert not same_weights(trainer.model, expected.model)


def test_the_best_model_is_loaded(tmp_path):
    options = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    trainer = trainer_of(tmp_path, eval_rows=data(), learning_rate=0.05, **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    student = models.make("vit", hidden_dropout_prob=0.1, seed=5)
    load_weights(student, best)
    assert same_weights(trainer.model, student)


# ---- checkpoints that are not whole --------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    with pytest.raises(Killed):
        trainer_of(tmp_path, kill=9).train()
    return tmp_path


def tear(checkpoint):
    """Leave what a process that was killed while it saved leaves."""
    for name in (STATE_NAME, "trainer_state.json", "optimizer.pt"):
        (checkpoint / name).unlink()


def test_a_torn_checkpoint_is_passed_over(run, whole):
    tear(run / "checkpoint-8")
    with pytest.warns(UserWarning, match=r"checkpoint-8 were not written to their end; resuming from checkpoint-6"):
        assert last_complete(run) == str(run / "checkpoint-6")
    trainer = trainer_of(run)
    with pytest.warns(UserWarning, match="checkpoint-8"):
        trainer.train(resume_from_checkpoint=True)
    assert_same_run(trainer, run, whole())


def test_a_torn_checkpoint_by_name(run):
    tear(run / "checkpoint-8")
    with pytest.raises(
        ValueError, match=r"a checkpoint must hold a readable trainer_state.json, .*checkpoint-8 does not"
    ):
        trainer_of(run).train(resume_from_checkpoint=str(run / "checkpoint-8"))


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match="must hold a complete checkpoint to resume from, found none"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_the_plain_trainer(tmp_path):
    with pytest.raises(Killed):
        trainer_of(tmp_path, plain=True, rows=data().remove_columns("sample_id"), kill=9).train()
    trainer = trainer_of(tmp_path)
    with pytest.warns(UserWarning, match="has no mimic_state.json that can be read: a plain Trainer made it"):
        trainer.train(resume_from_checkpoint=True)
    assert min(rows_in(tmp_path)["step"]) == 8
    assert trainer.state.global_step == 18


def test_the_marker_is_the_last_file(run):
    checkpoint = run / "checkpoint-8"
    marker = checkpoint / STATE_NAME
    assert all(marker.stat().st_mtime_ns >= path.stat().st_mtime_ns for path in checkpoint.iterdir())
    state = read_state(checkpoint)
    assert state["step"] == 8
    assert state["split"]["processes"] == 1
    assert set(state["temperature"]) == {"variance", "shape"}


def test_only_whole_checkpoints_are_kept(tmp_path):
    trainer_of(tmp_path, save_total_limit=2).train()
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert left == ["checkpoint-16", "checkpoint-18"]
    assert all((tmp_path / name / STATE_NAME).is_file() for name in left)


def test_weights_that_do_not_fit_are_refused(run):
    with pytest.raises(ValueError, match=r"must have every chosen parameter in the student's shape"):
        load_weights(models.make("vit", num_labels=7), run / "checkpoint-8")


def test_a_marker_that_cannot_be_read(run):
    (run / "checkpoint-8" / STATE_NAME).write_text('{"step": 8')
    with pytest.warns(UserWarning, match="resuming from checkpoint-6"):
        assert last_complete(run) == str(run / "checkpoint-6")
    for content in ('{"step": 8', '{"step": 8}', "[]"):
        (run / "checkpoint-8" / STATE_NAME).write_text(content)
        with pytest.warns(UserWarning, match="no mimic_state.json that can be read"):
            assert read_state(run / "checkpoint-8") == {}


def test_a_checkpoint_that_is_written_again_is_not_whole_meanwhile(run, monkeypatch):
    def die(*args, **kwargs):
        raise Killed

    trainer = trainer_of(run)
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", die)
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-6"))
    with pytest.warns(UserWarning, match="checkpoint-8 were not written to their end; resuming from checkpoint-6"):
        assert last_complete(run) == str(run / "checkpoint-6")


def test_checkpoints_of_an_earlier_run_are_passed_over(run, whole):
    """A fresh run in the same folder, killed before it got as far as the first one."""
    with pytest.warns(UserWarning, match="held the scores of an earlier run"), pytest.raises(Killed):
        trainer_of(run, kill=5).train()
    trainer = trainer_of(run)
    with pytest.warns(
        UserWarning, match="checkpoint-8, checkpoint-6 are of an earlier run; resuming from checkpoint-4"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert_same_run(trainer, run, whole())


def test_a_checkpoint_without_optimizer(tmp_path):
    with pytest.raises(Killed):
        trainer_of(tmp_path, kill=9, save_only_model=True).train()
    with pytest.warns(UserWarning, match="checkpoint-8 has no optimizer state"):
        trainer_of(tmp_path, save_only_model=True).train(resume_from_checkpoint=True)


def test_cut_weights_are_named(run):
    weights = run / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint-8/model.safetensors must be a whole safetensors file"):
        trainer_of(run).train(resume_from_checkpoint=True)


def test_a_folder_that_does_not_exist(run):
    with pytest.raises(FileNotFoundError, match=r"must be the folder of a checkpoint, .*checkpoint-7 does not exist"):
        trainer_of(run).train(resume_from_checkpoint=str(run / "checkpoint-7"))


def test_missing_score_rows_are_noticed(run):
    next((run / "scores").glob("*.parquet")).unlink()
    with pytest.warns(UserWarning, match=r"of 30 score rows of the steps before 8 are missing"):
        trainer_of(run).train(resume_from_checkpoint=True)


def test_a_path_as_reference(run):
    models.make("vit").save_pretrained(run / "reference")
    trainer = trainer_of(run / "out", reference_model=run / "reference", max_steps=3)
    trainer.train()
    assert json.loads((run / "out" / "checkpoint-2" / STATE_NAME).read_text())["phases"][0]["settings"][
        "reference_model"
    ]


def test_rows_grouped_by_length_resume(tmp_path):
    rows = data().add_column("length", [i % 7 for i in range(ROWS)])
    options = {"train_sampling_strategy": "group_by_length", "length_column_name": "length", "rows": rows}
    expected = trainer_of(tmp_path / "whole", **options)
    expected.train()
    trainer = interrupted(tmp_path / "killed", kill=9, **options)
    assert_same_run(trainer, tmp_path / "killed", (expected, rows_in(tmp_path / "whole")))


# ---- another set-up ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.3}, r"temperature: 'auto' -> 0.3"),
        ({"strategy": "uniform"}, "strategy: 'mimic' -> 'uniform'"),
    ],
)
def test_other_settings_begin_a_new_phase(run, change, message):
    trainer = trainer_of(run, **change)
    with pytest.warns(UserWarning, match=rf"resumed with other settings \({message}\): a new phase from step 8 on"):
        trainer.train(resume_from_checkpoint=True)
    phases = json.loads((run / "checkpoint-18" / STATE_NAME).read_text())["phases"]
    assert [phase["step"] for phase in phases] == [0, 8]
    name, value = next(iter(change.items()))
    assert phases[1]["settings"][name] == value
    assert len(rows_in(run)["step"]) == 3 * ROWS


@pytest.mark.parametrize("change", [{"per_device_train_batch_size": 8}, {"gradient_accumulation_steps": 2}])
def test_steps_of_another_size_restart_the_epoch(run, change):
    """At step 8 of 18 the second epoch was at a third; it starts over, with half as many steps an epoch."""
    trainer = trainer_of(run, **change)
    with pytest.warns(UserWarning, match="batches cannot be the same, so epoch 1 starts over; scores so far are kept"):
        trainer.train(resume_from_checkpoint=True)
    rows = rows_in(run)
    assert trainer.state.global_step == 8 + 2 * 3
    assert trainer.state.epoch == 3
    assert sum(step < 8 for step in rows["step"]) == ROWS + 8
    assert sorted(rows["sample_id"]) == sorted([*range(100, 100 + ROWS)] * 3 + rows["sample_id"][ROWS : ROWS + 8])


@pytest.mark.parametrize("second", [10, 12])
def test_killed_again_after_the_batch_size_changed(run, second):
    """Steps of two sizes: from the number of steps alone nobody could tell the epoch."""
    options = {"per_device_train_batch_size": 8, "save_steps": 1}
    with pytest.warns(UserWarning, match="epoch 1 starts over"), pytest.raises(Killed):
        trainer_of(run, kill=second + 1, **options).train(resume_from_checkpoint=True)
    trainer = trainer_of(run, **options)
    trainer.train(resume_from_checkpoint=True)
    rows = rows_in(run)
    assert trainer.state.global_step == 8 + 2 * 3
    assert trainer.state.epoch == 3
    assert sorted(rows["sample_id"]) == sorted([*range(100, 100 + ROWS)] * 3 + rows["sample_id"][ROWS : ROWS + 8])


def test_max_steps_after_the_batch_size_changed(tmp_path):
    with pytest.raises(Killed):
        trainer_of(tmp_path, kill=9, max_steps=12, per_device_train_batch_size=22).train()
    trainer = trainer_of(tmp_path, max_steps=12)
    with pytest.warns(UserWarning, match="epoch 8 starts over"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12


def test_checkpoints_of_a_future_that_was_left(tmp_path, whole):
    """A complete run is resumed from an early checkpoint, and killed: its late checkpoints are not where it was."""
    trainer_of(tmp_path).train()
    with pytest.raises(Killed):
        trainer_of(tmp_path, kill=7).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer = trainer_of(tmp_path)
    with pytest.warns(UserWarning, match="are of an earlier run; resuming from checkpoint-6"):
        trainer.train(resume_from_checkpoint=True)
    assert_same_run(trainer, tmp_path, whole())
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-18")


def test_stopping_before_the_first_step_of_an_epoch(tmp_path):
    class Stop(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = trainer_of(tmp_path, gradient_accumulation_steps=2)
    trainer.add_callback(Stop())
    trainer.train()
    assert trainer.state.global_step == 0


def test_more_epochs(run, whole):
    trainer = trainer_of(run, num_train_epochs=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 24
    assert len(rows_in(run)["step"]) == 4 * ROWS


def test_a_pass_that_fills_no_step(tmp_path):
    options = {"stream": 1, "max_steps": 3, "gradient_accumulation_steps": 8}
    with pytest.raises(ValueError, match="a pass over the data must fill one optimizer step, got 6 batches"):
        trainer_of(tmp_path, **options).train()


def test_direction_start_without_its_file(tmp_path):
    with pytest.raises(Killed):
        trainer_of(tmp_path, kill=5, direction="start").train()
    (tmp_path / "checkpoint-4" / "mimic_direction.safetensors").unlink()
    with pytest.warns(UserWarning, match='direction="start" now starts from the model that was given'):
        trainer_of(tmp_path, direction="start").train(resume_from_checkpoint=True)


def test_resuming_in_another_folder_keeps_the_first_ones_scores(run, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with pytest.warns(UserWarning, match=r"30 of 30 score rows of the steps before 8 are missing"):
        trainer_of(elsewhere).train(resume_from_checkpoint=str(run / "checkpoint-8"))
    assert min(rows_in(elsewhere)["step"]) == 8
    assert max(rows_in(run)["step"]) < 9


# ---- the disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_training_with_the_reason(tmp_path, monkeypatch):
    def fail(file):
        raise OSError(28, "No space left on device")

    trainer = trainer_of(tmp_path)

    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 7:
                monkeypatch.setattr("hf_mimic.files.os.fsync", fail)

    trainer.add_callback(Full())
    with pytest.raises(
        OSError, match=r"could not be written to .* \(.*No space left on device\). Earlier shards are whole"
    ):
        trainer.train()
    monkeypatch.undo()
    assert max(rows_in(tmp_path)["step"]) == 5
    assert not list(tmp_path.rglob("*.tmp"))
    again = trainer_of(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-8", ignore_errors=True)
    again.train(resume_from_checkpoint=True)
    assert len(rows_in(tmp_path)["step"]) == 3 * ROWS


# ---- a smaller batch found by the Trainer --------------------------------------------------------------------------


def test_auto_find_batch_size_starts_the_scores_anew(tmp_path):
    trainer = trainer_of(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8, save_strategy="no")

    class OutOfMemory(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if trainer._train_batch_size == 8 and state.global_step == 4:  # after the first epoch's shard
                raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.add_callback(OutOfMemory())
    trainer.train()
    rows = rows_in(tmp_path)
    assert len(rows["step"]) == 3 * ROWS
    assert rows["step"].count(0) == trainer._train_batch_size < 8
    assert not (tmp_path / "scores-1").exists()
