"""The numbers of a report against slow, obviously right twins; which rows and pictures a page gets; neighbours' votes."""

import math

import numpy as np
import pyarrow as pa
import pytest
from reports import NAMES, NAN, table_of
from sklearn.metrics import cohen_kappa_score

from hf_mimic import report_numbers as numbers
from hf_mimic.neighbours import confusions, neighbour_votes
from hf_mimic.report_sampling import best_and_worst, choose_pictures, choose_rows
from hf_mimic.scores import ScoreTable


def test_summary_leaves_out_what_is_not_known():
    found = numbers.summary(np.array([1.0, NAN, 3.0, 2.0]))
    assert (found["rows"], found["scored"], found["mean"], found["min"], found["max"]) == (4, 3, 2.0, 1.0, 3.0)
    assert found["quantiles"]["0.5"] == 2.0
    assert numbers.summary(np.full(3, NAN))["mean"] is None


def test_values_by_epoch_against_a_dictionary():
    generator, table, seen = np.random.default_rng(0), ScoreTable(), {}
    for step in range(12):
        ids = generator.choice(20, 8, replace=False)
        scores = generator.normal(size=8).astype(np.float32)
        table.record(ids, epoch=step // 4, step=step, mimic_score=scores)
        for i, score in zip(ids, scores, strict=True):
            seen.setdefault((int(i), step // 4), []).append(float(score))
    epochs, values = numbers.by_epoch(table.matrix("mimic_score"))
    assert epochs.tolist() == [0, 1, 2]
    ids = sorted({i for i, _ in seen})
    slow = [[np.mean(seen[i, e]) if (i, e) in seen else NAN for e in range(3)] for i in ids]
    np.testing.assert_allclose(values, slow, rtol=1e-6)
    assert np.isnan(values).any()


def test_many_epochs_are_thinned_out_and_both_ends_stay():
    epochs, values = numbers.by_epoch(table_of([0.1, 0.2], epochs=40).matrix("mimic_score"))
    assert (len(epochs), epochs[0], epochs[-1]) == (12, 0, 39)
    assert values.shape == (2, 12)


def test_epochs_of_rows_from_elsewhere():
    plain = ScoreTable.from_arrow(pa.table({"sample_id": [0, 1], "loss": [1.0, 2.0]}))
    epochs, values = numbers.by_epoch(plain.matrix("loss"))
    assert (epochs.tolist(), values.tolist()) == ([0], [[1.0], [2.0]])  # all of one epoch, as `matrix` says
    rows = {"sample_id": [0, 1, 0], "epoch": [0, 0, 1], "step": [0, 0, 1], "loss": [1.0, np.inf, np.nan]}
    epochs, values = numbers.by_epoch(ScoreTable.from_arrow(pa.table(rows)).matrix("loss"))
    assert (epochs.tolist(), values.tolist()) == ([0], [[1.0]])  # what is not finite is no score


def test_distributions_count_every_value():
    values = np.random.default_rng(0).standard_t(2, size=(500, 2))
    values[::7, 1] = NAN
    found = numbers.distributions(np.array([3, 4]), values)
    assert [sum(row["counts"]) for row in found["epochs"]] == [500, np.isfinite(values[:, 1]).sum()]
    assert found["epochs"][1]["median"] == np.nanmedian(values[:, 1])
    equal = numbers.distributions(np.array([0]), np.zeros((5, 1)))
    assert sum(equal["epochs"][0]["counts"]) == 5
    assert np.all(np.diff(equal["edges"]) > 0)


def test_drift_is_spearman_over_what_both_epochs_have():
    from scipy.stats import spearmanr

    values = np.random.default_rng(0).normal(size=(60, 3))
    values[:, 1] += values[:, 0]
    values[:5, 1] = NAN
    matrix = numbers.drift(np.arange(3), values)["rank_correlation"]
    assert matrix[0][1] == pytest.approx(spearmanr(values[5:, 0], values[5:, 1]).statistic)
    assert matrix[0][1] != pytest.approx(spearmanr(values[5:, 0], values[5:, 2]).statistic, abs=0.1)
    assert matrix[0][0] == pytest.approx(1)
    assert math.isnan(numbers.rank_correlation(np.ones(5), np.arange(5.0)))
    assert math.isnan(numbers.rank_correlation(np.ones(2), np.arange(2.0)))


def test_classes_against_a_loop():
    generator = np.random.default_rng(0)
    labels, score = generator.integers(-1, 3, 200), generator.normal(size=200)
    score[::9] = NAN
    keep = ~(score < 0)
    rows = numbers.per_class(labels, NAMES, score, keep, trust=score / 2)
    assert [row["class"] for row in rows] == NAMES
    for c, row in enumerate(rows):
        own = labels == c
        assert (row["count"], row["kept"]) == (own.sum(), keep[own].sum())
        assert row["kept_share"] == pytest.approx(keep[own].mean())
        assert row["mean_score"] == pytest.approx(np.nanmean(score[own]))
        assert row["mean_trust"] == pytest.approx(np.nanmean(score[own]) / 2)
    assert numbers.per_class(np.full(3, -1), [], np.ones(3), np.ones(3, bool)) == []


def test_agreement_is_cohens_kappa():
    generator = np.random.default_rng(0)
    a = generator.random(300) < 0.4
    b = np.where(generator.random(300) < 0.8, a, ~a)
    found = numbers.agreement({"a": a, "b": b, "all": np.ones(300, bool)})
    assert found["kappa"][0][1] == pytest.approx(cohen_kappa_score(a, b))
    assert found["equal"][0][1] == pytest.approx((a == b).mean())
    assert found["kappa"][2][2] is None  # chance alone agrees always
    assert found["kept"][0] == {"kept": int(a.sum()), "kept_share": a.mean()}


def test_score_by_caption_length():
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 90, 1000)
    score = 1 - lengths / 100 + generator.normal(0, 0.05, 1000)
    score[::11] = NAN
    found = numbers.by_length(lengths, score)
    there = np.isfinite(score) & (lengths > 0)
    assert found["captions"] == sum(row["count"] for row in found["bins"]) == there.sum()
    assert found["rank_correlation"] < -0.9
    for row in found["bins"]:
        own = there & (lengths >= row["from"]) & (lengths <= row["to"])
        assert row["count"] == own.sum() >= there.sum() / 40
        assert row["mean"] == pytest.approx(score[own].mean())
    assert numbers.by_length(np.zeros(3, int), np.ones(3)) is None
    assert len(numbers.by_length(np.full(9, 5), np.ones(9))["bins"]) == 1


def test_quality_is_drawn_against_noise_where_it_is_known_everywhere():
    rows = {"a": {"noise_rate": 0.1, "retained": 0.9}, "b": {"noise_rate": 0.3, "retained": 0.6, "noise": 0.3}}
    (curve,) = numbers.quality_curves(rows)
    assert (curve["names"], curve["x"], curve["y"]) == (("noise rate", "retained"), [0.1, 0.3], [0.9, 0.6])
    rows["a"]["noise"] = 0.0
    assert [c["names"] for c in numbers.quality_curves(rows)] == [("noise", "noise rate"), ("noise", "retained")]
    assert numbers.quality_curves({"a": rows["a"]}) == []


# ---- which rows ----------------------------------------------------------------------------------------------------


def test_a_sample_has_each_class_and_each_part_of_its_scores_in_proportion():
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2, -1], [7000, 2000, 900, 100])
    score = generator.normal(size=10_000)
    rows = choose_rows(score, labels, 1000, seed=0)
    assert (np.diff(rows) > 0).all()
    assert len(rows) == 1000
    assert np.abs(np.bincount(labels[rows] + 1) - [10, 700, 200, 90]).max() <= 1
    low = score < np.quantile(score[labels == 0], 0.1)
    assert abs((low & (labels == 0))[rows].sum() - 70) <= 1
    assert (rows == choose_rows(score, labels, 1000, seed=0)).all()
    assert (rows != choose_rows(score, labels, 1000, seed=1)).any()
    assert choose_rows(score, labels, 10_000, seed=0).tolist() == list(range(10_000))


