"""Publishing on the Hub and reading it back, by the real clients against a server on 127.0.0.1."""

import json
import types
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_dataset
from publications import is_wrong, md5s, picture, rows, scores

from hf_mimic import ThresholdFilter, TrustFilter, attach_scores, load_scores, push_curated_dataset, push_scores
from hf_mimic.hub import Contents, Destination, publish
from hf_mimic.hub_errors import HubError
from hf_mimic.run_record import RunRecord

PLAIN = {"figures": False}


@pytest.fixture(autouse=True)
def _logged_in(api, monkeypatch):
    monkeypatch.setattr("hf_mimic.hub.time", types.SimpleNamespace(sleep=lambda seconds: None))


def push(repo_id, dataset=None, table=None, **options):
    table = scores() if table is None else table
    given = {"scores": table, "rule": TrustFilter(), **PLAIN, **options}
    return push_curated_dataset(rows() if dataset is None else dataset, repo_id, **given)


def test_one_commit_has_everything(hub):
    done = push("user/whole", figures=True, group_columns="label")
    assert done.changed
    assert done.url == f"{hub.url}/datasets/user/whole"
    assert [c.oid for c in hub.commits("user/whole")][1:] == [done.commit]
    shard = "scores/train/steps-00000000-00000001-rank-00000.parquet"
    expected = ["README.md", "data/train-00000-of-00001.parquet", "figures/best_and_worst.png", "figures/classes.png"]
    expected += ["figures/score_by_epoch.png", "scores/train/mimic_record.json", shard, "selection.json"]
    assert sorted(hub.repo("user/whole").files) == [
        ".gitattributes",
        *expected,
        "selection/train-00000-of-00001.parquet",
    ]
    kept = load_dataset("user/whole", split="train")
    assert kept["sample_id"] == [i for i in range(30) if not is_wrong(i)]
    assert md5s(kept).items() <= md5s(rows()).items()  # byte for byte
    assert load_dataset("user/whole", "scores", split="train").num_rows == 60
    decisions = load_dataset("user/whole", "selection", split="train").to_dict()
    assert decisions["keep"] == [not is_wrong(i) for i in range(30)]
    assert all(reason.startswith("trust ") for reason in decisions["reason"])
    record = json.loads(hub.repo("user/whole").files["selection.json"].decode())
    assert record["rows"] == {"before": 30, "after": 24}
    assert record["classes"]["dog"] == {"before": 10, "after": 8}
    assert record["groups"] == {"label": record["classes"]}


def test_a_second_push_sends_nothing(hub):
    first = push("user/twice", figures=True)
    hub.clear_log()
    second = push("user/twice", figures=True)
    assert (second.commit, second.changed) == (first.commit, False)
    assert hub.requests("PUT") == []
    assert hub.requests("POST", "/commit/") == []
    hub.clear_log()
    third = push("user/twice", figures=True, commit_message="another rule", rule=ThresholdFilter())  # negative control
    assert third.changed
    assert hub.requests("PUT")
    assert len(hub.commits("user/twice")) == 3


def test_an_interrupted_push_goes_on(hub):
    hub.fail("POST", "/commit/", status=403)
    with pytest.raises(HubError, match="user/broken: commit failed"):
        push("user/broken")
    stored = len(hub.requests("PUT"))
    assert stored == 3
    assert list(hub.repo("user/broken").files) == [".gitattributes"]
    hub.clear_log()
    assert push("user/broken").changed
    assert hub.requests("PUT") == []


def test_a_lost_answer_makes_no_second_commit(hub):
    hub.fail("POST", "/commit/", reset=True, after=True)
    done = push("user/lost-answer")
    assert done.changed
    assert [c.oid for c in hub.commits("user/lost-answer")][1:] == [done.commit]


def test_a_pull_request_and_its_lost_answer(hub):
    push("user/asked")
    head = hub.commits("user/asked")[-1].oid
    hub.fail("POST", r"/commit/.*create_pr", reset=True, after=True)
    done = push("user/asked", rule=ThresholdFilter(), create_pr=True)
    assert hub.commits("user/asked")[-1].oid == head
    assert done.url.endswith("/discussions/1")
    assert len(hub.repo("user/asked").discussions) == 1
    assert hub.repo("user/asked").resolve("refs/pr/1").oid == done.commit


