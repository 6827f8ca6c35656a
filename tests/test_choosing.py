"""Runs that choose what they train on: by the rule, in the step or before loading, resumed, and with bad input."""

import warnings

import models
import numpy as np
import pytest
import torch
from oracles import DissectByHand
from test_resuming import Killed, trainer_of
from training import FIRST, QUIET, Gradients, prepare, rows_of, same_weights
from transformers import TrainerCallback

from hf_mimic.arguments import MimicTrainingArguments
from hf_mimic.losses import clip_score
from hf_mimic.selection import ONLY_SELECT
from hf_mimic.trainer import MimicTrainer

SIZE, BATCH = 44, 8
MOVING = {"learning_rate": 1e-3, "optim": "adamw_torch", "num_train_epochs": 3, "selection_rate": 0.5}
CLIP = models.make("clip")
ROWS = rows_of(models.make_batch("clip", size=SIZE))
STEP = ("dissect", "dissect_mimic", "random", "small_loss", "big_loss", "clip_score", "rho_loss", "ref_loss", "mimic")
EPOCH = ("dissect", "dissect_mimic", "random", "scan", "info_batch", "ref_clip_score", "ref_clip_loss")


class ScoresOfEveryBatch(TrainerCallback):
    """Scores the next batch of rows in order, before the step, with the model as it is."""

    def __init__(self):
        self.scores = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        first = state.global_step % -(-SIZE // BATCH) * BATCH
        batch = {n: torch.as_tensor(ROWS[first : first + BATCH][n]) for n in ("pixel_values", "input_ids")}
        training = model.training
        model.eval()
        with torch.no_grad():
            self.scores.append(clip_score(model(**batch)).numpy())
        model.train(training)


def run(folder, strategy, *, model=CLIP, rows=ROWS, **options):
    arguments = {"callbacks": [Gradients(), ScoresOfEveryBatch()]}
    trainer = prepare(model, folder, rows=rows, arguments=arguments, **{**MOVING, "strategy": strategy, **options})
    trainer.train()
    return trainer


def chosen(trainer):
    """Return the ids of every step that were trained on."""
    rows = trainer.scores.to_arrow()
    trained = ~np.isnan(rows["relative_weight"].to_numpy())
    steps, ids = rows["step"].to_numpy()[trained], rows["sample_id"].to_numpy()[trained]
    return [sorted(ids[steps == step].tolist()) for step in range(trainer.state.global_step)]


# ---- refresh="step" -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["warmup", "momentum"])
@pytest.mark.parametrize("warmup_data", ["full", "selected"])
def test_three_epochs_follow_the_paper_s_rule(variant, warmup_data, tmp_path):
    """Ids of every batch against the rule of oracles.py, fed with scores of its own forward passes."""
    trainer = run(tmp_path, "dissect", variant=variant, warmup_data=warmup_data)
    scores = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ScoresOfEveryBatch)).scores
    rule = DissectByHand("0.5", variant, warmup_data=warmup_data, seed=42)
    turned = DissectByHand("0.5", variant, warmup_data=warmup_data, seed=42)  # the control keeps rising scores
    expected, wrong = [], []
    for step, values in enumerate(scores):
        epoch, place = divmod(step, -(-SIZE // BATCH))
        ids = list(range(FIRST + place * BATCH, FIRST + place * BATCH + len(values)))
        expected.append([ids[i] for i in rule.choose(ids, values, epoch)])
        rule.update(ids, values, epoch)
        wrong.append([ids[i] for i in turned.choose(ids, -values, epoch)])
        turned.update(ids, -values, epoch)
    assert len(scores) == 18
    assert chosen(trainer) == expected
    assert wrong != expected


@pytest.mark.parametrize("strategy", STEP)
def test_every_strategy_keeps_the_best_of_a_batch(strategy, tmp_path):
    trainer = run(tmp_path, strategy, num_train_epochs=1, variant="momentum")
    rows = trainer.scores.to_arrow().to_pandas()
    assert [len(ids) for ids in chosen(trainer)] == [4, 4, 4, 4, 4, 2]
    assert rows.kept.tolist() == (~rows.relative_weight.isna()).astype(float).tolist()
    column = {"small_loss": "loss", "big_loss": "loss", "clip_score": "clip_score", "ref_loss": "ref_loss"}.get(
        strategy
    )
    first = rows[rows.step == 0]
    if strategy == "clip_score":
        assert first[first.kept == 1][column].min() >= first[first.kept == 0][column].max()
    scored = {"random": 0, "ref_loss": 0}.get(strategy, SIZE)
    counts = {"samples_decoded": SIZE, "samples_scored": scored, "samples_forward": 22, "samples_backward": 22}
    assert trainer.ledger.counts.items() >= counts.items()


def test_what_is_kept_is_trained_on_with_equal_weights(tmp_path):
    """The gradient is that of the mean loss of the four pairs with the smallest losses among each other's eight."""
    trainer = run(tmp_path, "small_loss", num_train_epochs=1)
    batch = {n: torch.as_tensor(ROWS[:BATCH][n]) for n in ("pixel_values", "input_ids")}
    with torch.no_grad():
        losses = trainer.loss_fn(CLIP(**batch), batch)
    best = losses.argsort()[:4].sort().values
    part = {name: x[best] for name, x in batch.items()}
    CLIP.zero_grad()
    trainer.loss_fn(CLIP(**part), part).mean().backward()
    step = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Gradients)).steps[0]
    for name, parameter in CLIP.named_parameters():
        torch.testing.assert_close(step[name], parameter.grad, rtol=1e-4, atol=1e-6)
    CLIP.zero_grad()


