"""Recall and zero-shot accuracy against a full matrix that is sorted; ties; what is refused."""

import dataclasses
import time

import models
import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.models.altclip.modeling_altclip import AltCLIPOutput
from transformers.models.blip.modeling_blip import BlipOutput
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPOutput
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.models.siglip.modeling_siglip import SiglipOutput

from hf_mimic.metrics import recall, retrieval, zero_shot_accuracy

OUTPUTS = (CLIPOutput, SiglipOutput, AltCLIPOutput, ChineseCLIPOutput, BlipOutput)


def unit(x):
    x = np.asarray(x, dtype=np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def found(cosines, right, k, *, ties="against"):
    """Return the share of rows with a right answer among the k first, sorted one by one; the slow twin."""
    hits = []
    for row, good in zip(cosines, right, strict=True):
        order = np.lexsort((good if ties == "against" else ~good, -row))
        hits.append(good[order[:k]].any())
    return np.mean(hits)


def oracle(images, texts, owner, ks=(1, 5, 10), ties="against"):
    cosines = unit(images) @ unit(texts).T
    right = np.asarray(owner)[None] == np.arange(len(images))[:, None]
    shares = {f"image_to_text_recall@{k}": found(cosines, right, k, ties=ties) for k in ks}
    shares |= {f"text_to_image_recall@{k}": found(cosines.T, right.T, k, ties=ties) for k in ks}
    return {**shares, "rsum": 100 * sum(shares.values())}


def captioned(m=13, n=40, width=5, *, seed=0, dtype=np.float32):
    """Return images, texts that are a little like their image, and whose text each is: every image has some."""
    generator = np.random.default_rng(seed)
    owner = generator.permutation(np.concatenate([np.arange(m), generator.integers(0, m, n - m)]))
    images = generator.normal(size=(m, width))
    return images.astype(dtype), (images[owner] + generator.normal(size=(n, width))).astype(dtype), owner


def on_axes(rows, seed):
    """Return vectors of whole numbers along axes: their cosines are 0 or 1 to the last bit, so many are equal."""
    generator = np.random.default_rng(seed)
    return np.eye(4)[generator.integers(0, 4, rows)] * generator.choice([1.0, 2.0, 4.0], (rows, 1))


# ---- recall --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(("m", "n"), [(13, 40), (20, 20), (1, 6), (1, 1)])
def test_recall_is_that_of_a_sorted_matrix(m, n, dtype):
    images, texts, owner = captioned(m, n, dtype=dtype)
    assert recall(images, texts, owner) == pytest.approx(oracle(images, texts, owner), abs=1e-12)


def test_ties_count_against():
    images, texts = on_axes(12, 1), on_axes(30, 2)
    owner = np.concatenate([np.arange(12), np.random.default_rng(3).integers(0, 12, 18)])
    given = recall(images, texts, owner, ks=(1, 3))
    assert given == pytest.approx(oracle(images, texts, owner, (1, 3)), abs=1e-12)
    assert given["rsum"] < oracle(images, texts, owner, (1, 3), ties="for")["rsum"] - 50  # the oracle can tell


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [31, 64, 1000])
def test_collapsed_embeddings_find_nothing(dtype, chunk_size):
    """Also where a matrix product rounds its columns differently: 333 and 17 fit no vector register."""
    point = torch.randn(1, 17).to(dtype)
    result = recall(point.repeat(333, 1), 3 * point.repeat(333, 1), torch.arange(333), chunk_size=chunk_size)
    assert set(result.values()) == {0.0}


def test_the_captions_of_an_image_are_no_rivals():
    images, texts = np.eye(2), np.array([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [0.9, 1.0]])
    result = recall(images, texts, [0, 0, 0, 1], ks=(1, 2))
    assert result == {
        "image_to_text_recall@1": 1.0,
        "image_to_text_recall@2": 1.0,
        "text_to_image_recall@1": 1.0,
        "text_to_image_recall@2": 1.0,
        "rsum": 400.0,
    }


