"""Sample ids through shuffles, transforms and collators; label noise; loading; images that do not decode."""

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from transformers import default_data_collator

from hf_mimic.data import (
    SampleIdCollator,
    SampleIdDataset,
    add_label_noise,
    add_sample_ids,
    drop_unreadable,
    load_rows,
    read_sample_ids,
    with_class_labels,
    with_image_transform,
)


def numbers(size=6):
    return Dataset.from_dict({"x": [float(i) for i in range(size)], "label": [i % 3 for i in range(size)]})


def png(value=0, size=8):
    import io

    file = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def images(size=6, corrupt=()):
    """Return rows of encoded images; those in `corrupt` are cut off or are no images at all."""
    data = [{"bytes": png(i), "path": None} for i in range(size)]
    for place, row in enumerate(corrupt):
        data[row]["bytes"] = data[row]["bytes"][:45] if place % 2 == 0 else b"not an image"
    features = Features({"image": datasets.Image(), "label": ClassLabel(num_classes=3)})
    return Dataset.from_dict({"image": data, "label": [i % 3 for i in range(size)]}, features=features)


# ---- ids -----------------------------------------------------------------------------------------------------------


def test_ids_are_row_numbers():
    rows = add_sample_ids(numbers())
    assert rows["sample_id"][:] == [0, 1, 2, 3, 4, 5]
    assert rows.features["sample_id"] == Value("int64")
    assert "row" in add_sample_ids(numbers(), "row").column_names


def test_ids_are_added_once():
    with pytest.raises(ValueError, match=r"must not have a column `sample_id` yet. If it holds unique integers"):
        add_sample_ids(add_sample_ids(numbers()))


def test_ids_stay_with_their_rows():
    rows = add_sample_ids(numbers())
    for change in (
        rows.shuffle(seed=1),
        rows.select([5, 0, 3]),
        rows.filter(lambda x: x > 2, input_columns="x"),
        rows.shuffle(seed=2).skip(2),
        rows.shuffle(seed=3).flatten_indices(),
        datasets.concatenate_datasets([rows.select([4, 5]), rows.select([0])]),
    ):
        ids = read_sample_ids(change)
        assert ids.dtype == np.int64
        assert ids.tolist() == [int(x) for x in change["x"]]


def test_ids_are_read_whatever_the_format_says():
    rows = add_sample_ids(images()).shuffle(seed=0)
    ids = rows["sample_id"][:]
    assert read_sample_ids(rows.with_format("torch", columns=["label"])).tolist() == ids
    assert read_sample_ids(rows.with_transform(lambda batch: {"y": [0] * len(batch["label"])})).tolist() == ids


def test_reading_ids_reads_no_other_column(monkeypatch):
    rows = add_sample_ids(images()).shuffle(seed=0)
    taken = []
    query = datasets.arrow_dataset.query_table
    monkeypatch.setattr(
        datasets.arrow_dataset, "query_table", lambda t, *a, **k: taken.append(t.column_names) or query(t, *a, **k)
    )
    assert sorted(read_sample_ids(rows)) == list(range(6))
    assert taken in ([], [["sample_id"]])


@pytest.mark.parametrize("kind", ["int32", "uint8", "int64"])
def test_any_integer_is_an_id(kind):
    rows = Dataset.from_dict({"sample_id": [7, 5]}, features=Features({"sample_id": Value(kind)}))
    assert read_sample_ids(rows).tolist() == [7, 5]
    assert read_sample_ids(rows).dtype == np.int64


@pytest.mark.parametrize(
    ("values", "got"),
    [
        (["a", "b"], "string values, such as 'a'"),
        ([1.0, 2.0], "double values, such as 1.0"),
        ([True, False], "bool values, such as True"),
        ([1, None], "missing values"),
    ],
)
def test_ids_must_be_integers(values, got):
    rows = Dataset.from_dict({"sample_id": values})
    for part in (rows, rows.select([1, 0]).select([1, 0])):
        with pytest.raises(ValueError, match=rf"must hold integers \(collators drop strings\), got {got}. Keep it"):
            read_sample_ids(part)


def test_ids_must_be_there():
    with pytest.raises(ValueError, match=r"must have an int64 column `sample_id`, got the columns x, label. Add one"):
        read_sample_ids(numbers())


def test_ids_must_fit():
    rows = numbers(2).add_column("sample_id", np.array([1, 2**63], np.uint64))
    with pytest.raises(ValueError, match=r"must hold ids below 2\*\*63, got 9223372036854775808"):
        read_sample_ids(rows)
    most = numbers(2).add_column("sample_id", np.array([1, 2**63 - 1], np.uint64))
    assert read_sample_ids(most).tolist() == [1, 2**63 - 1]


