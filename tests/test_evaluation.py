"""`hf-mimic evaluate` in process, on a tiny CLIP and a few pictures, against a loop over rows; bad input."""

import json

import datasets
import image_text
import models
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from hf_mimic.captions import check_columns, read_pairs
from hf_mimic.cli import main
from hf_mimic.command_arguments import EvaluateArguments
from hf_mimic.evaluation import evaluate_image_text, image_features, load_image_text_model, readable
from hf_mimic.metrics import class_embeddings, recall, zero_shot_accuracy

TEXTS = ["a red picture", "green", "a dark blue picture", "the red photo", "bright green", "blue", "red red"]
LABELS = [0, 1, 2, 0, 1, 2, 0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return image_text.save(tmp_path_factory.mktemp("clip"))


def save(dataset, folder, name="rows.parquet"):
    dataset.to_parquet(folder / name)
    return str(folder / name)


def evaluate(model, dataset, *flags):
    return main(["evaluate", "--model", model, "--dataset", dataset, *flags])


def cells(text):
    """Return the table that the command printed."""
    return dict([part.strip() for part in line.split("  ", 1)] for line in text.strip().splitlines() if "  " in line)


def by_hand(dataset, rows):
    """Return the features of the pictures of some rows, one by one."""
    net, processor = models.make("clip"), image_text.processor()
    pixels = [processor(dataset[i]["image"].convert("RGB"), return_tensors="pt") for i in rows]
    with torch.no_grad():
        return torch.cat([net.get_image_features(**x).pooler_output for x in pixels])


def texts_by_hand(texts):
    net, tokenizer = models.make("clip"), image_text.tokenizer()
    tokens = [tokenizer(text, return_tensors="pt", truncation=True, max_length=16)["input_ids"] for text in texts]
    with torch.no_grad():
        return torch.cat([net.get_text_features(input_ids=x).pooler_output for x in tokens])


# ---- what it measures ----------------------------------------------------------------------------------------------


def test_evaluate_is_a_loop_over_rows(model, tmp_path, capsys):
    rows = image_text.rows(TEXTS, label=LABELS)
    flags = ["--label_column", "label", "--templates", "a {} picture", "{}", "--batch_size", "3"]
    assert evaluate(model, save(rows, tmp_path), *flags, "--output", str(tmp_path / "new" / "out.json")) == 0
    images, texts = by_hand(rows, range(7)), texts_by_hand(TEXTS)
    classes = class_embeddings(models.make("clip"), image_text.tokenizer(), image_text.COLOURS, ["a {} picture", "{}"])
    expected = recall(images, texts, range(7)) | zero_shot_accuracy(images, LABELS, classes)
    written = json.loads((tmp_path / "new" / "out.json").read_text())
    assert {name: written[name] for name in expected} == pytest.approx(expected)
    assert (written["images"], written["captions"], written["classes"], written["context"]) == (7, 7, 3, 16)
    table = cells(capsys.readouterr().out)
    assert table["rsum"] == f"{expected['rsum']:.1f}"
    assert table["image to text recall"].startswith(f"@1 {expected['image_to_text_recall@1']:.4f}  @5 ")
    assert table["zero-shot accuracy"] == (f"@1 {expected['zero_shot_accuracy@1']:.4f}  (3 classes, 2 templates)")


def test_the_measure_can_tell(model, tmp_path):
    """The negative control: other pictures, other numbers."""
    rows = image_text.rows(TEXTS)
    turned = rows.select([1, 2, 3, 4, 5, 6, 0]).remove_columns("text").add_column("text", TEXTS)
    results = [evaluate_image_text(EvaluateArguments(model, save(r, tmp_path))) for r in (rows, turned)]
    assert results[0]["rsum"] != results[1]["rsum"]


def test_captions_of_one_image(model, tmp_path):
    """As a list in a row, or as rows with the same image id: the same."""
    lists = [["a red picture", "red"], ["green"], ["blue", "the dark blue", "a"]]
    listed = image_text.rows(lists)
    flat = listed.select([2, 0, 1, 2, 0, 2]).remove_columns("text")
    flat = flat.add_column("text", ["blue", "a red picture", "green", "the dark blue", "red", "a"])
    flat = flat.add_column("image_id", ["c", "a", "b", "c", "a", "c"])
    one = evaluate_image_text(EvaluateArguments(model, save(listed, tmp_path)))
    other = evaluate_image_text(
        EvaluateArguments(model, save(flat, tmp_path, "b.parquet"), image_id_column="image_id")
    )
    for results in (one, other):
        assert (results.pop("images"), results.pop("captions"), results.pop("dataset")[:1]) == (3, 6, "/")
    assert one == other
    texts = [(text, i) for i, row in enumerate(lists) for text in row]
    expected = recall(by_hand(listed, range(3)), texts_by_hand([t for t, _ in texts]), [i for _, i in texts])
    assert {name: one[name] for name in expected} == pytest.approx(expected)


def test_empty_and_long_captions_are_counted(model, tmp_path, capsys):
    texts = ["a red picture", "", "  \n", None, "the " * 16, "the " * 15]  # 17 and 16 tokens, with <end>
    rows = image_text.rows(texts)
    assert evaluate(model, save(rows, tmp_path)) == 0
    table = cells(capsys.readouterr().out)
    assert table["images"] == "6"
    assert table["captions"] == "3"
    assert table["empty captions"] == "3 (left out)"
    assert table["images without a caption"] == "3 (left out of the retrieval)"
    assert table["captions cut off"] == "1 (longer than 16 tokens)"
    expected = recall(by_hand(rows, [0, 4, 5]), texts_by_hand([texts[0], texts[4], texts[5]]), range(3))
    assert table["rsum"] == f"{expected['rsum']:.1f}"


def test_images_without_captions_and_their_labels(model, tmp_path):
    """Ten images in thirty rows, of which some have no caption: the right embeddings and labels must be taken."""
    ids = [10 + i // 3 if i % 2 else 19 - i // 3 for i in range(30)]
    texts = [None if i < 14 else " ".join(np.random.default_rng(i).choice(image_text.WORDS[3:], 6)) for i in ids]
    labels = [i * i % 3 for i in ids]
    rows = image_text.rows(texts, image_id=ids, label=labels)
    data = save(rows, tmp_path)
    results = evaluate_image_text(EvaluateArguments(model, data, image_id_column="image_id", label_column="label"))
    first = {i: ids.index(i) for i in ids}
    pictures = dict(zip(first, by_hand(rows, first.values()), strict=True))
    place = {i: n for n, i in enumerate(i for i in first if i >= 14)}
    kept = [(text, place[i]) for text, i in zip(texts, ids, strict=True) if text]
    captions = texts_by_hand([text for text, _ in kept])
    expected = recall(torch.stack([pictures[i] for i in place]), captions, [n for _, n in kept])
    classes = class_embeddings(models.make("clip"), image_text.tokenizer(), image_text.COLOURS)
    expected |= zero_shot_accuracy(torch.stack([*pictures.values()]), [i * i % 3 for i in first], classes)
    assert {name: results[name] for name in expected} == pytest.approx(expected)
    assert (results["images"], results["images_without_caption"], results["captions"]) == (10, 4, len(kept))


def test_an_empty_caption_in_a_list(tmp_path):
    pairs = read_pairs(image_text.rows([["a", "", None], [], ["b"], None]))
    assert (pairs.texts, pairs.text_image.tolist(), pairs.empty, pairs.rows) == (["a", "b"], [0, 2], 3, [0, 1, 2, 3])


def test_classification_needs_no_captions(model, tmp_path, capsys):
    rows = image_text.rows(TEXTS, label=LABELS).remove_columns("text")
    assert evaluate(model, save(rows, tmp_path), "--label_column", "label") == 0
    table = cells(capsys.readouterr().out)
    assert table["retrieval"] == "not measured: there is no column 'text'"
    assert table["zero-shot accuracy"].endswith("(3 classes, 1 templates)")
    empty = image_text.rows([None] * 7, label=LABELS)
    assert evaluate(model, save(empty, tmp_path), "--label_column", "label") == 0
    assert cells(capsys.readouterr().out)["retrieval"] == "not measured: all 7 captions are empty"


def test_labels_that_are_strings(model, tmp_path):
    names = [image_text.COLOURS[i] for i in LABELS]
    results = evaluate_image_text(
        EvaluateArguments(model, save(image_text.rows(TEXTS, kind=names), tmp_path), label_column="kind")
    )
    coded = save(image_text.rows(TEXTS, label=LABELS), tmp_path)
    expected = evaluate_image_text(EvaluateArguments(model, coded, label_column="label"))
    assert results["zero_shot_accuracy@1"] == expected["zero_shot_accuracy@1"]


def test_the_split_of_a_folder_is_test(model, tmp_path):
    parts = {"train": image_text.rows(TEXTS[:2]), "test": image_text.rows(TEXTS)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")
    results = evaluate_image_text(EvaluateArguments(model, str(tmp_path / "data")))
    assert (results["images"], results["split"]) == (7, "test")


def test_workers_and_sizes_of_batches_change_nothing(model, tmp_path):
    data = save(image_text.rows(TEXTS), tmp_path)
    one = evaluate_image_text(EvaluateArguments(model, data))
    other = evaluate_image_text(EvaluateArguments(model, data, batch_size=2, num_workers=1))
    assert one == pytest.approx(other)


@pytest.mark.parametrize("family", ["siglip", "blip"])
def test_other_families(family, tmp_path):
    folder = image_text.save(tmp_path / family, family)
    results = evaluate_image_text(EvaluateArguments(folder, save(image_text.rows(TEXTS), tmp_path)))
    assert (results["captions"], results["context"]) == (7, 16)
    assert readable(results)["rsum"] == f"{results['rsum']:.1f}"


@pytest.mark.parametrize("make", [image_text.altclip, image_text.chinese_clip])
def test_models_with_bert_s_texts(make, tmp_path):
    make().save_pretrained(tmp_path)
    image_text.tokenizer().save_pretrained(tmp_path)
    image_text.processor().save_pretrained(tmp_path)
    net, _, processor = load_image_text_model(str(tmp_path))
    given = image_features(net, processor, image_text.rows(TEXTS), chosen=[4, 1])
    assert given.shape == (2, 16)


# ---- images that do not decode -------------------------------------------------------------------------------------


def test_a_corrupt_image_is_named(model, tmp_path, capsys):
    rows = image_text.rows(TEXTS, corrupt=[4], image_id=[0, 0, 1, 1, 2, 2, 3])
    assert evaluate(model, save(rows, tmp_path), "--image_id_column", "image_id") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "every image must decode; row 4 does not" in error
    assert "--on_error skip" in error
    assert evaluate(model, save(image_text.rows(TEXTS, without=[2]), tmp_path)) == 1
    assert "every image must decode; row 2 does not: there is no image" in capsys.readouterr().err


def test_corrupt_images_are_skipped_and_counted(model, tmp_path, capsys):
    rows = image_text.rows(TEXTS, corrupt=[4], without=[1], label=LABELS)
    flags = ["--on_error", "skip", "--label_column", "label"]
    assert evaluate(model, save(rows, tmp_path), *flags) == 0
    table = cells(capsys.readouterr().out)
    kept = [0, 2, 3, 5, 6]
    assert (table["images"], table["images that do not decode"]) == ("5", "2 (left out)")
    expected = recall(by_hand(rows, kept), texts_by_hand([TEXTS[i] for i in kept]), range(5))
    assert table["rsum"] == f"{expected['rsum']:.1f}"
    nothing = image_text.rows(TEXTS[:2], corrupt=[0, 1])
    assert evaluate(model, save(nothing, tmp_path), "--on_error", "skip") == 1
    assert "at least one image must decode, got 2 that do not" in capsys.readouterr().err


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_column", "photo"], "must have the column 'photo', got image, text, label, image_id. Name yours"),
        (["--text_column", "caption"], "must have the column 'caption', got image, text, label, image_id. Name yours"),
        (["--text_column", "label"], "'label' must hold captions, strings or lists of strings, got ClassLabel"),
        (["--image_column", "text"], "the column 'text' must hold images, got Value('string')"),
        (["--image_id_column", "id"], "with --image_id_column"),
        (["--image_id_column", "image"], "the column 'image' must hold integers or strings, got Image"),
        (["--label_column", "class"], "must have the column 'class', got"),
        (
            ["--label_column", "image_id"],
            "'image_id' must hold class names (ClassLabel or strings), got Value('int64')",
        ),
        (["--label_column", "label", "--templates", "a photo"], "every template must have {} in place of the class"),
        (["--on_error", "ignore"], "`on_error` must be one of 'raise', 'skip', got 'ignore'"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--output", "out.csv"], "--output must be a .json file other than the data set, got out.csv"),
        (["--split", "validation"], "a single file has only the split 'train', got 'validation'"),
    ],
)
def test_bad_flags(model, tmp_path, capsys, flags, message):
    data = save(image_text.rows(TEXTS, label=LABELS, image_id=range(7)), tmp_path)
    assert evaluate(model, data, *flags) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        (image_text.rows([""] * 3), [], "retrieval must have captions, got none: all 3 captions are empty"),
        (image_text.rows(["a"] * 3).remove_columns("text"), [], "got none: there is no column 'text'. Name their"),
        (image_text.rows(["a"] * 3, label=[0, -1, 1]), ["--label_column", "label"], "every row must have a label in"),
        (image_text.rows(["a"] * 3, label=[0, None, 1]), ["--label_column", "label"], "got 1 that have none"),
        (image_text.rows(["a"] * 3, image_id=[0, None, 1]), ["--image_id_column", "image_id"], "got 1 without. Drop"),
        (Dataset.from_dict({"image": ["x.png"], "text": ["a"]}), [], "'image' must hold images, got Value('string')"),
    ],
)
def test_bad_rows(model, tmp_path, capsys, rows, flags, message):
    assert evaluate(model, save(rows, tmp_path), *flags) == 1
    assert message in capsys.readouterr().err