def test_a_branch(hub):
    done = push("user/branched", revision="v2")
    assert list(hub.repo("user/branched").files) == [".gitattributes"]
    assert load_dataset("user/branched", revision="v2", split="train").num_rows == 24
    assert hub.repo("user/branched").resolve("v2").oid == done.commit


def test_the_card_names_repo_and_configuration_as_they_are(hub):
    assert push("short-name", config_name="curated").repo_id == "user/short-name"
    card = hub.repo("user/short-name").files["README.md"].decode()
    assert card.count("# user/short-name\n") == 1
    assert 'curated = load_dataset("user/short-name", "curated")' in card
    assert load_dataset("user/short-name", "curated", split="train").num_rows == 24
    assert 'load_dataset("short-name"' not in card
    push_scores(scores(), "short-scores")
    assert 'load_scores("user/short-scores")' in hub.repo("user/short-scores").files["README.md"].decode()


def test_private(hub):
    push("user/secret", private=True)
    assert hub.repo("user/secret").private
    push("user/open")
    with pytest.raises(ValueError, match="user/open must be private, got a public repo"):
        push("user/open", private=True)


def test_six_publish_at_once(hub):
    splits = [f"part{i}" for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda split: push("user/crowd", split=split), splits))
    assert all(d.changed for d in done)
    assert {c.oid for c in hub.commits("user/crowd")[1:]} == {d.commit for d in done}
    assert set(load_dataset("user/crowd")) == set(splits)
    assert any(r.status == 412 for r in hub.requests("POST", "/commit/"))  # negative control: they did meet


def test_a_column_is_added_to_a_repo_that_is_there(hub):
    rows().push_to_hub("user/grows")
    assert "keep" not in load_dataset("user/grows", split="train").column_names
    push("user/grows")
    assert {"trust", "keep"} <= {*load_dataset("user/grows", split="train").column_names}
    rows().push_to_hub("user/stock")  # negative control: the stock client leaves the old features
    attach_scores(rows(), scores()).push_to_hub("user/stock")
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        load_dataset("user/stock", split="train")


def test_shards_and_processes(hub):
    size = rows(3)._estimate_nbytes()
    push("user/shards", max_shard_bytes=size)
    shards = [path for path in hub.repo("user/shards").files if path.startswith("data/")]
    assert len(shards) > 4
    hub.clear_log()
    assert not push("user/shards", max_shard_bytes=size, num_proc=2).changed
    assert push("user/shards").changed  # one shard again: the others are taken away
    assert [p for p in hub.repo("user/shards").files if p.startswith("data/")] == ["data/train-00000-of-00001.parquet"]
    assert load_dataset("user/shards", split="train").num_rows == 24


def test_images_that_are_files(hub, tmp_path):
    for row in rows(4).cast_column("image", datasets.Image(decode=False)):
        (tmp_path / f"{row['sample_id']}.png").write_bytes(row["image"]["bytes"])
    given = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / f"{i}.png") for i in range(4)], "sample_id": range(4)}
    ).cast_column("image", datasets.Image())
    push("user/files", given.with_transform(lambda batch: 1 / 0), scores(4))
    back = load_dataset("user/files", split="train")
    assert md5s(back).items() <= md5s(rows(4)).items()
    assert {row["image"]["path"] for row in back.cast_column("image", datasets.Image(decode=False))} <= {
        f"{i}.png" for i in range(4)
    }


# ---- splits --------------------------------------------------------------------------------------------------------


def test_only_the_split_train_is_filtered(hub):
    push("user/splits", DatasetDict(train=rows(), test=rows(6, start=100)))
    back = load_dataset("user/splits")
    assert {name: len(part) for name, part in back.items()} == {"train": 24, "test": 6}
    assert back["test"]["trust"] == [None] * 6
    record = json.loads(hub.repo("user/splits").files["selection.json"].decode())
    assert record["splits"] == {"train": 24, "test": 6}