def test_only_the_last_epoch_of_a_warm_up_on_everything_is_scored(tmp_path):
    """The scores of the others would be overwritten unread; what is chosen afterwards is the same."""
    options = {"warmup_epochs": 2, "num_train_epochs": 4}
    trainer, dropping = (
        run(tmp_path / "a", "dissect", **options),
        run(tmp_path / "b", "dissect", dataloader_drop_last=True, rows=ROWS.select(range(40)), **options),
    )
    assert trainer.ledger.counts["samples_scored"] == 3 * SIZE
    assert dropping.ledger.counts["samples_scored"] == 4 * 40  # a sample may be dropped from the last one
    rows = trainer.scores.to_arrow().to_pandas()
    assert rows[rows.epoch == 0].kept.tolist() == [1.0] * SIZE
    assert trainer.choice.rule.history.lookup(torch.arange(FIRST, FIRST + SIZE))["history"].isfinite().all()


def test_dissect_and_mimic_weights_together(tmp_path):
    trainer = run(tmp_path, "dissect_mimic", temperature="0.1", warmup_data="selected")
    rows = trainer.scores.to_arrow().to_pandas()
    rows = rows[(rows.step == 7) & (rows.kept == 1)]
    weights = torch.softmax(torch.tensor(rows.mimic_score.to_numpy()).double() / 0.1, 0) * len(rows)
    assert rows.relative_weight.tolist() == pytest.approx(weights.tolist(), rel=1e-3)
    assert rows.relative_weight.std() > 0.01


def test_no_reference_is_needed(tmp_path):
    args = MimicTrainingArguments(str(tmp_path), **{**QUIET, **MOVING, "strategy": "dissect", "logging_steps": 3})
    trainer = MimicTrainer(models.make("clip"), args, train_dataset=ROWS)
    trainer.train()
    rows = trainer.scores.to_arrow()
    assert rows["mimic_score"].null_count == len(rows)
    assert rows["clip_score"].null_count == 0
    log = trainer.state.log_history[0]
    assert not {"mimic_score_mean", "direction_norm", "negative_share", "unhealthy"} & set(log)
    assert log["samples_scored"] == 24
    assert log["compute"] == pytest.approx(24 / 3 + 24)
    args = MimicTrainingArguments(str(tmp_path), **{**QUIET, "strategy": "mimic"})
    with pytest.raises(ValueError, match=r"for strategy=\"mimic\", got none\. Without one there is nothing to mimic"):
        MimicTrainer(models.make("clip"), args, train_dataset=ROWS)


def test_accumulated_micro_batches_are_chosen_from_one_by_one(tmp_path):
    """The official code does not choose at all with accumulation."""
    options = {"num_train_epochs": 2, "learning_rate": 0.0, "gradient_accumulation_steps": 3}
    trainer, plain = run(tmp_path / "a", "dissect", **options), run(tmp_path / "b", "dissect", num_train_epochs=2)
    sizes = [len(ids) for ids in chosen(trainer)]
    assert sizes == [24, 20, 12, 10]
    assert [len(ids) for ids in chosen(plain)][6:] == [4, 4, 4, 4, 4, 2]