def test_no_rows():
    with pytest.raises(ValueError, match=r"the data set must have at least one row, got none\. Look at --split"):
        check_columns(image_text.rows(TEXTS).select([]), image_column="image")


def test_the_data_set_is_not_overwritten(model, tmp_path, capsys):
    data = tmp_path / "rows.json"
    data.write_text('{"text": "a"}\n')
    assert evaluate(model, str(data), "--output", str(data)) == 1
    assert "--output must be a .json file other than the data set" in capsys.readouterr().err
    assert data.read_text() == '{"text": "a"}\n'


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            "vit",
            "the model must embed images and texts, but ViTModel has no get_image_features and no get_text_features",
        ),
        ("siglip_classifier", "must have all weights of a SiglipModel, got none for"),
    ],
)
def test_models_that_cannot(family, message, tmp_path, capsys):
    folder = image_text.save(tmp_path / family, family)
    assert evaluate(folder, save(image_text.rows(TEXTS), tmp_path)) == 1
    assert message in capsys.readouterr().err


def test_a_checkpoint_without_tokenizer(tmp_path, monkeypatch):
    """Transformers makes one for CLIP that knows no word; for others it raises, in many lines."""
    models.make("clip").save_pretrained(tmp_path)
    image_text.processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must have a tokenizer, got none\. Save it there"):
        load_image_text_model(str(tmp_path))

    def fail(name):
        raise ValueError("Unrecognized configuration\nModel type should be one of")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ValueError, match=r"must have a tokenizer: Unrecognized configuration$"):
        load_image_text_model(str(tmp_path))


def test_a_model_that_has_diverged(tmp_path, capsys):
    net = models.make("clip")
    net.visual_projection.weight.data[0, 0] = np.nan
    net.save_pretrained(tmp_path)
    image_text.tokenizer().save_pretrained(tmp_path)
    image_text.processor().save_pretrained(tmp_path)
    assert evaluate(str(tmp_path), save(image_text.rows(TEXTS), tmp_path)) == 1
    assert "every image embedding must be finite, got 7 of 7 rows with NaN" in capsys.readouterr().err


def test_no_trace_is_left_of_evaluation_mode_or_gradients(model):
    net, _, processor = load_image_text_model(model)
    net.train()
    assert not image_features(net, processor, image_text.rows(TEXTS[:2]), chosen=[1]).requires_grad
    assert net.training