def test_splits_one_after_the_other(hub):
    push("user/one-by-one")
    push("user/one-by-one", rows(10, start=100), scores(110), split="more")
    assert {k: len(v) for k, v in load_dataset("user/one-by-one").items()} == {"train": 24, "more": 8}
    assert set(load_dataset("user/one-by-one", "selection")) == {"train", "more"}
    card = hub.repo("user/one-by-one").files["README.md"].decode()
    assert "Only the split `more` was filtered now. `train`, published before, is here, too." in card


@pytest.mark.parametrize("name", ["train-clean", "a/b", "../x", "my split", ""])
def test_names_that_no_split_can_have(hub, name):
    with pytest.raises(ValueError, match="a split must have a name of letters, digits, _ and dots between them, got"):
        push("user/never", split=name)
    with pytest.raises(ValueError, match="a split must have a name of letters, digits, _ and dots between them, got"):
        push_scores(scores(), "user/never", split=name)
    assert ("datasets", "user/never") not in hub.repos


def test_an_evaluation_split_is_filtered_only_by_name():
    test = Dataset(rows().data, split="test")
    with pytest.raises(ValueError, match="only training data are filtered unless you say so, got the split 'test'"):
        push("user/test-split", test)
    push("user/test-split", test, split="test")
    assert set(load_dataset("user/test-split")) == {"test"}
    with pytest.raises(ValueError, match="only training data are filtered unless you say so, got the split 'test'"):
        push("user/test-split", Dataset(rows().data, split="train[:50%]+test"))
    with pytest.raises(ValueError, match="every split must have a row, got none in test"):
        push("user/test-split", DatasetDict(train=rows(), test=rows(0)))
    both = DatasetDict(train=rows(), test=attach_scores(rows(), scores(), keep=~is_wrong(range(30))))
    with pytest.raises(ValueError, match="only the split 'train' is filtered, got rows with keep=False in test"):
        push("user/both", both)
    with pytest.raises(ValueError, match="the data set must have the split 'dev', got train, test"):
        push("user/both", both, split="dev")
    with pytest.raises(ValueError, match="all splits must have the columns of 'train', got more of 'test'"):
        push("user/both", DatasetDict(train=rows(), test=rows(more=list(range(30)))))


def test_a_split_of_other_columns_in_the_repo(hub):
    DatasetDict(train=rows(), test=rows(6)).push_to_hub("user/clash")
    before = hub.commits("user/clash")[-1].oid
    with pytest.raises(
        ValueError, match="all splits of a configuration must have the same columns, but test of 'default'"
    ):
        push("user/clash")
    assert hub.commits("user/clash")[-1].oid == before
    push("user/clash", config_name="curated")
    assert load_dataset("user/clash", "curated", split="train").num_rows == 24
    assert {k: len(v) for k, v in load_dataset("user/clash").items()} == {"train": 30, "test": 6}
    push("user/clash", DatasetDict(train=rows(), test=rows(6)))
    assert {k: len(v) for k, v in load_dataset("user/clash").items()} == {"train": 24, "test": 6}


def test_files_that_no_card_lists(hub):
    hub.create("user/plain", "datasets").commit({"train.csv": b"x\n1\n"})
    with pytest.raises(ValueError, match=r"must list its data under `configs` in README.md, got 1 files .* train.csv"):
        push("user/plain")
    with pytest.raises(ValueError, match="must list its data under `configs`"):
        push_scores(scores(), "user/plain")


def test_files_and_configurations_of_their_own_stay(hub):
    theirs = {"figures/logo.png": b"1", "scores/notes.md": b"2", "scores/own.parquet": b"3"}
    rows(1).push_to_hub("user/owned", "mine")
    hub.repo("user/owned").commit({**theirs, "figures/agreement.png": b"of before"})
    push("user/owned", figures=True)
    files = hub.repo("user/owned").files
    assert theirs.items() <= files.items()
    assert "figures/agreement.png" not in files
    assert load_dataset("user/owned", "scores", split="train").num_rows == 60
    assert load_dataset("user/owned", "mine", split="train").num_rows == 1


