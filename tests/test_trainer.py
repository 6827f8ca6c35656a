"""`MimicTrainer` against gradients by hand and the plain Trainer; every kind of data set; every refusal."""

import copy
import warnings
from types import SimpleNamespace

import datasets
import models
import numpy as np
import pytest
import torch
from datasets import Dataset
from oracles import plain_step, relative_error, scores_by_loop
from PIL import Image
from training import (
    ALL,
    FIRST,
    QUIET,
    SGD,
    assert_close,
    column,
    distance,
    fit,
    gradients_of,
    prepare,
    rows_of,
    same_weights,
    visits,
)
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_mimic import losses
from hf_mimic.arguments import MimicTrainingArguments
from hf_mimic.engine import check_engine
from hf_mimic.layers import match_parameters
from hf_mimic.metrics import accuracy
from hf_mimic.mimic import reference_direction
from hf_mimic.scores import ScoreTable
from hf_mimic.trainer import MimicTrainer


@pytest.fixture(scope="module")
def vit():
    model, batch = models.make("vit"), models.make_batch("vit", size=16)
    return model, batch, rows_of(batch)


# ---- the step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["head", "last_mlp", "last_block", "all"])
def test_one_step_by_hand(vit, tmp_path, layers):
    model, batch, rows = vit
    batch = {name: x[:8] for name, x in batch.items()}
    direction = reference_direction(model, models.moved(model), layers)
    scores = scores_by_loop(model, batch, direction, losses.cross_entropy)
    weights = torch.softmax(scores / 0.3, 0)
    values, expected = plain_step(copy.deepcopy(model), batch, losses.cross_entropy, weights)

    trainer = fit(model, tmp_path, rows=rows, mimic_layers=layers, temperature=0.3, max_steps=1, **SGD)
    recorded = trainer.scores.to_arrow()
    assert recorded["sample_id"].to_pylist() == list(range(FIRST, FIRST + 8))
    assert relative_error(torch.tensor(column(trainer, "mimic_score")), scores) <= 1e-5
    assert relative_error(torch.tensor(column(trainer, "relative_weight")), 8 * weights) <= 1e-5
    assert relative_error(torch.tensor(column(trainer, "loss")), values) <= 1e-5
    assert_close(gradients_of(trainer)[0], expected)
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p, model.get_parameter(name) - 0.1 * expected[name], rtol=0, atol=1e-6)
    _, plain = plain_step(copy.deepcopy(model), batch, losses.cross_entropy, torch.full((8,), 0.125))
    with pytest.raises(AssertionError):
        assert_close(gradients_of(trainer)[0], plain, 1e-2)


@pytest.mark.parametrize("family", ["clip", "siglip", "resnet", "bert", "clip_classifier"])
def test_one_step_of_other_families(family, tmp_path):
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    model, batch = models.make(family, **dropout).train(), models.make_batch(family, size=8)
    loss_fn = losses.loss_for_model(model)
    direction = reference_direction(model, models.moved(model), "all")
    scores = scores_by_loop(copy.deepcopy(model), batch, direction, loss_fn)
    _, expected = plain_step(copy.deepcopy(model), batch, loss_fn, torch.softmax(scores / 0.5, 0))
    options = {"mimic_layers": "all", "temperature": 0.5, "max_steps": 1}
    trainer = fit(model, tmp_path, rows=rows_of(batch), **options, **SGD)
    assert relative_error(torch.tensor(column(trainer, "mimic_score")), scores) <= 1e-5
    assert_close(gradients_of(trainer)[0], expected)


def test_auto_temperature_halves_the_effective_batch(vit, tmp_path):
    model, _, rows = vit
    options = {"strategy": "small_loss", "num_train_epochs": 1}
    trainer = fit(model, tmp_path, rows=rows, **options)
    weights = column(trainer, "relative_weight").reshape(2, 8) / 8
    half = 8 * 0.5 ** (7 / 9)  # among 8, what is half of many
    # From its own losses in the first step, from earlier ones after it.
    assert 1 / (weights[0] ** 2).sum() == pytest.approx(half, rel=0.02)
    assert 1 < 1 / (weights[1] ** 2).sum() < 8
    device = fit(model, tmp_path / "device", rows=rows, weight_scope="device", **options)
    weights = column(device, "relative_weight").reshape(2, 8) / 8
    assert 1 / (weights**2).sum(1) == pytest.approx([half, half], rel=0.02)