def test_chosen_pairs_of_a_cached_step(tmp_path):
    """16 candidates at once, and 4 x 4 of which 2 are chosen each: the same gradient if the same are chosen."""
    options = {"num_train_epochs": 1, "variant": "momentum", "mimic_layers": "all", "self_check_steps": 1}
    cached = run(tmp_path, "dissect", cache_negatives=True, gradient_accumulation_steps=2, **options)
    assert [len(ids) for ids in chosen(cached)] == [8, 8, 6]
    assert cached.ledger.counts["samples_scored"] == SIZE + 22


# ---- refresh="epoch" ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", EPOCH)
def test_what_is_dropped_before_loading_costs_nothing(strategy, tmp_path):
    trainer = run(tmp_path, strategy, refresh="epoch", selection_rate=0.6, rescore_share=0.1)
    counts, rows = trainer.ledger.counts, trainer.scores.to_arrow()
    again = counts["samples_scored"]
    assert counts["samples_decoded"] == counts["samples_forward"] + again
    assert len(rows) == counts["samples_forward"] < 3 * SIZE
    assert again == (4 * 1 if strategy in ("dissect", "dissect_mimic") else 0)
    assert trainer.state.global_step == 18
    assert trainer.state.epoch == 3


def test_an_oracle_s_coreset(tmp_path):
    trainer = run(tmp_path, "ref_clip_loss")
    best = trainer.reference_scores.losses.argsort()[: SIZE // 2]
    expected = {FIRST + int(i) for i in best}
    for first in (0, 6, 12):
        assert {i for ids in chosen(trainer)[first : first + 6] for i in ids} == expected


def test_a_coreset_by_clip_score(tmp_path):
    trainer = run(tmp_path, "ref_clip_score", num_train_epochs=1)
    scores, kept = trainer.reference_scores.clip_scores, {i for ids in chosen(trainer) for i in ids}
    inside = np.isin(np.arange(FIRST, FIRST + SIZE), list(kept))
    assert inside.sum() == SIZE // 2
    assert scores[inside].min() >= scores[~inside].max()  # many are 0


def test_deltas_of_the_last_epoch_choose(tmp_path):
    """With a model that does not move all deltas are 0 and chance decides; other epochs then train on others."""
    trainer = run(tmp_path, "dissect", refresh="epoch", learning_rate=0.0, num_train_epochs=3)
    epochs = [{i for ids in chosen(trainer)[first : first + 6] for i in ids} for first in (0, 6, 12)]
    assert [len(epoch) for epoch in epochs] == [44, 22, 22]
    assert epochs[1] != epochs[2]


# ---- resuming -------------------------------------------------------------------------------------------------------


CHOOSING = [
    ("dissect", "step", "momentum"),
    ("dissect", "step", "warmup"),
    ("dissect", "epoch", "warmup"),
    ("info_batch", "step", "warmup"),
    ("scan", "step", "warmup"),
]


@pytest.mark.parametrize(("strategy", "refresh", "variant"), CHOOSING)
@pytest.mark.parametrize("kill", [3, 9, 14])
def test_a_resumed_run_chooses_the_same(strategy, refresh, variant, kill, tmp_path):
    options = {"family": "clip", "strategy": strategy, "refresh": refresh, "variant": variant, "selection_rate": 0.6}
    options |= {"save_steps": 1, "rescore_share": 0.2}
    whole = trainer_of(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(Killed):
        trainer_of(tmp_path / "killed", kill=kill, **options).train()
    again = trainer_of(tmp_path / "killed", **options)
    again.train(resume_from_checkpoint=True)
    assert again.scores.to_arrow().to_pydict() == whole.scores.to_arrow().to_pydict()
    assert same_weights(again.model, whole.model)
    assert again.ledger.counts == whole.ledger.counts


def test_a_checkpoint_without_history(tmp_path):
    options = {"family": "clip", "strategy": "dissect", "save_steps": 1}
    with pytest.raises(Killed):
        trainer_of(tmp_path, kill=3, **options).train()
    next(tmp_path.glob("checkpoint-3/selection_history.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"goes on from the scores of earlier epochs, .* is missing"):
        trainer_of(tmp_path, **options).train(resume_from_checkpoint=True)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_the_default_rate(tmp_path):
    for strategy in ("dissect", "small_loss"):
        args = prepare(CLIP, tmp_path, strategy=strategy).args
        assert args.selection_rate == (0.5 if strategy in ONLY_SELECT else 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "dissect", "selection_rate": 0.2}, "must keep at least 2 pairs of a batch, .* got 0.2 of 8"),
        ({"strategy": "dissect", "selection_rate": 0.0}, r"`selection_rate` must be in \(0, 1\], got 0.0"),
        (
            {"strategy": "small_loss", "selection_rate": 0.5, "refresh": "epoch"},
            "must come with dissect, dissect_mimic or",
        ),
        ({"strategy": "scan", "selection_rate": 0.5}, 'must be 0.55 at least with strategy="scan", .* got 0.5'),
        ({"strategy": "uniform", "selection_rate": 0.5}, 'must be 1 with strategy="uniform", .* got 0.5'),
        ({"strategy": "dissect", "refresh": "epochs"}, "`refresh` must be one of 'step', 'epoch', got 'epochs'"),
        ({"strategy": "dissect", "momentum": 1.0}, r"`momentum` must be in \[0, 1\), got 1.0"),
        (
            {"strategy": "scan", "accelerator_config": {"dispatch_batches": True}},
            "chooses the batches of every process itself",
        ),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(CLIP, tmp_path, rows=ROWS, **options)


def test_a_stream_cannot_be_chosen_from_before_loading(tmp_path):
    with pytest.raises(ValueError, match="chooses before loading, which needs a data set with a length, got a stream"):
        prepare(CLIP, tmp_path, rows=ROWS.to_iterable_dataset(), strategy="scan", max_steps=3)


def test_a_stream_is_chosen_from_in_the_step(tmp_path):
    stream = ROWS.to_iterable_dataset(num_shards=2)
    trainer = run(tmp_path, "dissect", rows=stream, max_steps=12, num_train_epochs=1)
    assert [len(ids) for ids in chosen(trainer)][6:] == [4, 4, 4, 4, 4, 2]


def test_clip_scores_of_labels(tmp_path):
    trainer = prepare(models.make("vit"), tmp_path, rows=rows_of(models.make_batch("vit")), strategy="dissect")
    with pytest.raises(ValueError, match=r"needs image-text pairs: a model whose outputs .* got ViTForImageClass"):
        trainer.train()


def test_small_losses_of_labels(tmp_path):
    rows = rows_of(models.make_batch("vit", size=16))
    trainer = prepare(models.make("vit"), tmp_path, rows=rows, strategy="small_loss", selection_rate=0.5)
    trainer.train()
    table = trainer.scores.to_arrow().to_pandas()
    assert table.kept.sum() == 8 * 3
    assert table.clip_score.isna().all()


def test_broken_pairs_are_not_chosen(tmp_path):
    batch = models.make_batch("clip", size=SIZE)
    batch["pixel_values"][3, 0, 0, 0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = run(tmp_path, "dissect", rows=rows_of(batch), variant="momentum", num_train_epochs=1)
    assert FIRST + 3 not in {i for ids in chosen(trainer) for i in ids}


@pytest.mark.parametrize("strategy", ["small_loss", "big_loss", "rho_loss", "mimic"])
def test_a_broken_pair_does_not_spoil_the_ranking_of_its_batch(strategy, tmp_path):
    """The losses of the other seven are those that they have among themselves."""
    batch = models.make_batch("clip", size=BATCH)
    batch["pixel_values"][3, 0, 0, 0] = torch.nan
    trainer = run(tmp_path, strategy, rows=rows_of(batch), num_train_epochs=1, mimic_layers="all")
    rows = trainer.scores.to_arrow().to_pandas().set_index("sample_id")
    assert rows.kept.sum() == 4
    assert rows.kept[FIRST + 3] == 0
    assert rows.loss.notna().sum() == 7
    if strategy in ("small_loss", "big_loss"):
        others = torch.arange(BATCH) != 3
        part = {name: x[others] for name, x in batch.items()}
        with torch.no_grad():
            losses = trainer.loss_fn(CLIP(**part), part)
        best = losses.argsort(descending=strategy == "big_loss")[:4]
        ids = torch.arange(FIRST, FIRST + BATCH)[others]
        assert set(rows.index[rows.kept == 1]) == set(ids[best].tolist())


def test_no_pair_is_left_alone_at_the_end_of_an_epoch(tmp_path):
    """6 of 22 pairs are in the last batch; a quarter of them would be one."""
    options = {"refresh": "epoch", "variant": "momentum", "selection_rate": 0.25}
    trainer = run(tmp_path, "dissect", rows=ROWS.select(range(22)), num_train_epochs=2, **options)
    assert [len(ids) for ids in chosen(trainer)] == [2, 2, 2] * 2


def test_samples_without_ids(tmp_path):
    rows = [{n: x[i] for n, x in models.make_batch("clip", size=8).items()} for i in range(8)]
    trainer = prepare(CLIP, tmp_path, rows=rows, strategy="dissect", record_scores=False)
    with pytest.raises(ValueError, match="needs an integer `sample_id` with every example, got none"):
        trainer.train()


# ---- said instead of done silently ----------------------------------------------------------------------------------


def test_a_run_that_ends_in_the_warm_up_says_so(tmp_path):
    with pytest.warns(UserWarning, match=r"longer than the warm-up .* got 2 epochs and warmup_epochs=2"):
        run(tmp_path / "a", "dissect", num_train_epochs=2, warmup_epochs=2)
    with pytest.warns(UserWarning, match="got 1 epochs"):
        run(tmp_path / "b", "dissect", max_steps=3)
    run(tmp_path / "c", "dissect", num_train_epochs=1, variant="momentum")


def test_info_batch_anneals_at_the_end_of_max_steps(tmp_path):
    """The Trainer pays no heed to `num_train_epochs` where there is `max_steps`; nor does the share kept."""
    steps, epochs = (
        run(tmp_path / "a", "info_batch", max_steps=36, num_train_epochs=1),
        run(tmp_path / "b", "info_batch", num_train_epochs=6),
    )
    assert chosen(steps) == chosen(epochs)
    assert len(steps.scores.to_arrow()) < 5 * SIZE


class Pairs(torch.utils.data.Dataset):
    """Rows with ids, an `ids` that means something else, and maybe `sample_ids`."""

    def __init__(self, **attributes):
        self.ids = ["of something else"] * SIZE
        vars(self).update(attributes)

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return ROWS[int(index)]


def test_ids_of_a_data_set_of_one_s_own(tmp_path):
    ids = torch.arange(FIRST, FIRST + SIZE)
    options = {"refresh": "epoch", "num_train_epochs": 2}
    own, hub = (
        run(tmp_path / "a", "dissect", rows=Pairs(sample_ids=ids), **options),
        run(tmp_path / "b", "dissect", **options),
    )
    assert chosen(own) == chosen(hub)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, r"or have an attribute `sample_ids` \(N,\), got Pairs without"),
        ({"sample_ids": list(range(10))}, r"different integers \(44,\), one for each row, got int64 of shape \(10,\)"),
        ({"sample_ids": [0.5 + i for i in range(SIZE)]}, "got float64"),
        ({"sample_ids": [str(i) for i in range(SIZE)]}, "must be different integers"),
        ({"sample_ids": [i // 2 for i in range(SIZE)]}, "22 of them different"),
    ],
)
def test_ids_that_are_none(tmp_path, attributes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "dissect", rows=Pairs(**attributes), refresh="epoch")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"refresh": "epoch"}, {"refresh": "step"}),
        ({"refresh": "step"}, {"refresh": "epoch"}),
        ({"refresh": "epoch"}, {"strategy": "scan", "selection_rate": 0.6}),
    ],
)
def test_a_checkpoint_of_another_way_of_choosing(tmp_path, before, after):
    options = {"family": "clip", "strategy": "dissect", "save_steps": 1}
    with pytest.raises(Killed):
        trainer_of(tmp_path, kill=9, **{**options, **before}).train()
    again = trainer_of(tmp_path, **{**options, **after})
    with (
        pytest.warns(UserWarning, match="resumed with other settings"),
        pytest.raises(ValueError, match="by the same way of choosing only, got strategy="),
    ):
        again.train(resume_from_checkpoint=True)