@pytest.mark.parametrize(
    "listed", ["data_files: mine/*.csv", "data_dir: mine", "data_files: [{split: a, path: [mine/x.csv]}]"]
)
def test_a_repo_with_data_of_another_kind(hub, listed):
    head = f"---\nconfigs:\n- config_name: own\n  {listed}\n---\n# Theirs\n"
    repo_id = f"user/kind-{len(listed)}"
    hub.create(repo_id, "datasets").commit({"README.md": head.encode(), "mine/x.csv": b"x\n1\n"})
    assert next(iter(load_dataset(repo_id, "own").values()))["x"][:] == [1]
    with pytest.raises(ValueError, match=r"must have its data as Parquet, got mine/x.csv of the configuration 'own'"):
        push_scores(scores(), repo_id)


def test_a_split_of_several_paths_and_the_first_configuration_stay(hub):
    push("user/paths", DatasetDict(train=rows(), test=rows(6, start=100)), config_name="curated")
    repo = hub.repo("user/paths")
    card = (
        repo.files["README.md"]
        .decode()
        .replace("config_name: curated\n", "config_name: curated\n  default: true\n", 1)
    )
    card = card.replace("path: curated/test-*", "path:\n    - curated/test-00000-of-00001.parquet")
    repo.commit({"README.md": card.encode()})
    assert push("user/paths", config_name="curated", rule=ThresholdFilter()).changed
    assert {name: len(part) for name, part in load_dataset("user/paths").items()} == {"test": 6, "train": 24}


@pytest.mark.parametrize("name", ["scores", "selection"])
def test_a_configuration_of_the_same_name_is_not_replaced(hub, name):
    repo_id = f"user/own-{name}"
    Dataset.from_dict({"player": ["a"], "points": [3]}).push_to_hub(repo_id, name)
    before = dict(hub.repo(repo_id).files)
    with pytest.raises(ValueError, match=f"the configuration '{name}' of the repo must be one that hf_mimic wrote"):
        push(repo_id)
    assert dict(hub.repo(repo_id).files) == before


# ---- what decides --------------------------------------------------------------------------------------------------


def decided(keep=None):
    return attach_scores(rows(), scores(), keep=~is_wrong(range(30)) if keep is None else keep)


def test_the_column_keep_decides(hub):
    push("user/column", decided(), rule=None)
    assert load_dataset("user/column", split="train")["sample_id"] == [i for i in range(30) if i % 5]
    record = json.loads(hub.repo("user/column").files["selection.json"].decode())
    assert record["rule"] == "by the column `keep`"
    result = TrustFilter().fit(scores()).filter(scores())
    push("user/column", decided(), rule=result)
    with pytest.raises(ValueError, match="the column `keep` of the data set must be what the rule decides"):
        push("user/column", decided(np.arange(30) > 9))
    push("user/no-scores", decided(), scores=None, rule="a person looked")
    assert set(datasets.get_dataset_config_names("user/no-scores")) == {"default", "selection"}


def test_rows_that_were_filtered_before(hub):
    push("user/before", decided().filter(lambda keep: keep, input_columns="keep"), rule=None)
    record = json.loads(hub.repo("user/before").files["selection.json"].decode())
    assert record["rows"] == {"before": 30, "after": 24}
    assert record["classes"]["cat"] == {"before": None, "after": 8}
    assert sum(load_dataset("user/before", "selection", split="train")["keep"]) == 24


def test_a_result_decides_of_what_it_has_seen(hub):
    result = TrustFilter().fit(scores()).filter(scores())
    with pytest.warns(UserWarning, match="2 of 10 rows have no score"):  # in this table; the result has seen another
        push("user/result", rows().select(range(10)), scores(8), rule=result)
    record = json.loads(hub.repo("user/result").files["selection.json"].decode())
    assert (record["rows"], record["unscored"]) == ({"before": 30, "after": 8}, 0)
    assert record["rule"] == "by a filter that is not named"
    said = load_dataset("user/result", "selection", split="train")
    assert {r for r, keep in zip(said["reason"], said["keep"], strict=True) if keep}.isdisjoint(
        r for r, keep in zip(said["reason"], said["keep"], strict=True) if not keep
    )
    assert record["reasons"]["not among the rows that were given"] == 16


def test_scores_are_attached_whoever_decides(hub):
    push("user/hand", rows(keep=[i % 2 == 0 for i in range(30)]), rule=None)
    assert {"trust", "loss", "n_visits"} <= {*load_dataset("user/hand", split="train").column_names}
    push("user/words", rule="a person looked")
    assert {"trust", "loss", "n_visits"} <= {*load_dataset("user/words", split="train").column_names}