@pytest.mark.parametrize("optimizer", [SGD, {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1}])
@pytest.mark.parametrize("options", [{"strategy": "uniform"}, {"temperature": 1e12}], ids=str)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_equal_weights_are_plain_training_to_the_last_bit(vit, tmp_path, options, optimizer, accumulated):
    """Ten optimizer steps."""
    model, _, rows = vit
    shared = {**QUIET, **optimizer, "num_train_epochs": 5, "train_sampling_strategy": "random", "max_grad_norm": 1.0}
    shared |= {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
    plain = Trainer(copy.deepcopy(model), TrainingArguments(str(tmp_path), **shared), train_dataset=rows)
    plain.train()
    equal = fit(model, tmp_path, rows=rows, **{**shared, **options})
    assert same_weights(equal.model, plain.model)
    assert not same_weights(equal.model, model)
    assert equal.state.global_step == 10
    other = fit(model, tmp_path / "other", rows=rows, **{**shared, "temperature": 0.1})
    assert distance(other.model, plain.model) > 1e-4


def test_dropout_is_that_of_plain_training(tmp_path):
    model, batch = models.make("vit", hidden_dropout_prob=0.3), models.make_batch("vit", size=16)
    options = {**QUIET, **SGD, "num_train_epochs": 2}
    plain = Trainer(copy.deepcopy(model), TrainingArguments(str(tmp_path), **options), train_dataset=rows_of(batch))
    plain.train()
    equal = fit(model, tmp_path, rows=rows_of(batch), strategy="uniform", mimic_layers="all", **options)
    assert distance(equal.model, plain.model) <= 1e-6
    other = fit(model, tmp_path / "other", rows=rows_of(batch), strategy="uniform", **{**options, "seed": 1})
    assert distance(other.model, plain.model) > 1e-4


@pytest.mark.parametrize("layers", ["head", "last_block"])
def test_reweighting_only_the_mimic_layers(vit, tmp_path, layers):
    model, batch, rows = vit
    batch = {name: x[:8] for name, x in batch.items()}
    direction = reference_direction(model, models.moved(model), layers)
    scores = scores_by_loop(model, batch, direction, losses.cross_entropy)
    weights, even = torch.softmax(scores / 0.3, 0), torch.full((8,), 0.125)
    values, weighted = plain_step(copy.deepcopy(model), batch, losses.cross_entropy, weights)
    _, plain = plain_step(copy.deepcopy(model), batch, losses.cross_entropy, even)
    chosen = match_parameters(model, layers)
    expected = {name: weighted[name] if name in chosen else plain[name] for name in plain}

    options = {"mimic_layers": layers, "temperature": 0.3, "max_steps": 1, "reweight": "mimic_layers"}
    trainer = fit(model, tmp_path, rows=rows, logging_steps=1, **options, **SGD)
    assert_close(gradients_of(trainer)[0], expected)
    assert trainer.state.log_history[0]["loss"] == pytest.approx((weights * values).sum().item(), rel=1e-5)
    for wrong in (weighted, plain):
        with pytest.raises(AssertionError):
            assert_close(gradients_of(trainer)[0], wrong, 1e-3)


@pytest.mark.parametrize("frozen", ["classifier.weight", "classifier"])
def test_reweighting_frozen_mimic_layers(vit, tmp_path, frozen):
    model, batch, rows = vit
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    batch = {name: x[:8] for name, x in batch.items()}
    layers = ["classifier.weight", "classifier.bias"]
    scores = scores_by_loop(
        model, batch, reference_direction(model, models.moved(model), layers), losses.cross_entropy
    )
    weights = torch.softmax(scores / 0.3, 0)
    _, weighted = plain_step(copy.deepcopy(model), batch, losses.cross_entropy, weights)
    _, expected = plain_step(copy.deepcopy(model), batch, losses.cross_entropy, torch.full((8,), 0.125))
    expected["classifier.bias"] = weighted["classifier.bias"]
    options = {"mimic_layers": layers, "temperature": 0.3, "max_steps": 1, "reweight": "mimic_layers"}
    trainer = fit(model, tmp_path, rows=rows, **options, **SGD)
    assert_close(gradients_of(trainer)[0], expected)


def test_directions(vit, tmp_path):
    model, batch, rows = vit
    reference, base = models.moved(model), models.make("vit", seed=5)
    found = {}
    for kind in ("current", "start", "task_vector"):
        options = {"direction": kind, "num_train_epochs": 1, "temperature": 1.0, "mimic_layers": "all"}
        if kind == "task_vector":
            base.save_pretrained(tmp_path / "base")
            options["reference_base_model"] = str(tmp_path / "base")
        trainer = fit(
            model, tmp_path / kind, rows=rows, reference=reference, **options, **{**SGD, "learning_rate": 0.5}
        )
        found[kind] = column(trainer, "mimic_score").reshape(2, 8)
        student = copy.deepcopy(model)
        first = dict(model.named_parameters())
        for step, half in enumerate((slice(0, 8), slice(8, 16))):
            now = dict(student.named_parameters())
            origin = {"current": now, "start": first, "task_vector": dict(base.named_parameters())}[kind]
            v = {name: reference[name] - origin[name].detach() for name in reference}
            part = {name: x[half] for name, x in batch.items()}
            scores = scores_by_loop(student, part, v, losses.cross_entropy)
            assert relative_error(torch.tensor(found[kind][step]), scores) <= 2e-5
            _, gradient = plain_step(student, part, losses.cross_entropy, torch.softmax(scores, 0))
            with torch.no_grad():
                for name, p in student.named_parameters():
                    p -= 0.5 * gradient[name]
    assert found["current"][0] == pytest.approx(found["start"][0])
    assert found["current"][1] != pytest.approx(found["start"][1], rel=1e-2)
    assert found["current"][0] != pytest.approx(found["task_vector"][0], rel=1e-2)


def test_task_vector_needs_its_base(vit, tmp_path):
    model, _, rows = vit
    with pytest.raises(
        ValueError, match='direction="task_vector" needs the checkpoint that the reference was fine-tuned from'
    ):
        prepare(model, tmp_path, rows=rows, direction="task_vector")


def test_weights_per_device_are_averaged_over_micro_batches(vit, tmp_path):
    model, batch, rows = vit
    direction = reference_direction(model, models.moved(model), "head")
    parts, expected = [{name: x[i : i + 4] for name, x in batch.items()} for i in (0, 4, 8, 12)], {}
    for part in parts:
        scores = scores_by_loop(model, part, direction, losses.cross_entropy)
        _, gradient = plain_step(copy.deepcopy(model), part, losses.cross_entropy, torch.softmax(scores / 0.3, 0))
        expected = {name: expected.get(name, 0) + g / 4 for name, g in gradient.items()}
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "weight_scope": "device"}
    trainer = fit(model, tmp_path, rows=rows, temperature=0.3, num_train_epochs=1, **options, **SGD)
    assert len(gradients_of(trainer)) == 1
    assert_close(gradients_of(trainer)[0], expected)
    assert column(trainer, "relative_weight").reshape(4, 4).mean(1) == pytest.approx(np.ones(4), rel=1e-5)


@pytest.mark.parametrize("family", ["vit", "clip_classifier", "clip"])
def test_accumulated_uniform_gradients_are_those_of_the_whole_batch(family, tmp_path):
    model, batch = models.make(family), models.make_batch(family, size=8)
    loss_fn = losses.loss_for_model(model)
    expected = {}
    for i in (0, 4):
        part = {name: x[i : i + 4] for name, x in batch.items()}
        _, gradient = plain_step(copy.deepcopy(model), part, loss_fn, torch.full((4,), 0.25))
        expected = {name: expected.get(name, 0) + g / 2 for name, g in gradient.items() if g is not None}
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "weight_scope": "device"}
    trainer = fit(model, tmp_path, rows=rows_of(batch), strategy="uniform", num_train_epochs=1, **options, **SGD)
    assert_close(gradients_of(trainer)[0], expected)


def test_bfloat16_autocast_trains(vit, tmp_path):
    model, _, rows = vit
    half = fit(model, tmp_path, rows=rows, bf16=True, num_train_epochs=1, temperature=1.0, mimic_layers="all", **SGD)
    full = fit(model, tmp_path / "full", rows=rows, num_train_epochs=1, temperature=1.0, mimic_layers="all", **SGD)
    assert 0 < distance(half.model, full.model) < 1e-2
    assert np.corrcoef(column(half, "mimic_score"), column(full, "mimic_score"))[0, 1] > 0.99


