"""`score_corpus`: whole, in shards, killed and resumed: the same scores, each sample once; two processes in test_distributed."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from corpora import ROWS, make_pass, scores_of
from datasets import Dataset

from hf_mimic import corpus
from hf_mimic.corpus import score_corpus
from hf_mimic.corpus_folder import Layout, default_part_batches, summary
from hf_mimic.judge import LabelJudge
from hf_mimic.scores import ScoreTable
from hf_mimic.scoring import score_dataset


@pytest.fixture(scope="module")
def passes():
    return {family: make_pass(family) for family in ("vit", "clip")}


@pytest.fixture(scope="module")
def whole(passes, tmp_path_factory):
    """Return the rows of each pass, made by one call."""
    folder = tmp_path_factory.mktemp("whole")
    for family, task in passes.items():
        score_corpus(task, folder / family)
    return {family: scores_of(folder / family) for family in passes}


@pytest.fixture
def counted(monkeypatch):
    """Return the ids of the rows that are scored from here on; set `counted.stop` to fail after so many batches."""

    class Counted(list):
        stop = 10**9

    seen, score = Counted(), corpus.score_columns

    def score_columns(model, batch, *given):
        if len(seen) >= seen.stop:
            raise RuntimeError("killed")
        seen.append(len(next(iter(batch.values()))))
        return score(model, batch, *given)

    monkeypatch.setattr(corpus, "score_columns", score_columns)
    return seen


# ---- the same scores, however the work is split --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "clip"])
def test_scores_are_those_of_score_dataset(passes, whole, family):
    task = passes[family]
    options = {"reference": task.reference, "batch_size": 4}
    expected = score_dataset(task.model, task.dataset, task.direction, **options).to_arrow().to_pydict()
    assert sorted(whole[family]["sample_id"]) == sorted(task.dataset["sample_id"][:].tolist())
    for name, values in expected.items():
        if name == "ref_trust" and family == "vit":
            assert min(values) < 0.5 < max(values)  # it tells the wrong labels
            assert whole[family][name] == pytest.approx(values, abs=1e-5)
        else:
            assert whole[family][name] == values, name


@pytest.mark.parametrize("family", ["vit", "clip"])
@pytest.mark.parametrize("part_batches", [1, 2, 5])
def test_shards_give_the_scores_of_one_call(passes, whole, tmp_path, family, part_batches):
    for index in (2, 0, 1):
        report = score_corpus(passes[family], tmp_path, shard=(index, 3), part_batches=part_batches)
        assert report.found == 0
    assert report.elsewhere == 0
    assert scores_of(tmp_path) == whole[family]


def test_other_batches_would_give_other_scores(passes, whole, tmp_path):
    """The control: a contrastive score depends on its batch."""
    score_corpus(dataclasses.replace(passes["clip"], batch_size=5), tmp_path)
    assert scores_of(tmp_path)["mimic_score"] != pytest.approx(whole["clip"]["mimic_score"], rel=1e-3)


@pytest.mark.parametrize("killed", [0, 1, 5, 10])
def test_a_killed_pass_goes_on_where_it_stopped(passes, whole, tmp_path, counted, killed):
    counted.stop = killed
    with pytest.raises(RuntimeError, match="killed"):
        score_corpus(passes["clip"], tmp_path, part_batches=2)
    counted.stop = 10**9
    report = score_corpus(passes["clip"], tmp_path, part_batches=2)
    assert (report.found, report.parts) == (killed // 2, 6)
    assert len(counted) == 11 + killed % 2  # a batch of a part that was not written is scored again
    assert scores_of(tmp_path) == whole["clip"]


def test_a_pass_that_goes_on_in_more_shards(passes, whole, tmp_path, counted):
    counted.stop = 3
    with pytest.raises(RuntimeError, match="killed"):
        score_corpus(passes["vit"], tmp_path, part_batches=1)
    counted.stop = 10**9
    reports = [score_corpus(passes["vit"], tmp_path, part_batches=1, shard=(index, 4)) for index in range(4)]
    assert [report.found for report in reports] == [2, 1, 0, 0]
    assert len(counted) == 11
    assert scores_of(tmp_path) == whole["vit"]


def test_what_is_there_is_not_scored_again(passes, whole, tmp_path, counted):
    score_corpus(passes["vit"], tmp_path)
    report = score_corpus(passes["vit"], tmp_path)
    assert (report.found, report.parts, report.rows, len(counted)) == (11, 11, 0, 11)
    assert report.told() == {"were there already": "11 of 11 parts (--overwrite scores them again)"}
    report = score_corpus(passes["vit"], tmp_path, shard=(1, 2), overwrite=True)
    assert (report.found, report.parts, report.rows, len(counted)) == (0, 6, 24, 17)
    assert scores_of(tmp_path) == whole["vit"]


def test_more_shards_than_parts(passes, whole, tmp_path):
    reports = [score_corpus(passes["clip"], tmp_path, shard=(i, 8), part_batches=3) for i in range(8)]
    assert [report.parts for report in reports] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert reports[0].told()["shard"] == "0 of 8 (from 0), 0 parts: empty, there are fewer parts than shards"
    assert reports[1].told()["not there yet"] == "3 parts of other shards"
    assert scores_of(tmp_path) == whole["clip"]


# ---- the trust in labels -------------------------------------------------------------------------------------------


def test_shards_judge_alike_from_a_sample_of_all_rows(passes, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "fitted_rows", lambda classes: 22)
    score_corpus(passes["vit"], tmp_path / "whole")
    for index in range(3):  # each on a machine of its own
        score_corpus(passes["vit"], tmp_path / str(index), shard=(index, 3))
    apart = [scores_of(tmp_path / str(index)) for index in range(3)]
    expected = scores_of(tmp_path / "whole")["ref_trust"]
    assert [x for rows in apart for x in rows["ref_trust"]] == expected
    monkeypatch.setattr(corpus, "fitted_rows", lambda classes: 40)  # the control: another sample, another judge
    score_corpus(passes["vit"], tmp_path / "other")
    assert scores_of(tmp_path / "other")["ref_trust"] != pytest.approx(expected, abs=1e-4)


def test_the_judge_is_kept(passes, tmp_path, monkeypatch):
    for index in range(2):
        score_corpus(passes["vit"], tmp_path, shard=(index, 2))
        monkeypatch.setattr(LabelJudge, "fit", None)  # not asked again
    assert ScoreTable.load(tmp_path).aggregate()["trust"].null_count == 0


def test_a_judge_survives_its_file(tmp_path):
    rng = np.random.default_rng(0)
    log_probs, labels = np.log(rng.dirichlet([0.2] * 3, 60)), rng.integers(0, 3, 60)
    labels[:50] = log_probs[:50].argmax(1)
    judge, path = LabelJudge.fit(log_probs, labels), tmp_path / "judge.npz"
    judge.save(path)
    labels[:3] = -100
    found = LabelJudge.load(path)
    np.testing.assert_array_equal(found.trust(log_probs, labels), judge.trust(log_probs, labels))
    assert np.isnan(judge.trust(log_probs, labels)).nonzero()[0].tolist() == [0, 1, 2]
    assert found.noise_rate == judge.noise_rate
    path.write_bytes(path.read_bytes()[:100])
    assert LabelJudge.load(path) is LabelJudge.load(tmp_path / "absent") is None
    LabelJudge(None).save(path)
    assert np.isnan(LabelJudge.load(path).trust(log_probs, labels)).all()


def test_a_reference_that_is_no_judge_gives_no_trust(passes, tmp_path):
    task = passes["vit"]
    labels = np.random.default_rng(1).permutation(task.dataset["labels"][:].numpy())
    rows = task.dataset.remove_columns("labels").add_column("labels", labels)
    with pytest.warns(UserWarning, match="no more than chance: it is no judge of them"):
        score_corpus(dataclasses.replace(task, dataset=rows), tmp_path)
    assert ScoreTable.load(tmp_path).aggregate()["ref_trust"].null_count == ROWS


def test_without_the_reference_s_pass(passes, whole, tmp_path):
    score_corpus(dataclasses.replace(passes["vit"], reference=None), tmp_path)
    assert scores_of(tmp_path)["mimic_score"] == whole["vit"]["mimic_score"]
    assert set(scores_of(tmp_path)["ref_loss"]) == {None}


def test_a_reference_that_diverged(passes, tmp_path):
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in passes["vit"].reference.items()}
    with pytest.raises(ValueError, match=r"the reference's losses must be finite, got 100% that are not"):
        score_corpus(dataclasses.replace(passes["vit"], reference=broken), tmp_path)


# ---- folders that hold something else ------------------------------------------------------------------------------


def shorter(task):
    return {"dataset": task.dataset.select(range(ROWS - 1))}


def other_pixels(task):
    pixels = task.dataset["pixel_values"][:].numpy().copy()
    pixels[0, 0, 0, 0] += 1
    rows = {name: task.dataset[name][:].numpy() for name in ("labels", "sample_id")}
    return {"dataset": Dataset.from_dict({"pixel_values": pixels, **rows}).with_format("torch")}


CHANGES = {
    "`batch_size` was 4 and is 8": lambda task: {"batch_size": 8},
    "`rows` was 44 and is 43": shorter,
    "`dataset` was '[0-9a-f]{16}' and is '[0-9a-f]{16}'": other_pixels,
    "`weights` was '[0-9a-f]{16}' and is": lambda task: {"direction": {n: 2 * v for n, v in task.direction.items()}},
    "`run_reference` was True and is False": lambda task: {"reference": None},
    "`reference` was 'a' and is 'b'": lambda task: {"named": {"reference": "b"}},
    "`layers` was None and is": lambda task: {"named": {**task.named, "layers": ["head"]}},
}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("message", CHANGES)
def test_a_pass_with_other_settings_is_refused(passes, tmp_path, message, shards):
    task = dataclasses.replace(passes["vit"], named={"reference": "a"})
    score_corpus(task, tmp_path, shard=(0, 2), part_batches=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=f"must be empty or hold scores of the same pass, got a pass where .*{message}"
    ):
        score_corpus(dataclasses.replace(task, **CHANGES[message](task)), tmp_path, shard=(shards - 1, shards))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_order_of_the_message_is_what_to_do(passes, tmp_path):
    score_corpus(passes["clip"], tmp_path, shard=(0, 2))
    changed = dataclasses.replace(passes["clip"], batch_size=2)
    with pytest.raises(ValueError, match=r"Use the same settings to go on, another output folder\.$"):
        score_corpus(changed, tmp_path, shard=(0, 2), overwrite=True)
    with pytest.raises(ValueError, match=r"or overwrite=True \(--overwrite\) to move these scores aside\.$"):
        score_corpus(changed, tmp_path)


def test_scores_that_are_in_the_way_are_moved_aside(passes, whole, tmp_path):
    folder, changed = tmp_path / "scores", dataclasses.replace(passes["clip"], batch_size=2)
    table = ScoreTable(folder)
    table.record([1], epoch=0, step=0, loss=[1.0])
    table.flush()
    with pytest.raises(ValueError, match=r"got scores of another run\. Use the same settings"):
        score_corpus(passes["clip"], folder, shard=(0, 2))
    assert score_corpus(passes["clip"], folder).moved == tmp_path / "scores-1"  # of a training run
    assert score_corpus(changed, folder).moved == tmp_path / "scores-2"  # of a whole pass
    score_corpus(passes["clip"], tmp_path / "half", shard=(0, 2))
    assert score_corpus(changed, tmp_path / "half", overwrite=True).moved == tmp_path / "half-1"
    assert scores_of(tmp_path / "scores-2") == whole["clip"]
    assert scores_of(folder) == scores_of(tmp_path / "half")


@pytest.mark.parametrize("damage", [lambda raw: raw[:-40], lambda raw: b""])
def test_a_part_that_was_cut_off_is_scored_again(passes, whole, tmp_path, counted, damage):
    score_corpus(passes["clip"], tmp_path, part_batches=3)
    path = sorted(tmp_path.glob("*.parquet"))[1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(
        UserWarning, match=f"scores must be whole files, {path.name} is not: cut off. Its rows are scored"
    ):
        report = score_corpus(passes["clip"], tmp_path, part_batches=3)
    assert (report.found, len(counted)) == (3, 11 + 3)
    assert scores_of(tmp_path) == whole["clip"]


def test_settings_that_were_cut_off(passes, tmp_path):
    score_corpus(passes["clip"], tmp_path, shard=(0, 2))
    settings = tmp_path / "scoring.json"
    assert json.loads(settings.read_text())["batch_size"] == 4
    settings.write_text("{")
    with pytest.raises(ValueError, match=r"scoring.json must hold the settings of a scoring pass, it does not \("):
        score_corpus(passes["clip"], tmp_path, shard=(0, 2))


# ---- wrong use -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_out_of_range(passes, tmp_path, shard):
    with pytest.raises(ValueError, match=rf"`shard` must be \(index, count\) with .*, got \({shard[0]}, {shard[1]}\)"):
        score_corpus(passes["clip"], tmp_path, shard=shard)


def test_sizes_below_one(passes, tmp_path):
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        score_corpus(dataclasses.replace(passes["clip"], batch_size=0), tmp_path)
    with pytest.raises(ValueError, match="`part_batches` must be at least 1, got -1"):
        score_corpus(passes["clip"], tmp_path, part_batches=-1)


def test_a_stream_is_refused(passes, tmp_path):
    stream = passes["clip"].dataset.to_iterable_dataset()
    message = "must have rows that can be asked for by number, got a IterableDataset: .* write the stream to Parquet"
    with pytest.raises(TypeError, match=message):
        score_corpus(dataclasses.replace(passes["clip"], dataset=stream), tmp_path)
    with pytest.raises(TypeError, match=message):
        score_dataset(passes["clip"].model, stream, passes["clip"].direction)


# ---- the layout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "size", "part"), [(1, 4, 1), (44, 4, 3), (45, 4, 1), (7, 100, 5)])
@pytest.mark.parametrize("count", [1, 3, 50])
def test_a_layout_has_each_row_once(rows, size, part, count):
    layout = Layout(rows, size, part)
    parts = [p for index in range(count) for p in layout.parts_of((index, count))]
    found = [row for p in parts for batch in layout.batches_of(p) for row in layout.rows_of(batch)]
    assert found == list(range(rows))
    assert all(layout.rows_of(batch).start % size == 0 for batch in range(layout.batches))


def test_parts_of_small_and_of_large_corpora():
    assert [default_part_batches(rows, 32) for rows in (1, 8192, 10**6, 10**8)] == [1, 1, 123, 1000]


def test_a_summary_says_how_many_are_scored(passes, tmp_path):
    score_corpus(passes["vit"], tmp_path, shard=(0, 2), part_batches=1)
    assert summary(tmp_path)["samples"] == "20"
    assert summary(tmp_path / "none") == {"samples": "0"}