@pytest.mark.parametrize("kind", ["mask", "vector", "number"])
def test_labels_that_are_no_classes(hub, kind):
    masks = [{"bytes": picture(i), "path": None} for i in range(30)]
    values = {"mask": masks, "vector": [[0.5, i] for i in range(30)], "number": [i / 2 for i in range(30)]}
    feature = datasets.Image() if kind == "mask" else None
    given = rows().remove_columns("label").add_column("label", values[kind], feature=feature)
    push(f"user/{kind}", given, figures=True)
    assert json.loads(hub.repo(f"user/{kind}").files["selection.json"].decode())["classes"] == {}
    assert load_dataset(f"user/{kind}", split="train").features["label"] == given.features["label"]
    assert "figures/best_and_worst.png" in hub.repo(f"user/{kind}").files


def test_images_that_are_only_named(hub):
    given = Dataset.from_dict({"sample_id": range(30), "image": [f"{i}.png" for i in range(30)]})
    push("user/addresses", given, figures=True)
    assert load_dataset("user/addresses", split="train")["image"][0] == "1.png"
    assert "figures/score_by_epoch.png" in hub.repo("user/addresses").files


def test_rows_without_a_score(hub):
    with pytest.warns(UserWarning, match="5 of 35 rows have no score"):
        push("user/unscored", rows(35))
    assert load_dataset("user/unscored", split="train").num_rows == 29
    with pytest.warns(UserWarning, match="5 of 35 rows have no score"):
        push("user/unscored", rows(35), drop_unscored=True)
    assert load_dataset("user/unscored", split="train").num_rows == 24
    record = json.loads(hub.repo("user/unscored").files["selection.json"].decode())
    assert (record["unscored"], record["unscored_kept"]) == (5, False)
    assert record["reasons"]["no score"] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": None}, "must have the column `keep`, or a `rule` that decides, got neither"),
        ({"rule": 3}, "`rule` must be a filter, its FilterResult or words, got a int"),
        ({"scores": None}, "a filter must come with the `scores` that it decides on, got none"),
        ({"scores": None, "rule": None, "dataset": rows(keep=["yes"] * 30)}, "must hold booleans, got string"),
        ({"dataset": rows(trust=["x"] * 30)}, "must not have the columns trust yet"),
        ({"dataset": rows(start=500)}, "no `sample_id` of the data set is among the 30 samples of the rule"),
        ({"dataset": rows(4).remove_columns("sample_id")}, "must have an int64 column `sample_id`"),
        ({"dataset": decided(np.zeros(30, bool)), "rule": None}, "at least one row must be kept, got none of 30"),
        ({"dataset": [1, 2]}, "must be a Dataset or a DatasetDict, got a list"),
        ({"label_column": "klass"}, "must have the column 'klass', got image, label, sample_id"),
        ({"config_name": "scores"}, "`config_name` must be a name other than data, scores, selection and figures"),
        ({"create_pr": True, "revision": "v1"}, "`create_pr` must go to main, got the revision 'v1'"),
        ({"revision": "0" * 40}, "`revision` must be a branch to write to, got the commit 000"),
        ({"privat": True}, "`option` must be one of .* Did you mean 'private'"),
    ],
)
def test_what_cannot_be_published(hub, change, message):
    given = {"dataset": rows(), "scores": scores(), "rule": TrustFilter(), **PLAIN, **change}
    with pytest.raises(ValueError, match=message):
        push_curated_dataset(given.pop("dataset"), "user/never", **given)
    assert ("datasets", "user/never") not in hub.repos


def test_a_repo_id_that_is_a_path():
    with pytest.raises(ValueError, match=r"`repo_id` must be .user/name., got './here'"):
        push("./here")