def test_ids_must_be_unique():
    rows = datasets.concatenate_datasets([add_sample_ids(numbers(3)), add_sample_ids(numbers(2)).select([1])])
    with pytest.raises(
        ValueError, match=r"must hold unique ids, got 1 repeated, such as 1 \(2 times\). Add ids after"
    ):
        read_sample_ids(rows)
    assert read_sample_ids(add_sample_ids(rows.remove_columns("sample_id"))).tolist() == [0, 1, 2, 3]


def test_there_must_be_rows():
    rows = add_sample_ids(numbers()).filter(lambda x: x > 100, input_columns="x")
    with pytest.raises(ValueError, match=r"must have at least one row, got none. Look at the filter or split"):
        read_sample_ids(rows)


# ---- collators and views -------------------------------------------------------------------------------------------


def only_x(examples):
    assert all(set(example) == {"x"} for example in examples)
    return {"x": torch.tensor([example["x"] for example in examples])}


def test_collator_puts_the_ids_back():
    batch = SampleIdCollator(only_x)([{"x": 1.0, "sample_id": 7}, {"x": 2.0, "sample_id": 3}])
    assert batch["x"].tolist() == [1.0, 2.0]
    assert batch["sample_id"].tolist() == [7, 3]
    assert batch["sample_id"].dtype == torch.int64


@pytest.mark.parametrize("one", [np.int64(4), torch.tensor(4), torch.tensor(4, dtype=torch.int32), np.uint8(4)])
def test_collator_takes_integers_of_any_kind(one):
    assert SampleIdCollator(default_data_collator)([{"x": 1, "sample_id": one}])["sample_id"].tolist() == [4]


@pytest.mark.parametrize("bad", ["4", "a", 4.5, None])
def test_collator_refuses_ids_that_are_no_integers(bad):
    with pytest.raises(TypeError, match=f"`sample_id` must be an integer, got {bad!r}"):
        SampleIdCollator(default_data_collator)([{"x": 1, "sample_id": bad}])


def test_collator_lets_examples_without_id_pass():
    assert set(SampleIdCollator(default_data_collator)([{"x": 1.0}, {"x": 2.0}])) == {"x"}


def test_collator_needs_dicts():
    with pytest.raises(TypeError, match="an example must be a dict with `sample_id`, got tuple"):
        SampleIdCollator(default_data_collator)([(torch.ones(2), 1)])


def test_view_adds_the_id_that_the_transform_dropped():
    rows = add_sample_ids(numbers()).shuffle(seed=1).with_transform(lambda batch: {"y": [2 * x for x in batch["x"]]})
    view = SampleIdDataset(rows, read_sample_ids(rows))
    assert len(view) == 6
    assert set(view[2]) == {"y", "sample_id"}
    assert [item["y"] for item in view.__getitems__([5, 0])] == [2 * view[5]["sample_id"], 2 * view[0]["sample_id"]]
    loader = torch.utils.data.DataLoader(view, batch_size=4, collate_fn=SampleIdCollator(default_data_collator))
    batch = next(iter(loader))
    assert batch["y"].tolist() == (2 * batch["sample_id"]).tolist()
    assert set(SampleIdDataset(rows, None)[0]) == {"y"}


def test_view_names_the_row_of_a_corrupt_image():
    rows = add_sample_ids(images(corrupt=[3])).select([5, 4, 3, 2])
    view = SampleIdDataset(rows, read_sample_ids(rows))
    assert view[0]["sample_id"] == 5
    with pytest.raises(
        ValueError, match=r"every image must decode; row 2 \(sample_id 3\) does not: .*drop_unreadable"
    ):
        view.__getitems__([0, 2])
    with pytest.raises(ValueError, match="row 2 does not"):
        SampleIdDataset(rows, None).__getitems__([0, 2])


# ---- images --------------------------------------------------------------------------------------------------------


def test_drop_unreadable_finds_exactly_the_corrupt_rows():
    rows = add_sample_ids(images(7, corrupt=[1, 4, 6]))
    readable, bad = drop_unreadable(rows, "image")
    assert bad == [1, 4, 6]
    assert readable["sample_id"][:] == [0, 2, 3, 5]
    assert [row["image"].getpixel((0, 0))[0] for row in readable] == [0, 2, 3, 5]
    everything, none = drop_unreadable(images(), "image")
    assert len(everything) == 6
    assert none == []