@pytest.mark.parametrize(("reweight", "reentrant"), [("all", False), ("all", True), ("mimic_layers", False)])
def test_gradient_checkpointing_changes_nothing(vit, tmp_path, reweight, reentrant):
    model, _, rows = vit
    shared = {"num_train_epochs": 1, "temperature": 0.3, "reweight": reweight, "mimic_layers": "last_block"}
    plain = fit(model, tmp_path, rows=rows, **shared, **SGD)
    options = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    checkpointed = fit(model, tmp_path / "other", rows=rows, **shared, **options, **SGD)
    assert distance(plain.model, checkpointed.model) <= 1e-6


# ---- evaluation ----------------------------------------------------------------------------------------------------


def evaluations(model, folder, rows, train_rows, arguments=None, **options):
    """Return our trainer's and the plain Trainer's metrics on `rows`."""
    options = {**QUIET, "per_device_eval_batch_size": 8, **options}
    ours = prepare(model, folder, rows=train_rows, arguments={"eval_dataset": rows, **(arguments or {})}, **options)
    plain = Trainer(model, TrainingArguments(str(folder), **options), eval_dataset=rows, **(arguments or {}))
    results = [trainer.evaluate() for trainer in (ours, plain)]
    return [{k: v for k, v in r.items() if "time" not in k and "second" not in k} for r in results]


@pytest.mark.parametrize("with_ids", [True, False])
def test_evaluation_is_that_of_the_plain_trainer(vit, tmp_path, with_ids):
    model, batch, rows = vit
    evaluation = rows.select(range(11)) if with_ids else rows.select(range(11)).remove_columns("sample_id")
    ours, plain = evaluations(model, tmp_path, evaluation, rows, {"compute_metrics": accuracy})
    assert ours.keys() == plain.keys()
    assert ours == pytest.approx(plain, rel=1e-6)
    part = {name: x[:11] for name, x in batch.items()}
    assert ours["eval_loss"] == pytest.approx(losses.cross_entropy(model(part["pixel_values"]), part).mean().item())
    assert 0 < ours["eval_accuracy"] < 1


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("with_labels", [True, False])
def test_predictions(vit, tmp_path, with_ids, with_labels):
    model, batch, rows = vit
    rest = rows.remove_columns([*([] if with_ids else ["sample_id"]), *([] if with_labels else ["labels"])])
    predicted = prepare(model, tmp_path, rows=rows).predict(rest)
    torch.testing.assert_close(torch.tensor(predicted.predictions), model(batch["pixel_values"]).logits.detach())
    assert (predicted.label_ids is not None) is with_labels


def test_a_plain_torch_module(tmp_path):
    """It takes pixels and nothing else: neither ids nor labels reach it."""
    model = models.Classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, models.LABELS)))
    batch = models.make_batch("vit", size=16)
    rows = rows_of(batch)
    arguments = {"eval_dataset": rows, "compute_metrics": accuracy}
    trainer = fit(model, tmp_path, rows=rows, arguments=arguments, label_names=["labels"], mimic_layers="all", **SGD)
    assert visits(trainer) == [ALL] * 3
    assert trainer.evaluate()["eval_accuracy"] > 0.5
    predicted = trainer.predict(rows.remove_columns("labels")).predictions
    torch.testing.assert_close(torch.tensor(predicted), trainer.model(batch["pixel_values"]).logits.detach())


def test_adapters(tmp_path):
    model, batch = models.with_lora(models.make("clip_classifier")), models.make_batch("clip_classifier", size=8)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    direction = reference_direction(model, models.moved(model), "all")
    assert set(direction) == trained
    scores = scores_by_loop(copy.deepcopy(model), batch, direction, losses.cross_entropy)
    _, expected = plain_step(copy.deepcopy(model), batch, losses.cross_entropy, torch.softmax(scores / 0.3, 0))
    rows, options = rows_of(batch), {"mimic_layers": "all", "temperature": 0.3, "max_steps": 1}
    trainer = fit(model, tmp_path, rows=rows, arguments={"eval_dataset": rows}, **options, **SGD)
    assert relative_error(torch.tensor(column(trainer, "mimic_score")), scores) <= 1e-5
    assert_close(gradients_of(trainer)[0], expected)
    assert trainer.evaluate()["eval_loss"] > 0


def test_several_evaluation_sets_during_training(vit, tmp_path):
    model, _, rows = vit
    parts = {"first": rows.select(range(8)), "second": rows.select(range(8, 16))}
    arguments = {"eval_dataset": parts, "compute_metrics": accuracy}
    trainer = fit(model, tmp_path, rows=rows, arguments=arguments, eval_strategy="epoch", num_train_epochs=2)
    found = [entry for entry in trainer.state.log_history if "eval_first_loss" in entry]
    assert len(found) == 2
    assert len(trainer.scores) == 32  # an evaluation is no visit