def test_what_was_filtered_is_named_without_its_folder_and_with_its_own_commit(hub, tmp_path):
    run = RunRecord(dataset="you/scored", dataset_revision="3" * 40)

    def said(**options):
        push("user/named", run=run, **options)
        record = json.loads(hub.repo("user/named").files["selection.json"].decode())
        return record["original_dataset"], record["original_revision"]

    assert said() == ("you/scored", "3" * 40)
    assert said(original_dataset="you/other") == ("you/other", None)
    assert said(original_dataset=str(tmp_path)) == (f"local folder {tmp_path.name}", None)
    assert not any(str(tmp_path).encode() in content for content in hub.repo("user/named").files.values())


# ---- scores alone --------------------------------------------------------------------------------------------------


def test_scores_travel_without_the_data(hub, tmp_path):
    table = scores(folder=tmp_path / "scores")
    done = push_scores(table, "user/alone")
    assert [c.oid for c in hub.commits("user/alone")][1:] == [done.commit]
    assert not any("image" in name for name in pq.read_schema(tmp_path / "scores" / table.shards()[0].name).names)
    loaded = load_scores("user/alone")
    assert loaded.aggregate().equals(table.aggregate())
    joined = attach_scores(rows(), loaded, keep=TrustFilter().fit_predict(loaded))
    assert joined.filter(lambda keep: not keep, input_columns="keep")["sample_id"] == [
        i for i in range(30) if not i % 5
    ]
    hub.clear_log()
    assert not push_scores(table, "user/alone").changed
    assert hub.requests("PUT") == []
    assert load_dataset("user/alone", split="train").num_rows == 60


def test_scores_beside_the_data_that_they_are_of(hub):
    rows().push_to_hub("user/mine")
    push_scores(scores(), "user/mine")
    assert load_dataset("user/mine", split="train").num_rows == 30
    assert load_scores("user/mine").aggregate().num_rows == 30
    push_scores(scores(visits=3), "user/mine")
    assert len(load_scores("user/mine")) == 90
    assert len([path for path in hub.repo("user/mine").files if path.endswith("rank-00000.parquet")]) == 1


def test_scores_of_two_splits(hub):
    push_scores(scores(), "user/two-scored")
    push_scores(scores(20), "user/two-scored", split="test")
    sizes = {name: len(part) for name, part in load_dataset("user/two-scored", "scores").items()}
    assert sizes == {"train": 60, "test": 40}
    assert [len(load_scores("user/two-scored", split=split)) for split in sizes] == [60, 40]
    with pytest.raises(ValueError, match=r"has scores of several splits, test, train: .* Name one"):
        load_scores("user/two-scored")
    with pytest.raises(FileNotFoundError, match="must hold scores of the split 'dev'"):
        load_scores("user/two-scored", split="dev")
    push_scores(scores(), "user/two-scored")  # as it was
    assert len(load_dataset("user/two-scored", "scores", split="test")) == 40


def test_scores_that_are_not_there(hub):
    rows().push_to_hub("user/unscored-data")
    with pytest.raises(FileNotFoundError, match="user/unscored-data must hold scores"):
        load_scores("user/unscored-data")
    with pytest.raises(HubError, match="user/nowhere: reading the scores failed: there is no data set of this name"):
        load_scores("user/nowhere")
    from hf_mimic import ScoreTable

    with pytest.raises(ValueError, match="must have a row to be published, got none"):
        push_scores(ScoreTable(), "user/empty")


# ---- publish -------------------------------------------------------------------------------------------------------


def test_what_changed_meanwhile_is_looked_at_again(hub):
    hub.create("user/moved-on", "datasets")
    seen = []

    def contents(present):
        seen.append(present.card)
        if len(seen) == 1:  # someone else commits between our reading and our commit
            hub.repo("user/moved-on").commit({"README.md": b"theirs"})
        return Contents({"x.txt": f"after {present.card}".encode()})

    done = publish(Destination("user/moved-on"), contents, message="ours")
    assert seen == [None, "theirs"]
    assert hub.repo("user/moved-on").files["x.txt"] == b"after theirs"
    assert [c.title for c in hub.commits("user/moved-on")] == ["initial commit", "Upload", "ours"]
    assert done.commit == hub.commits("user/moved-on")[-1].oid