def test_a_row_without_an_image_is_unreadable():
    rows = images(4)
    data = [None if i == 2 else {"bytes": png(i), "path": None} for i in range(4)]
    rows = Dataset.from_dict({"image": data, "label": [0] * 4}, features=rows.features)
    assert drop_unreadable(rows, "image")[1] == [2]


def test_an_image_of_forged_size_is_unreadable():
    rows = images(3)
    forged = bytearray(png())
    forged[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height
    import zlib

    forged[29:33] = zlib.crc32(forged[12:29]).to_bytes(4, "big")
    features = rows.features
    data = [{"bytes": bytes(forged) if i == 1 else png(i), "path": None} for i in range(3)]
    rows = Dataset.from_dict({"image": data, "label": [0, 1, 2]}, features=features)
    assert drop_unreadable(rows, "image")[1] == [1]


def test_drop_unreadable_looks_past_a_transform():
    rows = images(4, corrupt=[2]).with_transform(lambda batch: {"y": [0] * len(batch["label"])})
    readable, bad = drop_unreadable(rows, "image")
    assert bad == [2]
    assert len(readable) == 3
    assert readable.format["type"] == "custom"


class Processor:
    def __call__(self, pictures, return_tensors):
        assert return_tensors == "pt"
        assert all(picture.mode == "RGB" for picture in pictures)
        return {"pixel_values": torch.tensor([picture.getpixel((0, 0))[0] for picture in pictures])}


def test_image_transform():
    rows = with_image_transform(images(), Processor())
    assert rows[[4, 1]]["pixel_values"].tolist() == [4, 1]
    assert rows[[4, 1]]["labels"] == [1, 1]
    gray = Dataset.from_dict({"picture": [Image.new("L", (2, 2))], "kind": [0]})
    assert with_image_transform(gray, Processor(), "picture", "kind")[0]["labels"] == 0


def test_image_transform_needs_its_columns():
    message = (
        "must have the columns 'image' and 'kind', got x, label. Name yours with --image_column and --label_column"
    )
    with pytest.raises(ValueError, match=message):
        with_image_transform(numbers(), Processor(), label="kind")


# ---- labels --------------------------------------------------------------------------------------------------------


def labelled(size=100, classes=5):
    features = Features({"label": ClassLabel(num_classes=classes)})
    return Dataset.from_dict({"label": [i % classes for i in range(size)]}, features=features)


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.4, 40), (0.333, 33), (0.99, 99)])
def test_label_noise_is_exact_and_always_wrong(rate, count):
    rows = labelled()
    noisy = add_label_noise(rows, rate, seed=3)
    label, clean = np.asarray(noisy["label"][:]), np.asarray(noisy["clean_label"][:])
    assert clean.tolist() == rows["label"][:]
    assert (label != clean).sum() == count
    assert set(label) <= set(range(5))
    assert noisy.features["label"] == noisy.features["clean_label"] == rows.features["label"]


def test_label_noise_spreads_evenly_over_the_other_classes():
    noisy = add_label_noise(labelled(5000), 0.8, seed=0)
    label, clean = np.asarray(noisy["label"][:]), np.asarray(noisy["clean_label"][:])
    counts = np.bincount((label - clean) % 5, minlength=5)
    assert counts[0] == 1000
    assert (abs(counts[1:] - 1000) < 120).all()