def test_no_row_is_both_best_and_worst():
    score = np.array([0.3, NAN, 0.9, -1.0, 0.5])
    best, worst = best_and_worst(score)
    assert (best.tolist(), worst.tolist()) == ([2, 4], [3, 0])
    best, worst = best_and_worst(np.array([NAN, 1.0]))
    assert (best.tolist(), worst.tolist()) == ([1], [])
    assert len(best_and_worst(np.full(3, NAN))[0]) == 0


def test_pictures_of_the_best_the_worst_the_nearest_and_some_of_all():
    score = np.random.default_rng(0).random(5000)
    rows, rank = np.arange(5000), np.argsort(np.argsort(score))
    chosen = choose_pictures(score, rows, 0.3, 200, seed=0)
    assert len(chosen) == len(set(chosen.tolist())) == 200
    assert {0, 23, 4999, 4976} <= {*rank[chosen].tolist()}
    place = (score < 0.3).sum()
    assert {*range(place - 40, place + 40)} <= {*rank[chosen].tolist()}
    assert np.diff(np.sort(rank[chosen])).max() < 80
    assert len(choose_pictures(score, rows, 0.3, 7, seed=0)) == 7
    assert len(choose_pictures(score, rows, 0.3, 0, seed=0)) == 0
    assert len(choose_pictures(score[:3], rows[:3], 0.3, 50, seed=0)) == 3