def test_label_smoothing(vit, tmp_path):
    model, batch, rows = vit
    part = {name: x[:8] for name, x in batch.items()}

    def smooth(outputs, batch):
        return torch.nn.functional.cross_entropy(
            outputs.logits, batch["labels"], reduction="none", label_smoothing=0.2
        )

    direction = reference_direction(model, models.moved(model), "head")
    scores = scores_by_loop(model, part, direction, smooth)
    _, expected = plain_step(copy.deepcopy(model), part, smooth, torch.softmax(scores, 0))
    trainer = fit(model, tmp_path, rows=rows, label_smoothing_factor=0.2, temperature=1.0, max_steps=1, **SGD)
    assert_close(gradients_of(trainer)[0], expected)
    ours, plain = evaluations(model, tmp_path, rows, rows, label_smoothing_factor=0.2)
    assert ours["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    unsmoothed, _ = evaluations(model, tmp_path, rows, rows)
    assert ours["eval_loss"] != pytest.approx(unsmoothed["eval_loss"], rel=1e-3)


def multi_label():
    model, batch = models.make("vit", problem_type="multi_label_classification"), models.make_batch("vit", size=16)
    batch["labels"] = (torch.rand(16, models.LABELS, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    return model, batch, rows_of(batch)


def test_multi_label(tmp_path):
    model, batch, rows = multi_label()
    part = {name: x[:8] for name, x in batch.items()}
    direction = reference_direction(model, models.moved(model), "head")
    scores = scores_by_loop(model, part, direction, losses.binary_cross_entropy)
    _, expected = plain_step(copy.deepcopy(model), part, losses.binary_cross_entropy, torch.softmax(scores, 0))
    trainer = fit(model, tmp_path, rows=rows, temperature=1.0, max_steps=1, **SGD)
    assert_close(gradients_of(trainer)[0], expected)
    ours, plain = evaluations(model, tmp_path, rows, rows)
    assert ours["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)


def test_multi_label_is_not_smoothed_as_the_trainer_says(tmp_path):
    model, _, rows = multi_label()
    with pytest.warns(UserWarning, match="Disabling label smoothing for this training run"):
        ours, plain = evaluations(model, tmp_path, rows, rows, label_smoothing_factor=0.2)
    assert ours["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_image_text_models_train_and_evaluate(family, tmp_path):
    model, batch = models.make(family), models.make_batch(family, size=16)
    rows = rows_of(batch)
    trainer = fit(
        model,
        tmp_path,
        rows=rows,
        arguments={"eval_dataset": rows},
        eval_strategy="epoch",
        num_train_epochs=2,
        mimic_layers="last_block",
        **SGD,
    )
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) == 2
    parts = [{name: x[i : i + 8] for name, x in batch.items()} for i in (0, 8)]
    loss_fn = losses.loss_for_model(model)
    trained = trainer.model.eval()
    expected = np.mean([loss_fn(trained(**part), part).mean().item() for part in parts])
    assert found[-1] == pytest.approx(expected, rel=1e-5)
    assert len(trainer.scores) == 32


def test_own_loss(vit, tmp_path):
    model, batch, rows = vit
    part = {name: x[:8] for name, x in batch.items()}

    def squared(outputs, batch):
        return (outputs.logits.softmax(-1) - torch.nn.functional.one_hot(batch["labels"], 4)).square().sum(-1)

    scores = scores_by_loop(model, part, reference_direction(model, models.moved(model), "head"), squared)
    _, expected = plain_step(copy.deepcopy(model), part, squared, torch.softmax(scores, 0))
    arguments = {"loss_fn": squared, "eval_dataset": rows}
    trainer = fit(model, tmp_path, rows=rows, arguments=arguments, temperature=1.0, max_steps=1, **SGD)
    assert_close(gradients_of(trainer)[0], expected)
    expected = squared(trainer.model.eval()(batch["pixel_values"]), batch).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_own_loss_must_not_be_reduced(vit, tmp_path):
    model, _, rows = vit
    arguments = {"loss_fn": lambda outputs, batch: outputs.logits.mean()}
    with pytest.raises(ValueError, match=r"`loss_fn` must return one loss per sample, shape \(B,\), got shape \(\)"):
        fit(model, tmp_path, rows=rows, arguments=arguments)


# ---- data sets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remove", [True, False])
def test_a_custom_collator_need_not_know_the_id(vit, tmp_path, remove):
    model, _, rows = vit

    def collate(examples):
        assert set(examples[0]) == {"pixel_values", "labels"} if remove else "note" in examples[0]
        return {name: torch.stack([e[name] for e in examples]) for name in ("pixel_values", "labels")}

    rows = rows.add_column("note", ["text"] * 16)
    arguments = {"data_collator": collate, "eval_dataset": rows}
    trainer = fit(model, tmp_path, rows=rows, arguments=arguments, remove_unused_columns=remove, num_train_epochs=2)
    assert visits(trainer) == [ALL, ALL]
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("remove", [True, False])
def test_a_transform_may_drop_the_id(vit, tmp_path, remove):
    model, _, rows = vit
    renamed = rows.with_format(None).rename_columns({"pixel_values": "image", "labels": "label"})

    def transform(batch):
        return {"pixel_values": [torch.tensor(x) for x in batch["image"]], "labels": batch["label"]}

    lazy = renamed.with_transform(transform)
    options = {"num_train_epochs": 2, "remove_unused_columns": remove, "eval_strategy": "epoch"}
    trainer = fit(model, tmp_path, rows=lazy, arguments={"eval_dataset": lazy}, **options, **SGD)
    direct = fit(model, tmp_path / "direct", rows=rows, num_train_epochs=2, **SGD)
    assert visits(trainer) == [ALL, ALL]
    assert same_weights(trainer.model, direct.model)
    assert trainer.scores.to_arrow().equals(direct.scores.to_arrow())


def test_a_transformed_set_given_to_evaluate(vit, tmp_path):
    model, _, rows = vit
    lazy = rows.with_format(None).rename_column("labels", "label")
    lazy = lazy.with_transform(
        lambda b: {"pixel_values": [torch.tensor(x) for x in b["pixel_values"]], "labels": b["label"]}
    )
    trainer = prepare(model, tmp_path, rows=rows)
    assert trainer.evaluate(lazy)["eval_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"])
    assert trainer.predict(lazy).predictions.shape == (16, 4)


@pytest.mark.parametrize("remove", [True, False])
def test_a_torch_data_set_of_dicts(vit, tmp_path, remove):
    model, _, rows = vit

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, i):
            return {**rows[i], **({"note": "text"} if remove else {})}

    options = {"num_train_epochs": 2, "remove_unused_columns": remove, **SGD}
    trainer = fit(model, tmp_path, rows=Rows(), **options)
    direct = fit(model, tmp_path / "direct", rows=rows, **options)
    assert visits(trainer) == [ALL, ALL]
    assert same_weights(trainer.model, direct.model)


def test_a_stream(vit, tmp_path):
    model, _, rows = vit
    trainer = fit(model, tmp_path, rows=rows.to_iterable_dataset(), max_steps=2)
    assert sorted(trainer.scores.to_arrow()["sample_id"].to_pylist()) == ALL


def test_a_stream_needs_max_steps(vit, tmp_path):
    model, _, rows = vit
    with pytest.raises(ValueError, match=r"does not implement __len__.* max_steps has to be specified"):
        fit(model, tmp_path, rows=rows.to_iterable_dataset(), num_train_epochs=1)


def test_a_stream_without_ids(vit, tmp_path):
    model, _, rows = vit
    with pytest.raises(ValueError, match=r"every example must have an integer `sample_id` .* record_scores=False"):
        fit(model, tmp_path, rows=rows.remove_columns("sample_id").to_iterable_dataset(), max_steps=2)


def test_workers_keep_the_ids(vit, tmp_path):
    model, _, rows = vit
    trainer = fit(model, tmp_path, rows=rows, num_train_epochs=1, dataloader_num_workers=2)
    assert visits(trainer) == [ALL]


def test_another_name_of_the_id_column(vit, tmp_path):
    model, _, rows = vit
    trainer = fit(model, tmp_path, rows=rows.rename_column("sample_id", "row"), sample_id_column="row")
    assert visits(trainer)[0] == ALL


def picture_rows(corrupt=()):
    """Return image rows with ids, of which some are cut off, lazily turned into pixel values."""
    from io import BytesIO

    pixels, data = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8), []
    for picture in pixels:
        file = BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        data.append({"bytes": file.getvalue(), "path": None})
    for row in corrupt:
        data[row]["bytes"] = data[row]["bytes"][:100]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = Dataset.from_dict({"image": data, "label": [0, 1] * 4}, features=features)
    return rows.add_column("sample_id", list(range(FIRST, FIRST + 8)))


def pixels_of(batch):
    values = [torch.tensor(np.asarray(picture) / 255.0).permute(2, 0, 1).float() for picture in batch["image"]]
    return {"pixel_values": values, "labels": batch["label"]}


def test_a_corrupt_image_is_named(vit, tmp_path):
    model, *_ = vit
    good = fit(model, tmp_path, rows=picture_rows().with_transform(pixels_of), num_train_epochs=1)
    assert len(good.scores) == 8
    lazy = picture_rows(corrupt=[5]).with_transform(pixels_of)
    message = r"every image must decode; row 5 \(sample_id 105\) does not: .*Drop it \(hf_mimic.data.drop_unreadable"
    with pytest.raises(ValueError, match=message):
        fit(model, tmp_path / "other", rows=lazy, num_train_epochs=1)


def test_a_corrupt_image_is_named_without_a_transform(vit, tmp_path):
    model, *_ = vit

    def collate(examples):
        return default_data_collator([pixels_of({"image": [e["image"]], "label": [e["label"]]}) for e in examples])

    options = {"num_train_epochs": 1, "remove_unused_columns": False}
    with pytest.raises(ValueError, match=r"every image must decode; row 5 \(sample_id 105\) does not"):
        fit(model, tmp_path, rows=picture_rows(corrupt=[5]), arguments={"data_collator": collate}, **options)


# ---- logs and records ----------------------------------------------------------------------------------------------


def test_logs_by_hand(vit, tmp_path):
    model, batch, rows = vit
    trainer = fit(
        model,
        tmp_path,
        rows=rows,
        logging_steps=2,
        num_train_epochs=1,
        temperature=0.3,
        learning_rate=0.0,
        optim="sgd",
    )
    direction = reference_direction(model, models.moved(model), "head")
    expected = []
    for half in (slice(0, 8), slice(8, 16)):
        part = {name: x[half] for name, x in batch.items()}
        values = losses.cross_entropy(model(part["pixel_values"]), part).detach()
        scores = scores_by_loop(model, part, direction, losses.cross_entropy)
        weights = torch.softmax(scores / 0.3, 0)
        expected.append(
            {
                "loss": (weights * values).sum(),
                "plain_loss": values.mean(),
                "mimic_score_mean": scores.mean(),
                "mimic_score_std": scores.std(correction=0),
                "negative_share": (scores < 0).float().mean(),
                "effective_sample_size": 1 / weights.square().sum() / 8,
                "direction_norm": sum(v.square().sum() for v in direction.values()).sqrt(),
            }
        )
    logged = trainer.state.log_history[0]
    health = {"score_fit_correlation"}  # by hand in test_health.py
    assert set(logged) == {*expected[0], *health, "grad_norm", "learning_rate", "epoch", "step"}
    for name in expected[0]:
        mean = (expected[0][name] + expected[1][name]).item() / 2
        assert logged[name] == pytest.approx(mean, rel=1e-4, abs=1e-6), name
    assert logged["plain_loss"] != pytest.approx(logged["loss"], rel=1e-3)
    assert 0 < logged["negative_share"] < 1


def test_each_log_has_the_means_since_the_last(vit, tmp_path):
    model, _, rows = vit
    trainer = fit(model, tmp_path, rows=rows, logging_steps=1, num_train_epochs=2, **SGD)
    logged = [entry["mimic_score_mean"] for entry in trainer.state.log_history if "mimic_score_mean" in entry]
    by_step = trainer.scores.to_arrow().group_by("step").aggregate([("mimic_score", "mean")]).sort_by("step")
    assert logged == pytest.approx(by_step["mimic_score_mean"].to_pylist(), rel=1e-4, abs=1e-6)
    assert len(logged) == 4


def test_training_again_does_not_mix_the_logs(vit, tmp_path):
    model, _, rows = vit
    trainer = fit(model, tmp_path, rows=rows, logging_steps=3, num_train_epochs=2, record_scores=False, **SGD)
    trainer.args.logging_steps = 1
    trainer.loss_fn = lambda outputs, batch: 1000 + losses.cross_entropy(outputs, batch)
    trainer.train()
    assert trainer.state.log_history[0]["plain_loss"] > 999


def test_every_visit_is_recorded(tmp_path):
    model, batch = models.make("vit"), models.make_batch("vit", size=18)  # a last batch of two
    trainer = fit(model, tmp_path, rows=rows_of(batch), num_train_epochs=3, train_sampling_strategy="random")
    rows = trainer.scores.to_arrow()
    assert visits(trainer) == [list(range(FIRST, FIRST + 18))] * 3
    assert np.bincount(rows["step"].to_numpy()).tolist() == [8, 8, 2] * 3
    assert (rows["step"].to_numpy() // 3 == rows["epoch"].to_numpy()).all()
    means = rows.group_by("step").aggregate([("relative_weight", "mean")])["relative_weight_mean"].to_numpy()
    assert means == pytest.approx(np.ones(9), rel=1e-5)
    assert rows["loss"].null_count == rows["mimic_score"].null_count == 0
    assert len(list((tmp_path / "scores").glob("*.parquet"))) == 3
    assert ScoreTable.load(tmp_path / "scores").to_arrow().equals(rows)


def test_uniform_weights_are_recorded_as_one(vit, tmp_path):
    model, _, rows = vit
    trainer = fit(model, tmp_path, rows=rows, strategy="uniform", num_train_epochs=1)
    assert column(trainer, "relative_weight").tolist() == [1.0] * 16
    assert np.ptp(column(trainer, "mimic_score")) > 0


def test_without_records_no_ids_are_needed(vit, tmp_path):
    model, _, rows = vit
    trainer = fit(
        model, tmp_path, rows=rows.remove_columns("sample_id"), record_scores=False, num_train_epochs=1, **SGD
    )
    same = fit(model, tmp_path / "recorded", rows=rows, num_train_epochs=1, **SGD)
    assert same_weights(trainer.model, same.model)


def test_recording_can_be_switched_off(vit, tmp_path):
    model, _, rows = vit
    off = fit(model, tmp_path, rows=rows, num_train_epochs=1, record_scores=False, **SGD)
    assert len(off.scores) == 0
    assert not (tmp_path / "scores").exists()
    on = fit(model, tmp_path, rows=rows, num_train_epochs=1, **SGD)
    assert same_weights(on.model, off.model)


def test_scores_of_an_earlier_run_are_moved_aside(vit, tmp_path):
    model, _, rows = vit
    fit(model, tmp_path, rows=rows, num_train_epochs=1)
    with pytest.warns(UserWarning, match=r"scores held the scores of an earlier run; they are now in .*scores-1\."):
        second = fit(model, tmp_path, rows=rows, num_train_epochs=2)
    assert len(second.scores) == 32
    assert len(ScoreTable.load(tmp_path / "scores-1")) == 16


def test_scores_survive_a_checkpoint(tmp_path):
    model, rows = models.make("clip_classifier"), rows_of(models.make_batch("clip_classifier", size=16))
    options = {"num_train_epochs": 4, "train_sampling_strategy": "random", **SGD}
    whole = fit(model, tmp_path / "whole", rows=rows, **options)
    options |= {"save_strategy": "steps", "save_steps": 3}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5  # two steps that the resumed run repeats

    fit(model, tmp_path / "part", rows=rows, arguments={"callbacks": [Stop()]}, **options)
    assert len(ScoreTable.load(tmp_path / "part" / "scores")) == 40
    resumed = prepare(model, tmp_path / "part", rows=rows, **options)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(resumed.model, whole.model)
    assert resumed.scores.to_arrow().equals(whole.scores.to_arrow())


def test_a_checkpoint_has_its_scores_on_disk_whatever_happens_next(vit, tmp_path):
    model, _, rows = vit

    class Crash(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:  # in the middle of an epoch, after the checkpoint
                raise RuntimeError("power cut")

    options = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 4}
    with pytest.raises(RuntimeError, match="power cut"):
        fit(model, tmp_path, rows=rows, arguments={"callbacks": [Crash()]}, **options)
    assert len(ScoreTable.load(tmp_path / "scores")) == 24


def test_checkpoints_and_models_load_as_ever(vit, tmp_path):
    model, _, rows = vit
    trainer = fit(model, tmp_path, rows=rows, num_train_epochs=1, save_strategy="epoch", **SGD)
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-2")
    assert same_weights(loaded, trainer.model)
    stored = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert stored.mimic_layers == ["head"]


def test_model_init(vit, tmp_path):
    model, _, rows = vit
    made = []

    def init():
        made.append(models.make("vit"))
        return made[-1]

    options = {**QUIET, **SGD, "strategy": "mimic", "num_train_epochs": 1, "mimic_layers": "all"}
    args = MimicTrainingArguments(str(tmp_path), **options)
    trainer = MimicTrainer(None, args, None, rows, reference_model=models.moved(model), model_init=init)
    trainer.train()
    assert trainer.model is made[-1]
    assert len(made) > 1
    direct = fit(model, tmp_path / "direct", rows=rows, num_train_epochs=1, mimic_layers="all", **SGD)
    assert same_weights(trainer.model, direct.model)
    assert trainer.scores.to_arrow().equals(direct.scores.to_arrow())


# ---- values that are not finite ------------------------------------------------------------------------------------


def broken(batch, rows=(3,), value=torch.nan):
    """Return a batch in which the pixels of some samples are not finite."""
    batch = {name: x.clone() for name, x in batch.items()}
    batch["pixel_values"][list(rows)] = value
    return batch


def finite(model):
    return all(torch.isfinite(x).all() for x in model.state_dict().values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38], ids=str)
@pytest.mark.parametrize("layers", ["head", "all"])
def test_one_sample_that_is_not_finite(vit, tmp_path, value, layers):
    model, batch, _ = vit
    options = {"mimic_layers": layers, "temperature": 0.3, "logging_steps": 1, **SGD}
    part = {name: x[:8] for name, x in batch.items()}
    trainer = fit(model, tmp_path, rows=rows_of(broken(part, value=value)), num_train_epochs=2, **options)
    assert finite(trainer.model)
    rows = trainer.scores.to_arrow().to_pylist()[:8]
    assert {name: rows[3][name] for name in ("loss", "mimic_score", "relative_weight")} == {
        "loss": None,
        "mimic_score": None,
        "relative_weight": 0.0,
    }
    assert [entry.get("nonfinite_samples") for entry in trainer.state.log_history[:2]] == [1, 1]

    rest = {name: torch.cat([x[:3], x[4:]]) for name, x in part.items()}
    without = fit(model, tmp_path / "without", rows=rows_of(rest), num_train_epochs=2, **options)
    others = [row for row in rows if row["sample_id"] != FIRST + 3]
    for row, same in zip(others, without.scores.to_arrow().to_pylist(), strict=False):
        assert row["relative_weight"] == pytest.approx(same["relative_weight"], rel=1e-5)
        assert row["mimic_score"] == pytest.approx(same["mimic_score"], rel=1e-5, abs=1e-7)
    assert distance(trainer.model, without.model) <= 1e-6
    assert "nonfinite_samples" not in without.state.log_history[0]


def test_an_infinite_loss(vit, tmp_path):
    model, _, rows = vit

    def loss_fn(outputs, batch):
        return losses.cross_entropy(outputs, batch) + torch.where(batch["labels"] == 1, torch.inf, 0.0)

    trainer = fit(model, tmp_path, rows=rows, arguments={"loss_fn": loss_fn}, num_train_epochs=2, **SGD)
    assert finite(trainer.model)
    bad = rows["labels"][:].numpy() == 1
    assert 0 < bad.sum() < 16
    assert np.isnan(column(trainer, "loss")).tolist() == bad.tolist() * 2
    assert (column(trainer, "relative_weight") == 0).tolist() == bad.tolist() * 2


def test_a_whole_batch_that_is_not_finite(vit, tmp_path):
    model, batch, _ = vit
    rows = rows_of(broken(batch, range(8)))
    trainer = fit(model, tmp_path, rows=rows, max_steps=1, logging_steps=1, **SGD)
    assert same_weights(trainer.model, model)
    assert column(trainer, "relative_weight").tolist() == [0.0] * 8
    assert np.isnan(column(trainer, "loss")).all()
    assert trainer.state.log_history[0]["nonfinite_samples"] == 8
    both = fit(model, tmp_path / "both", rows=rows, num_train_epochs=1, **SGD)
    assert finite(both.model)
    assert not same_weights(both.model, model)


@pytest.mark.parametrize("family", ["clip", "resnet"])
def test_a_sample_that_would_spoil_its_batch(family, tmp_path):
    """In a contrastive loss and in batch norm, one sample's NaN is everyone's."""
    model, batch = models.make(family), models.make_batch(family, size=8)
    options = {"num_train_epochs": 2, "mimic_layers": "last_block", "temperature": 0.3, "logging_steps": 1, **SGD}
    trainer = fit(model, tmp_path, rows=rows_of(broken(batch)), **options)
    assert finite(trainer.model)
    rows = trainer.scores.to_arrow().to_pylist()
    assert rows[3]["loss"] is None
    assert rows[3]["relative_weight"] == 0
    assert trainer.state.log_history[0]["nonfinite_samples"] == 1
    rest = {name: torch.cat([x[:3], x[4:]]) for name, x in batch.items()}
    without = fit(model, tmp_path / "without", rows=rows_of(rest), **options)
    for name, x in trainer.model.state_dict().items():  # batch statistics too
        torch.testing.assert_close(x, without.model.state_dict()[name])
    assert not same_weights(trainer.model, model)


def test_an_overflow_inside_a_contrastive_batch_skips_it(tmp_path):
    model, batch = models.make("clip"), models.make_batch("clip", size=16)

    def loss_fn(outputs, batch):
        return losses.clip_contrastive(outputs, batch) + batch["pixel_values"].max() * 1e38

    batch["pixel_values"][3, 0, 0, 0] = 100.0
    options = {"num_train_epochs": 1, "mimic_layers": "last_block", "logging_steps": 1, **SGD}
    trainer = fit(model, tmp_path, rows=rows_of(batch), arguments={"loss_fn": loss_fn}, **options)
    assert finite(trainer.model)
    assert column(trainer, "relative_weight")[:8].tolist() == [0.0] * 8
    assert np.isfinite(column(trainer, "loss")[8:]).all()
    assert [entry.get("nonfinite_samples") for entry in trainer.state.log_history[:2]] == [8, None]


def test_a_batch_that_stays_not_finite_without_its_first_sample(tmp_path):
    model, batch = models.make("resnet"), models.make_batch("resnet", size=8)

    def loss_fn(outputs, batch):  # there is always one
        return losses.cross_entropy(outputs, batch) + torch.tensor([torch.nan] + [0.0] * (len(batch["labels"]) - 1))

    trainer = fit(model, tmp_path, rows=rows_of(batch), arguments={"loss_fn": loss_fn}, max_steps=1, **SGD)
    assert same_weights(trainer.model, model)  # batch statistics too
    assert column(trainer, "relative_weight").tolist() == [0.0] * 8


@pytest.mark.parametrize("place", ["reference", "student"])
def test_weights_that_are_not_finite(vit, tmp_path, place):
    model, _, rows = vit
    model, reference = copy.deepcopy(model), models.moved(model)
    if place == "reference":
        reference["classifier.weight"][0, 0] = torch.nan
    else:
        model.classifier.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"must be finite in the chosen layers"):
        prepare(model, tmp_path, rows=rows, reference=reference)


