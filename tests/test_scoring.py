"""`score_dataset` against `mimic_scores`, batch by batch."""

import models
import pytest
import torch
from datasets import Dataset

from hf_mimic import losses
from hf_mimic.data import add_sample_ids
from hf_mimic.mimic import mimic_scores, reference_direction
from hf_mimic.scoring import score_dataset


def rows_of(batch):
    """Return a batch as a data set, its ids counting down from 100."""
    rows = Dataset.from_dict({name: x.numpy() for name, x in batch.items()}).with_format("torch")
    return rows.add_column("sample_id", list(range(100, 100 - len(rows), -1)))


@pytest.fixture(scope="module")
def vit():
    model, batch = models.make("vit"), models.make_batch("vit", size=10)
    return model, batch, rows_of(batch), reference_direction(model, models.moved(model), "all")


def test_scores_equal_those_of_each_batch():
    model, batch = models.make("clip"), models.make_batch("clip", size=10)
    direction = reference_direction(model, models.moved(model), "last_block")
    table = score_dataset(model, rows_of(batch), direction, batch_size=4).to_arrow()
    parts = [{name: x[i : i + 4] for name, x in batch.items()} for i in (0, 4, 8)]
    scores = torch.cat([mimic_scores(model, part, direction) for part in parts])
    values = dict(zip(table["sample_id"].to_pylist(), table["mimic_score"].to_pylist(), strict=True))
    torch.testing.assert_close(torch.tensor([values[100 - i] for i in range(10)]), scores)
    assert table["epoch"].to_pylist() == [0] * 10
    with torch.no_grad():
        expected = losses.clip_score(model(**batch))
    clip_scores = dict(zip(table["sample_id"].to_pylist(), table["clip_score"].to_pylist(), strict=True))
    torch.testing.assert_close(torch.tensor([clip_scores[100 - i] for i in range(10)]), expected)
    assert table["step"].to_pylist() == [0] * 4 + [1] * 4 + [2] * 2
    assert table["relative_weight"].to_pylist() == [None] * 10
    whole = score_dataset(model, rows_of(batch), direction, batch_size=10).aggregate()
    assert whole["mimic_score"].to_numpy()[::-1] != pytest.approx(scores.numpy(), rel=1e-2)  # its loss is coupled


def test_the_batch_size_does_not_matter_where_samples_do_not_meet(vit):
    model, batch, rows, direction = vit
    oracle = mimic_scores(model, batch, direction).flip(0).numpy()
    expected_losses = losses.cross_entropy(model(batch["pixel_values"]), batch).detach().flip(0).numpy()
    for size in (1, 3, 10, 64):
        table = score_dataset(model, rows, direction, batch_size=size).aggregate()
        assert table["sample_id"].to_pylist() == list(range(91, 101))
        assert table["mimic_score"].to_numpy() == pytest.approx(oracle, rel=1e-4, abs=1e-6)
        assert table["loss"].to_numpy() == pytest.approx(expected_losses, rel=1e-5)
    assert table["mimic_score"].to_numpy()[::-1] != pytest.approx(oracle, rel=1e-2)


def test_scores_follow_the_id_through_a_shuffle(vit):
    model, _, rows, direction = vit
    table = score_dataset(model, rows, direction).aggregate()
    shuffled = score_dataset(model, rows.shuffle(seed=1), direction, batch_size=3).aggregate()
    assert shuffled["mimic_score"].to_numpy() == pytest.approx(table["mimic_score"].to_numpy(), rel=1e-4, abs=1e-6)


def test_a_transform_may_drop_the_id(vit):
    model, _, rows, direction = vit
    lazy = rows.with_transform(lambda b: {k: torch.tensor(b[k]) for k in ("pixel_values", "labels")})
    plain, transformed = (score_dataset(model, r, direction).aggregate() for r in (rows, lazy))
    assert transformed["mimic_score"].to_numpy() == pytest.approx(plain["mimic_score"].to_numpy(), rel=1e-5)


def test_model_is_left_as_it_was(vit):
    model, _, rows, direction = vit
    before = {name: p.clone() for name, p in model.state_dict().items()}
    for mode in (True, False):
        model.train(mode)
        score_dataset(model, rows, direction)
        assert model.training is mode
        assert model.classifier.training is mode
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_mode_is_restored_after_an_error(vit):
    model, _, rows, direction = vit
    model.train()
    with pytest.raises(ValueError, match=r"this loss needs `labels` in the batch, got pixel_values. Rename"):
        score_dataset(model, rows.remove_columns("labels"), direction)
    assert model.training
    model.eval()


def test_dropout_is_off():
    model, batch = models.make("vit", hidden_dropout_prob=0.5), models.make_batch("vit")
    direction = reference_direction(model, models.moved(model), "all")
    first, second = (score_dataset(model.train(), rows_of(batch), direction).to_arrow() for _ in range(2))
    assert first.equals(second)


def test_own_loss_collator_and_id_column(vit):
    model, batch, rows, direction = vit

    def collate(examples):
        return {"pixel_values": torch.stack([e["pixel_values"] for e in examples]), "labels": torch.zeros(1)}

    def largest_logit(outputs, batch):
        return -outputs.logits.max(-1).values

    options = {"loss_fn": largest_logit, "collate_fn": collate, "sample_id_column": "row"}
    table = score_dataset(model, rows.rename_column("sample_id", "row"), direction, **options).aggregate()
    oracle = mimic_scores(model, batch, direction, largest_logit).flip(0)
    assert table["mimic_score"].to_numpy() == pytest.approx(oracle.numpy(), rel=1e-4, abs=1e-6)
    assert table["sample_id"].to_pylist() == list(range(91, 101))


def test_a_sample_that_is_not_a_number_is_null(vit):
    model, batch, _, direction = vit
    broken = {**batch, "pixel_values": batch["pixel_values"].clone()}
    broken["pixel_values"][3] = torch.nan
    table = score_dataset(model, rows_of(broken), direction).aggregate()
    nulls = [
        i
        for i, value in zip(*(table[n].to_pylist() for n in ("sample_id", "mimic_score")), strict=True)
        if value is None
    ]
    assert nulls == [97]
    assert table["loss"].null_count == 1


def test_ids_are_checked_first(vit):
    model, _, rows, direction = vit
    with pytest.raises(ValueError, match="must have an int64 column `sample_id`"):
        score_dataset(model, rows.remove_columns("sample_id"), direction)
    with pytest.raises(ValueError, match="must hold unique ids"):
        score_dataset(model, rows.select([0, 0]), direction)
    with pytest.raises(ValueError, match="must have at least one row"):
        score_dataset(model, rows.select([]), direction)


def test_workers_give_the_same_scores(vit):
    model, _, rows, direction = vit
    alone = score_dataset(model, rows, direction, batch_size=4)
    assert score_dataset(model, rows, direction, batch_size=4, num_workers=2).to_arrow().equals(alone.to_arrow())


def test_ids_added_here_serve(vit):
    model, _, rows, direction = vit
    numbered = add_sample_ids(rows.remove_columns("sample_id"))
    assert score_dataset(model, numbered, direction).aggregate()["sample_id"].to_pylist() == list(range(10))