@pytest.mark.parametrize(("call", "message"), [(choose_rows, "`max_rows` must be at least 1, got 0")])
def test_limits(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones(3), np.zeros(3, int), 0, 0)
    with pytest.raises(ValueError, match="`max_images` must be at least 0, got -1"):
        choose_pictures(np.ones(3), np.arange(3), 0.5, -1, 0)


# ---- neighbours ----------------------------------------------------------------------------------------------------


def slow_vote(points, labels, keep, row, size):
    """Return the winner of a vote, one distance at a time."""
    points = points - points.mean(0)
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    others = [i for i in range(len(labels)) if keep[i] and labels[i] >= 0 and i != row]
    near = sorted(others, key=lambda i: np.linalg.norm(points[i] - points[row]))[:size]
    votes = [labels[i] for i in near]
    rank = {c: sum(size - k for k, v in enumerate(votes) if v == c) for c in set(votes)}
    return max(set(votes), key=lambda c: (votes.count(c), rank[c]))


def test_votes_of_kept_neighbours_against_a_loop():
    generator = np.random.default_rng(0)
    labels = generator.integers(-1, 3, 80)
    points = np.eye(3)[labels] + generator.normal(0, 0.6, (80, 3))
    keep = generator.random(80) < 0.7
    asked, said = neighbour_votes(points, labels, keep, neighbours=4)
    assert asked.tolist() == np.flatnonzero(labels >= 0).tolist()
    assert said.tolist() == [slow_vote(points, labels, keep, row, 4) for row in asked]
    assert said.tolist() != [slow_vote(points, labels, np.ones(80, bool), row, 4) for row in asked]


def test_few_voters_and_bad_features():
    points, labels = np.eye(4), np.array([0, 0, 1, 1])
    asked, said = neighbour_votes(points, labels, np.array([True, False, True, False]))
    assert (asked.tolist(), said[[0, 2]].tolist()) == ([0, 1, 2, 3], [1, 0])
    with pytest.raises(ValueError, match=r"at least 2 kept and labelled samples, got 1\. Lower the cut"):
        neighbour_votes(points, labels, np.arange(4) == 0)
    with pytest.raises(
        ValueError, match=r"must be \(N, D\) with one row per row of the data set, N = 4, got \(3, 4\)"
    ):
        neighbour_votes(points[:3], labels, np.ones(4, bool))
    points[1, 1] = NAN
    with pytest.raises(ValueError, match="must be finite, got 1 of 4 that are not"):
        neighbour_votes(points, labels, np.ones(4, bool))


def test_confusions_are_counted():
    given, said = np.array([0, 0, 0, 1, 2, 2]), np.array([0, 1, 1, 1, 0, 2])
    found = confusions(given, said, NAMES)
    assert found["matrix"] == [[1, 2, 0], [0, 1, 0], [1, 0, 1]]
    assert found["agree"] == pytest.approx(3 / 6)
    assert found["pairs"][0] == {"given": "ant", "neighbours": "bee", "count": 2, "share": pytest.approx(2 / 3)}
    assert confusions(given, said, [str(i) for i in range(101)])["matrix"] is None