def test_batch_of_one_is_plain_training(vit, tmp_path):
    model, _, rows = vit
    rows = rows.select(range(4))
    options = {**QUIET, **SGD, "per_device_train_batch_size": 1, "num_train_epochs": 2}
    plain = Trainer(copy.deepcopy(model), TrainingArguments(str(tmp_path), **options), train_dataset=rows)
    plain.train()
    trainer = fit(model, tmp_path, rows=rows, **options)
    assert distance(trainer.model, plain.model) <= 1e-6
    recorded = trainer.scores.to_arrow()
    assert recorded["relative_weight"].to_pylist() == [None] * 8
    assert recorded["mimic_score"].null_count == 0


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_reference_equal_to_the_model_warns_once(vit, tmp_path):
    model, _, rows = vit
    with pytest.warns(
        UserWarning, match=r"the reference equals the model in the chosen layers \(\|\|v\|\| = 0\)"
    ) as all_:
        trainer = fit(model, tmp_path, rows=rows, reference=copy.deepcopy(model), direction="start", **SGD)
    assert len([w for w in all_ if "reference equals" in str(w.message)]) == 1
    assert column(trainer, "relative_weight").tolist() == [1.0] * 48
    assert column(trainer, "mimic_score").tolist() == [0.0] * 48


def test_no_reference(vit, tmp_path):
    model, _, rows = vit
    args = MimicTrainingArguments(str(tmp_path), **QUIET)
    with pytest.raises(ValueError, match="`reference_model` must be a Hub repo id, a folder, a model or a state dict"):
        MimicTrainer(model, args, train_dataset=rows)