def test_chunks_and_kinds_of_input_change_nothing():
    images, texts, owner = captioned(50, 90)
    whole = recall(images, texts, owner, chunk_size=10**6)
    for chunk_size in (1, 7, 60):
        assert recall(images, texts, owner, chunk_size=chunk_size) == whole
    tensors = torch.tensor(images, requires_grad=True), torch.tensor(texts), torch.tensor(owner, dtype=torch.int32)
    assert recall(*tensors) == whole
    images.setflags(write=False)
    assert recall(images, (3 * texts).tolist(), owner.tolist()) == whole
    assert recall(images * 1e-30, texts, owner)["rsum"] == pytest.approx(whole["rsum"])  # tiny, but not nothing


def test_an_embedding_of_zeros_has_no_direction():
    images, texts = np.eye(3), np.eye(3)
    texts[1] = 0
    result = recall(images, texts, [0, 1, 2], ks=(1,))
    assert result["text_to_image_recall@1"] == pytest.approx(2 / 3)


def test_k_larger_than_the_candidates():
    images, texts, owner = captioned(4, 6)
    assert recall(images, texts, owner, ks=(100,))["rsum"] == 200.0


def test_memory_is_that_of_a_tile(monkeypatch):
    shapes, product = set(), torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (shapes.add((len(a), b.shape[1])), product(a, b))[1])
    images, texts, owner = captioned(50, 90)
    recall(images, texts, owner, chunk_size=16)
    assert shapes == {(16, 16), (2, 16), (16, 10), (2, 10)}


@pytest.mark.slow
def test_twenty_thousand_pairs():
    images = torch.randn(20_000, 64)
    texts = images + torch.randn(20_000, 64)
    start = time.perf_counter()
    result = recall(images, texts, torch.arange(20_000))
    assert time.perf_counter() - start < 30  # 3 s on a free core
    assert 200 < result["rsum"] < 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_image": [0, 1, 1, 0]}, "every image must have a text, got 1 of 3 without"),
        ({"text_image": [0, 1, 3, 2]}, r"`text_image` must be in \[0, 3\), got 1 that are not, such as 3"),
        ({"text_image": [0, 1, -1, 2]}, "got 1 that are not, such as -1"),
        ({"text_image": [0, 1, 2]}, r"`text_image` must be integers of shape \(4,\), got torch.int64 of \(3,\)"),
        ({"text_image": [0.0, 1.0, 2.0, 2.0]}, "must be integers of shape"),
        ({"images": [[1, 0], [np.nan, 0], [np.inf, 1]]}, "every image embedding must be finite, got 2 of 3 rows"),
        ({"texts": [[1, np.nan]] * 4}, "every text embedding must be finite, got 4 of 4 rows"),
        ({"texts": np.ones((4, 3))}, "must have the same width, got 2 and 3"),
        ({"images": np.ones(3)}, r"image embeddings must be \(rows, width\) with at least one row, got \(3,\)"),
        ({"images": np.ones((0, 2))}, r"at least one row, got \(0, 2\)"),
        ({"ks": (0,)}, "`ks` must be integers from 1 up, got 0"),
        ({"ks": (1.5,)}, "`ks` must be integers from 1 up, got 1.5"),
        ({"chunk_size": 0}, "`chunk_size` must be integers from 1 up, got 0"),
    ],
)
def test_what_recall_refuses(change, message):
    given = {"images": np.eye(3)[:, :2] + 1, "texts": np.ones((4, 2)), "text_image": [0, 1, 2, 2], **change}
    images, texts, owner = (given.pop(name) for name in ("images", "texts", "text_image"))
    with pytest.raises(ValueError, match=message):
        recall(images, texts, owner, **given)


# ---- compute_metrics -----------------------------------------------------------------------------------------------


def test_retrieval_takes_the_image_of_the_first_row():
    images, texts, owner = captioned(9, 30)
    first = np.unique(owner, return_index=True)[1]
    other = np.random.default_rng(5).normal(size=(30, 5)).astype(np.float32)  # of later rows: not looked at
    other[first] = images
    prediction = EvalPrediction((other, texts), 100 - owner)  # ids in another order
    assert retrieval(prediction) == recall(images, texts, owner)
    assert retrieval(EvalPrediction((texts, texts), None)) == recall(texts, texts, range(30))