def test_label_noise_is_reproducible():
    first, again, other = (add_label_noise(labelled(), 0.4, seed=seed)["label"][:] for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("rate", [-0.1, 1, 40, float("nan")])
def test_noise_rate_is_a_share(rate):
    with pytest.raises(ValueError, match=rf"`rate` must be in \[0, 1\), got {rate}. Use 0.4 for 40 %"):
        add_label_noise(labelled(), rate, seed=0)


def test_label_noise_on_integer_labels():
    noisy = add_label_noise(numbers(30), 0.5, seed=0)
    assert (np.asarray(noisy["label"][:]) != np.asarray(noisy["clean_label"][:])).sum() == 15


def test_class_labels_are_left_alone():
    rows = labelled()
    assert with_class_labels(rows, "label") is rows


def test_class_labels_from_strings():
    rows = with_class_labels(Dataset.from_dict({"kind": ["dog", "cat", "dog", "eel"]}), "kind")
    assert rows.features["kind"].names == ["cat", "dog", "eel"]
    assert rows["kind"][:] == [1, 0, 1, 2]


def test_class_labels_from_integers_keep_their_value():
    values = [11, 0, 10, 2, 9, 1, 3, 4, 5, 6, 7, 8]
    rows = with_class_labels(Dataset.from_dict({"label": values}), "label")
    assert rows["label"][:] == values
    assert rows.features["label"].names == [str(i) for i in range(12)]


def test_class_labels_in_the_order_of_other_data():
    names = ["dog", "eel", "cat"]
    strings = Dataset.from_dict({"kind": ["cat", "dog", "cat"]})
    encoded = with_class_labels(strings, "kind")
    assert encoded["kind"][:] == [0, 1, 0]
    for rows in (strings, encoded):
        ordered = with_class_labels(rows, "kind", names)
        assert ordered["kind"][:] == [2, 0, 2]
        assert ordered.features["kind"].names == names
    with pytest.raises(ValueError, match="every label in `kind` must be one of dog, eel, got cat"):
        with_class_labels(strings, "kind", ["dog", "eel"])


def test_class_labels_decode_no_image(monkeypatch):
    monkeypatch.setattr(datasets.Image, "decode_example", None)
    rows = with_class_labels(images().cast_column("label", Value("string")), "label")
    assert rows["label"][:] == [0, 1, 2, 0, 1, 2]


def test_class_labels_need_their_column_and_every_label():
    with pytest.raises(ValueError, match="must have the column 'kind', got x, label"):
        with_class_labels(numbers(), "kind")
    for labels in (["a", None, None], [0, -1, -1], [0.0, 1.5, None]):
        with pytest.raises(ValueError, match=r"every row must have a label in `label`.*, got 2 that have none"):
            with_class_labels(Dataset.from_dict({"label": labels}), "label")


def test_integers_and_whole_floats_keep_their_numbers():
    for labels in ([0, 11, 2], [0.0, 11.0, 2.0]):
        rows = with_class_labels(Dataset.from_dict({"label": labels}), "label")
        assert rows["label"] == [0, 11, 2]
        assert rows.features["label"].names == list(map(str, range(12)))


def test_an_encoded_label_is_checked_too():
    features = Features({"label": ClassLabel(names=["a", "b"])})
    with pytest.raises(ValueError, match="got 1 that have none or a negative"):
        with_class_labels(Dataset.from_dict({"label": [0, None]}, features=features), "label")


def test_a_file_has_one_split(tmp_path):
    numbers().to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="only the split 'train', got 'test'"):
        load_rows(str(tmp_path / "rows.parquet"), "test")
    with pytest.raises(FileNotFoundError, match=r"absent\.parquet does not exist"):
        load_rows(str(tmp_path / "absent.parquet"))


# ---- loading -------------------------------------------------------------------------------------------------------


def test_load_a_file(tmp_path):
    rows = numbers()
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_json(tmp_path / "rows.jsonl")
    for name in ("rows.parquet", "rows.csv", "rows.jsonl"):
        assert load_rows(str(tmp_path / name)).to_dict() == rows.to_dict()


def test_load_a_folder_of_images(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "1.png").write_bytes(png(100))
    rows = load_rows(str(tmp_path / "pets"))
    assert rows.features["label"].names == ["cat", "dog"]
    assert rows["label"][:] == [0, 1]
    assert rows[0]["image"].getpixel((0, 0)) == (100, 0, 0)


def test_load_a_folder_of_parquet(tmp_path):
    for split in ("train", "test"):
        numbers(3 if split == "test" else 6).to_parquet(tmp_path / f"{split}.parquet")
    assert len(load_rows(str(tmp_path))) == 6
    assert len(load_rows(str(tmp_path), "test")) == 3


def test_load_what_save_to_disk_wrote(tmp_path):
    numbers().save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=numbers(), test=numbers(2)).save_to_disk(tmp_path / "two")
    assert load_rows(str(tmp_path / "one")).to_dict() == numbers().to_dict()
    assert len(load_rows(str(tmp_path / "two"), "test")) == 2


def test_unknown_file(tmp_path):
    (tmp_path / "rows.txt").write_text("1")
    with pytest.raises(ValueError, match=r"must end in .parquet, .csv, .json, .jsonl, .arrow, got .*rows.txt"):
        load_rows(str(tmp_path / "rows.txt"))


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [("a.csv", "a,b\n1,2\n1,2,3,4", "saw 4"), ("b.json", "{bad", "JSON"), ("c.parquet", "x", "")],
)
def test_broken_file(tmp_path, name, text, cause):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} must be a .* file with rows: .*{cause}"):
        load_rows(str(tmp_path / name))


def test_a_split_that_is_not_there(tmp_path):
    datasets.DatasetDict(test=numbers()).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="must have the split 'train', got test"):
        load_rows(str(tmp_path))