def test_reference_in_a_folder(vit, tmp_path):
    model, _, rows = vit
    reference = models.make("vit", seed=3)
    reference.save_pretrained(tmp_path / "reference")
    options = {**QUIET, **SGD, "strategy": "mimic", "mimic_layers": "all"}
    args = MimicTrainingArguments(str(tmp_path / "a"), **options, reference_model=str(tmp_path / "reference"))
    read = MimicTrainer(copy.deepcopy(model), args, train_dataset=rows)
    read.train()
    given = fit(model, tmp_path / "b", rows=rows, reference=reference, mimic_layers="all", **SGD)
    assert same_weights(read.model, given.model)


@pytest.mark.parametrize("args", [None, "output", TrainingArguments("output", use_cpu=True, report_to="none")])
def test_arguments_of_another_type(vit, args):
    model, _, rows = vit
    name = type(args).__name__
    with pytest.raises(TypeError, match=f"`args` must be a MimicTrainingArguments, got {name}"):
        MimicTrainer(model, args, train_dataset=rows, reference_model=models.moved(model))


def test_labels_in_another_order(vit, tmp_path):
    model, _, rows = vit
    student, reference = copy.deepcopy(model), copy.deepcopy(model)
    for which, names in ((student, "abcd"), (reference, "abdc")):
        which.config.id2label = dict(enumerate(names))
        which.config.label2id = {name: i for i, name in enumerate(names)}
    with pytest.raises(ValueError, match=r"must order their labels alike, got 2 of 4 that differ.*2: 'c' / 'd'"):
        prepare(student, tmp_path, rows=rows, reference=reference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows.remove_columns("sample_id"),
            "must have an int64 column `sample_id`, got the columns pixel_v",
        ),
        (lambda rows: rows.cast_column("sample_id", datasets.Value("string")), "must hold integers .*such as '100'"),
        (lambda rows: rows.select([0, 1, 1]), r"must hold unique ids, got 1 repeated, such as 101 \(2 times\)"),
        (lambda rows: rows.select([]), "must have at least one row, got none"),
    ],
    ids=["missing", "strings", "duplicates", "empty"],
)
def test_bad_ids(vit, tmp_path, change, message):
    model, _, rows = vit
    with pytest.raises(ValueError, match=message):
        prepare(model, tmp_path, rows=change(rows))
    lazy = change(rows).with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match=message):
        prepare(model, tmp_path, rows=lazy)