def test_the_card_loads_the_configuration_that_was_filtered(hub):
    rows().push_to_hub("user/in-two-parts", "first")
    rows(6).push_to_hub("user/in-two-parts", "second")
    push("user/of-first", load_dataset("user/in-two-parts", "first", split="train"))
    card = hub.repo("user/of-first").files["README.md"].decode()
    commit = hub.commits("user/in-two-parts")[-1].oid
    assert f'    "user/in-two-parts",\n    "first",\n    revision="{commit}",\n    split="train",\n' in card


def test_the_card_loads_the_selection_of_the_split_that_was_filtered_last(hub):
    push("user/by-turns")
    push("user/by-turns", split="more")
    card = hub.repo("user/by-turns").files["README.md"].decode()
    assert 'selection = load_dataset("user/by-turns", "selection", split="more")' in card
    assert 'split="train")' not in card


# ---- who may, and what people wrote ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, r"user/closed: \w+ failed: no token was given\. Log in"),
        ("hf_unknownunknownunknown", "the Hub does not know the token"),
        ("read", r"the token must not write to it .*\. Log in with one that may write to user/closed"),
        ("stranger", r"the token must not write to it .*\. Log in with one that may write to user/closed"),
    ],
)
def test_who_may_not_write(hub, monkeypatch, token, message):
    hub.create("user/closed", "datasets")
    own = {"read": hub.token("user", role="read"), "stranger": hub.token("stranger")}
    token = own.get(token, token)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=message) as error:
        push("user/closed")
    assert token is None or token not in str(error.value)
    assert list(hub.repo("user/closed").files) == [".gitattributes"]


def test_who_may_not_make_a_repo(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token("stranger"))
    with pytest.raises(HubError, match=r"user/not-yours: create the repo failed: the token must not write to it"):
        push("user/not-yours")
    monkeypatch.setenv("HF_TOKEN", hub.token("user", role="read"))
    with pytest.raises(HubError, match=r"user/not-yours: create the repo failed"):
        push("user/not-yours")
    assert ("datasets", "user/not-yours") not in hub.repos


def test_who_may_not_write_may_ask(hub, monkeypatch):
    hub.create("user/open-to-all", "datasets")
    monkeypatch.setenv("HF_TOKEN", hub.token("stranger"))
    done = push("user/open-to-all", create_pr=True)
    assert done.url.endswith("/discussions/1")
    assert load_dataset("user/open-to-all", revision="refs/pr/1", split="train").num_rows == 24


def test_the_token_that_is_given(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    token = hub.token("user")
    push("user/given", private=True, token=token)
    with pytest.raises(HubError, match="there is no data set of this name, or it is private"):
        load_scores("user/given")
    assert len(load_scores("user/given", token=token)) == 60
    hub.fail("GET", "/resolve/.*README", corrupt=True)  # the second download needs the token, too
    assert not push("user/given", private=True, token=token).changed


def test_what_people_wrote_in_the_card_stays(hub):
    push("user/rewritten")
    repo = hub.repo("user/rewritten")
    text = repo.files["README.md"].decode()
    text = text.replace("---\n", "---\nlicense: cc0-1.0\npretty_name: Ours\n", 1) + "\n## Thanks\n\nTo the owls.\n"
    repo.commit({"README.md": text.encode()})
    push("user/rewritten", rule=ThresholdFilter())
    card = repo.files["README.md"].decode()
    assert "\n## Thanks\n\nTo the owls.\n" in card
    assert "license: cc0-1.0\npretty_name: Ours\n" in card
    assert "relative weight" in card
    assert load_dataset("user/rewritten", split="train").num_rows == 24


def test_a_card_that_cannot_be_read(hub):
    hub.create("user/bad-card", "datasets").commit({"README.md": b"---\nlicense: [\n---\n# Theirs\n"})
    with pytest.raises(ValueError, match=r"the metadata of a card must be YAML, got what cannot be read"):
        push("user/bad-card")
    hub.create("user/no-text", "datasets").commit({"README.md": b"\xff\xfe#"})
    with pytest.raises(HubError, match=r"user/no-text: reading README.md failed: it must be UTF-8, got .* delete it"):
        push("user/no-text")
    assert len(hub.requests("GET", "no-text/resolve/")) == 1  # it is not tried again
    assert hub.repo("user/bad-card").files["README.md"] == b"---\nlicense: [\n---\n# Theirs\n"