@pytest.mark.parametrize("ids", [True, False])
def test_retrieval_in_a_trainer(tmp_path, ids):
    model, batch = models.make("clip"), models.make_batch("clip", size=6)
    if ids:
        batch["image_id"] = torch.arange(6) // 2
    names = {"label_names": ["image_id"] if ids else []}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, remove_unused_columns=False, **names, **quiet),
        eval_dataset=list(range(6)),
        data_collator=lambda rows: {**{name: x[rows] for name, x in batch.items()}, "return_loss": True},
        compute_metrics=retrieval,
        preprocess_logits_for_metrics=lambda outputs, labels: (outputs[3], outputs[2]),
    )
    result = trainer.evaluate()
    with torch.no_grad():
        outputs = model(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"])
    owner = batch.get("image_id", torch.arange(6))
    expected = recall(outputs.image_embeds[[0, 2, 4]] if ids else outputs.image_embeds, outputs.text_embeds, owner)
    assert {name: result[f"eval_{name}"] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("output", OUTPUTS)
def test_where_the_embeddings_are_in_a_model_s_outputs(output):
    names = [field.name for field in dataclasses.fields(output) if field.name != "loss"]
    assert (names[3], names[2]) == ("image_embeds", "text_embeds")


@pytest.mark.parametrize(
    ("predictions", "ids", "message"),
    [
        (np.ones((3, 2)), None, r"`predictions` must be \(image embeddings, text embeddings\), got ndarray"),
        ((np.ones((3, 2)),) * 4, None, "got 4 values"),
        ((np.ones((3, 2)), np.ones((4, 2))), None, r"got 3, 4 and ids of shape \(4,\)"),
        ((np.ones((3, 2)), np.ones((3, 2))), np.arange(2), r"got 3, 3 and ids of shape \(2,\)"),
        ((np.ones((3, 2)), np.ones((3, 2))), np.ones((3, 2)), r"got 3, 3 and ids of shape \(3, 2\)"),
    ],
)
def test_what_retrieval_refuses(predictions, ids, message):
    with pytest.raises(ValueError, match=message):
        retrieval(EvalPrediction(predictions, ids))


# ---- zero-shot accuracy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 4, 5, 9])
def test_zero_shot_accuracy_is_that_of_a_sorted_matrix(classes):
    generator = np.random.default_rng(classes)
    named, labels = generator.normal(size=(classes, 6)), generator.integers(0, classes, 50)
    images = named[labels] + 1.5 * generator.normal(size=(50, 6))
    right = labels[:, None] == np.arange(classes)
    ks = (1, 5) if classes >= 5 else (1,)
    expected = {f"zero_shot_accuracy@{k}": found(unit(images) @ unit(named).T, right, k) for k in ks}
    for chunk_size in (7, 10**6):
        given = zero_shot_accuracy(images, labels, named, chunk_size=chunk_size)
        assert given == pytest.approx(expected, abs=1e-12)


def test_classes_that_are_described_alike_are_not_told_apart():
    point = torch.randn(1, 17)
    given = zero_shot_accuracy(torch.randn(40, 17), torch.arange(40) % 7, point.repeat(7, 1))
    assert given == {"zero_shot_accuracy@1": 0.0, "zero_shot_accuracy@5": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1, 2]}, r"`labels` must be in \[0, 2\), got 1 that are not, such as 2"),
        ({"labels": [0, -100, 1]}, "got 1 that are not, such as -100"),
        ({"labels": [0, 1]}, r"`labels` must be integers of shape \(3,\)"),
        ({"classes": np.ones((2, 4))}, "image and class embeddings must have the same width, got 2 and 4"),
        ({"classes": np.full((2, 2), np.nan)}, "every class embedding must be finite, got 2 of 2"),
        ({"chunk_size": -1}, "`chunk_size` must be integers from 1 up, got -1"),
    ],
)
def test_what_zero_shot_accuracy_refuses(change, message):
    given = {"labels": [0, 1, 1], "classes": np.eye(2), "chunk_size": 8, **change}
    with pytest.raises(ValueError, match=message):
        zero_shot_accuracy(np.ones((3, 2)), given["labels"], given["classes"], chunk_size=given["chunk_size"])