def test_missing_ids_of_a_torch_data_set(vit, tmp_path):
    model, _, rows = vit
    plain = torch.utils.data.Subset(rows.remove_columns("sample_id"), range(16))
    with pytest.raises(ValueError, match=r"every example must have an integer `sample_id`.*record_scores=False"):
        fit(model, tmp_path, rows=plain, num_train_epochs=1)
    trainer = fit(model, tmp_path / "other", rows=plain, num_train_epochs=1, record_scores=False)
    assert not same_weights(trainer.model, model)


def test_float16_parameters(vit, tmp_path):
    model, _, rows = vit
    message = r"must be float32, bfloat16 or float64, got float16 for classifier.weight.*train with fp16=True"
    with pytest.raises(ValueError, match=message):
        prepare(copy.deepcopy(model).half(), tmp_path, rows=rows, reference=models.moved(model))


def test_reference_of_another_architecture(vit, tmp_path):
    model, _, rows = vit
    other = models.make("dinov2", num_labels=7)
    with pytest.raises(
        ValueError, match="must have every chosen parameter in the student's shape; 2 of 2 do not"
    ) as e:
        prepare(model, tmp_path, rows=rows, reference=other)
    assert "classifier.weight: (4, 32) here, (7, 64) in the reference" in str(e.value)
    assert "classifier.bias: (4,) here, (7,) in the reference" in str(e.value)
    with pytest.raises(ValueError, match="not in the reference") as e:
        prepare(model, tmp_path, rows=rows, reference=other, mimic_layers="all")
    assert str(e.value).count("\n  ") == len(list(model.parameters()))


def test_no_layer_matches(vit, tmp_path):
    model, _, rows = vit
    with pytest.raises(ValueError, match=r"clasifier.*classifier"):
        prepare(model, tmp_path, rows=rows, mimic_layers="clasifier")


def test_data_parallel(vit, tmp_path, monkeypatch):
    model, _, rows = vit
    monkeypatch.setattr(MimicTrainingArguments, "n_gpu", 2)
    message = r"one process must use one device, got 2 GPUs \(DataParallel\).* Use `accelerate launch`"
    with pytest.raises(ValueError, match=message):
        prepare(model, tmp_path, rows=rows)


def test_processes_that_would_train_alone(vit, tmp_path, monkeypatch):
    model, _, rows = vit
    trainer = prepare(model, tmp_path, rows=rows)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"2 processes were launched but each would train alone.* Without GPUs, --use_cpu"
    ):
        check_engine(trainer, reweight="all")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_deepspeed_enabled": True}, "got DeepSpeed, which keeps them to itself. Use FSDP2 to shard"),
        ({"fsdp_version": 1}, "FSDP must be version 2, got version 1.* Set fsdp_version: 2"),
        ({"fsdp_version": 2, "torch_compile": True}, "FSDP2 must be used without torch_compile=True"),
        ({"fsdp_version": 2, "reweight": "mimic_layers"}, 'FSDP2 must be used without reweight="mimic_layers"'),
        ({"tp_size": 2}, "every process must have samples of its own, got tensor, context or sequence parallelism"),
    ],
)
def test_engines_that_would_make_the_scores_wrong_are_refused(vit, tmp_path, monkeypatch, change, message):
    model, _, rows = vit
    trainer, change = prepare(model, tmp_path, rows=rows), dict(change)
    reweight = change.pop("reweight", "all")
    if "fsdp_version" in change:
        plugin = SimpleNamespace(fsdp_version=change.pop("fsdp_version"))
        monkeypatch.setattr(type(trainer.accelerator.state), "fsdp_plugin", plugin, raising=False)
    if "tp_size" in change:
        parallel = SimpleNamespace(non_data_parallel_size=change.pop("tp_size"))
        monkeypatch.setattr(type(trainer.accelerator), "parallelism_config", parallel)
    for name, value in change.items():
        setattr(trainer.args if hasattr(trainer.args, name) else trainer, name, value)
    with pytest.raises(ValueError, match=message):
        check_engine(trainer, reweight=reweight)


def test_a_model_compiled_by_hand(vit, tmp_path):
    model, _, rows = vit
    trainer = prepare(model, tmp_path, rows=rows)
    trainer.model = torch.compile(trainer.model, backend="eager")
    with pytest.raises(ValueError, match=r"`model` must be given as it was before torch.compile"):
        check_engine(trainer, reweight="all")


def test_warnings_are_errors_here():
    with pytest.raises(UserWarning, match="like this"):
        warnings.warn("like this", UserWarning, stacklevel=1)
