"""Pairs on their way to a model: the collator against each row alone, captions, broken images, ids out of keys."""

import pickle

import datasets
import image_text
import models
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from hf_mimic.data import SampleIdCollator, SampleIdDataset
from hf_mimic.embeddings import text_features
from hf_mimic.evaluation import image_features
from hf_mimic.images import as_rgb, skip_unreadable, undecoded
from hf_mimic.pairs import (
    PairCollator,
    check_captions,
    drop_empty_captions,
    first_caption,
    hash_ids,
    identified,
)

TEXTS = ["a red picture", "green", "a dark blue picture", "the red photo", "bright green", "blue"]


def collator(**options):
    return PairCollator(image_text.tokenizer(), image_text.processor(), **{"max_length": 16, **options})


def examples(rows):
    return [rows[i] for i in range(len(rows))]


def streamed(rows):
    return rows.to_iterable_dataset(num_shards=2)


# ---- the collator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["clip", "siglip", "blip"])
def test_a_batch_embeds_as_evaluation_does(family):
    """Captions of other lengths, pictures decoded here or before: the features are those of `hf-mimic evaluate`."""
    model, rows = models.make(family), image_text.rows(TEXTS)
    collate = PairCollator(image_text.tokenizer(), image_text.processor(), model=model)
    batch, raw = collate(examples(rows)), collate(examples(undecoded(rows)))
    assert all(torch.equal(batch[name], raw[name]) for name in batch)
    with torch.no_grad():
        outputs = model(**batch)
    images = image_features(model, image_text.processor(), rows, chosen=range(6))
    texts = text_features(model, image_text.tokenizer(), TEXTS)
    normal = torch.nn.functional.normalize
    torch.testing.assert_close(outputs.image_embeds, normal(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.text_embeds, normal(texts), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs.text_embeds, normal(texts).roll(1, 0), atol=1e-3)


def test_padding_is_to_the_longest_or_to_full_length():
    clip, siglip = (PairCollator(image_text.tokenizer(), image_text.processor(), model=models.make(f))
                    for f in ("clip", "siglip"))  # fmt: skip
    batch = clip(examples(image_text.rows(["red", "a red picture"])))
    assert batch["input_ids"].tolist()[0][2:] == [0, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    batch = siglip(examples(image_text.rows(["red", "a red picture"])))
    assert batch["input_ids"].shape == (2, 16)
    assert "attention_mask" not in batch


def test_batches_of_one_length_embed_the_same():
    model, rows, collate = models.make("clip"), examples(image_text.rows(TEXTS)), collator()
    with torch.no_grad():
        short = model(**collate(rows)).text_embeds
        collate.fixed_length = True
        batch = collate(rows)
        torch.testing.assert_close(model(**batch).text_embeds, short)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (6, 16)
    assert batch["attention_mask"].sum(1).tolist() == [4, 2, 5, 4, 3, 2]


def test_siglip_is_known_by_its_image_processor():
    from transformers import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    batch = PairCollator(image_text.tokenizer(), processor, max_length=9)(examples(image_text.rows(["red"])))
    assert batch["input_ids"].shape == (1, 9)


def test_a_long_caption_is_cut_off():
    long = "the " * 40
    assert collator()(examples(image_text.rows([long, "red"])))["input_ids"].shape == (2, 16)
    assert collator(max_length=5)(examples(image_text.rows([long])))["input_ids"].shape == (1, 5)


def test_of_a_list_the_first_caption_counts():
    rows = image_text.rows([["red", "green"], ["", "blue"]])
    given, expected = collator()(examples(rows)), collator()(examples(image_text.rows(["red", "blue"])))
    assert torch.equal(given["input_ids"], expected["input_ids"])
    assert first_caption(["", None]) == first_caption([]) == first_caption(None) == first_caption("  \n") == ""


def test_columns_to_keep():
    rows = image_text.rows(["red", "blue"], image_id=[7, 2**40])
    assert collator(keep=["image_id"])(examples(rows))["image_id"].tolist() == [7, 2**40]
    assert "image_id" not in collator()(examples(rows))
    assert "image_id" not in collator(keep=["image_id"])(examples(rows.remove_columns("image_id")))
    with pytest.raises(ValueError, match="the column 'image_id' must hold integers, got 'x'"):
        collator(keep=["image_id"])([{**rows[0], "image_id": "x"}])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "I;16", "F", "YCbCr"])
def test_any_mode_becomes_rgb(mode):
    assert as_rgb(Image.new(mode, (4, 4))).mode == "RGB"


def test_deep_and_transparent_pictures():
    """Sixteen bits keep their brightness, a palette with transparency its colours, without a warning."""
    assert np.asarray(as_rgb(Image.fromarray(np.full((2, 2), 0x8000, np.uint16)))).tolist() == [[[128] * 3] * 2] * 2
    picture = Image.new("P", (1, 1))
    picture.putpalette([9, 8, 7])
    picture.info["transparency"] = b"\0"
    assert as_rgb(picture).getpixel((0, 0)) == (9, 8, 7)


def test_a_processor_has_both():
    class Processor:
        tokenizer, image_processor = image_text.tokenizer(), image_text.processor()

    rows = examples(image_text.rows(TEXTS))
    given, expected = PairCollator(Processor, Processor, max_length=16)(rows), collator()(rows)
    assert all(torch.equal(given[name], expected[name]) for name in expected)


def test_it_goes_to_a_worker():
    again = pickle.loads(pickle.dumps(collator()))
    rows = examples(image_text.rows(["red"]))
    assert torch.equal(again(rows)["input_ids"], collator()(rows)["input_ids"])


def test_without_a_known_length():
    with pytest.raises(ValueError, match="`max_length` must be given, as neither the tokenizer nor a model says"):
        collator(max_length=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " "}, "every caption must have words, got ' '. Drop it"),
        ({"text": None}, "every caption must have words, got None"),
        ({"text": 3}, "a caption must be a string or a list of strings, got 3"),
        ({"image": None}, "every image must decode, got one that does not: there is no image"),
        ({"image": image_text.picture(0, corrupt=True)}, "every image must decode, got one that does not: "),
    ],
)
def test_what_it_refuses_is_named_by_id(change, message):
    rows = [{"sample_id": 40 + i, **row} for i, row in enumerate(examples(image_text.rows(TEXTS)))]
    rows[2] |= change
    with pytest.raises(ValueError, match=f"^sample_id 42: {message}"):
        SampleIdCollator(collator())(rows)


def test_columns_that_are_not_there():
    rows = examples(image_text.rows(["red"]))
    with pytest.raises(
        ValueError, match=r"must have the column 'caption', got image, text\..*remove_unused_columns=F"
    ):
        collator(text_column="caption")(rows)


@pytest.mark.parametrize("decode", [True, False])
def test_a_corrupt_image_of_a_data_set_is_named(decode):
    """By the data set, which decodes it, or by the collator."""
    rows = image_text.rows(TEXTS, corrupt=[4])
    rows = rows if decode else undecoded(rows)
    view = SampleIdDataset(rows, np.arange(100, 106))
    loader = DataLoader(view, batch_size=3, collate_fn=SampleIdCollator(collator()))
    name = r"row 4 \(sample_id 104\) does not" if decode else "sample_id 104: every image must decode"
    with pytest.raises(ValueError, match=name):
        list(loader)


def test_an_error_of_the_whole_batch_stays_as_it_is():
    def refuse(rows):
        if len(rows) > 1:
            raise ValueError("too many")
        return {}

    with pytest.raises(ValueError, match=r"^too many$"):
        SampleIdCollator(refuse)([{"sample_id": 1}, {"sample_id": 2}])


# ---- captions ------------------------------------------------------------------------------------------------------


def test_captions_are_counted_without_decoding(monkeypatch):
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("an image was decoded"))
    rows = image_text.rows(["a red picture", "", None, "  ", "the " * 16, "the " * 15])  # 17, 16 tokens
    counts = check_captions(rows, "text", image_text.tokenizer(), 16)
    assert counts == {"empty_captions": 3, "cut_captions": 1}
    kept, empty = drop_empty_captions(rows)
    assert (empty, kept["text"][:]) == (3, ["a red picture", "the " * 16, "the " * 15])
    assert drop_empty_captions(kept) == (kept, 0)


def test_a_stream_drops_empty_captions_as_it_is_read():
    stream, empty = drop_empty_captions(streamed(image_text.rows(["red", "", None, "blue", [""], ["a", "b"]][:4])))
    assert empty is None
    assert [row["text"] for row in stream] == ["red", "blue"]


# ---- images of a stream --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_skips_what_does_not_decode(workers):
    rows = image_text.rows(TEXTS, corrupt=[1, 4], without=[5])
    stream, skipped = skip_unreadable(streamed(rows))
    loader = DataLoader(stream, batch_size=2, num_workers=workers, collate_fn=collator())
    assert sum(len(batch["input_ids"]) for batch in loader) == 3
    assert int(skipped) == 3
    with pytest.raises(ValueError, match="every image must decode"):
        list(DataLoader(undecoded(streamed(rows)), batch_size=2, collate_fn=collator()))


def test_images_are_decoded_once_to_look_and_once_to_use(monkeypatch):
    calls, decode = [], datasets.Image.decode_example
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *a, **k: (calls.append(1), decode(*a, **k))[1])
    stream = hash_ids(skip_unreadable(streamed(image_text.rows(TEXTS)))[0], "text")
    collator()(list(drop_empty_captions(stream)[0]))
    assert len(calls) == 2 * 6


@pytest.mark.parametrize("use", [drop_empty_captions, skip_unreadable, lambda rows, name: hash_ids(rows, name)])
def test_a_column_that_a_stream_does_not_have(use):
    with pytest.raises(ValueError, match=r"must have the (key )?columns? '?caption'? ?.*, got image, text"):
        use(streamed(image_text.rows(TEXTS)), "caption")


# ---- ids -----------------------------------------------------------------------------------------------------------


def test_ids_are_hashes_of_keys_in_data_sets_and_streams():
    rows = image_text.rows(TEXTS, key=list("abcdef"), part=list("uuuvvv"))
    ids = hash_ids(rows, "key")["sample_id"][:]
    assert hash_ids(rows, "key").features["sample_id"].dtype == "int64"
    assert [row["sample_id"] for row in hash_ids(streamed(rows), "key")] == ids
    assert len(set(ids)) == 6
    assert hash_ids(rows.select([0]), "key")["sample_id"][0] == 4681665781835383343
    both = hash_ids(rows, ["part", "key"], into="id")["id"][:]
    assert set(both).isdisjoint(ids)


def test_positions_in_a_sharded_stream_are_no_ids():
    """The negative control: two workers give the same numbers to other rows."""
    rows = image_text.rows(TEXTS, key=list("abcdef")).remove_columns("image")
    stream = rows.to_iterable_dataset(num_shards=2).map(lambda _, i: {"place": i}, with_indices=True)
    given = [row for batch in DataLoader(hash_ids(stream, "key"), batch_size=None, num_workers=2) for row in [batch]]
    assert len({int(row["place"]) for row in given}) < 6
    assert len({int(row["sample_id"]) for row in given}) == 6


def test_keys_that_are_no_keys():
    rows = image_text.rows(TEXTS, key=["a", "b", "a", "c", "a", "d"])
    with pytest.raises(ValueError, match="the keys in key must be unique, got 2 repeated ones"):
        hash_ids(rows, "key")
    with pytest.raises(ValueError, match="a key must be a string, got None"):
        hash_ids(image_text.rows(TEXTS, key=[None, *"bcdef"]), "key")
    with pytest.raises(
        ValueError, match="must have the key columns kye and no column 'sample_id', got image, text, key"
    ):
        hash_ids(rows, "kye")
    with pytest.raises(ValueError, match=r"a key must be a string, got 0\. Integers are ids as they are"):
        list(hash_ids(Dataset.from_dict({"k": [0, 1]}).to_iterable_dataset(), "k"))


def test_identified():
    rows = image_text.rows(TEXTS, key=list("abcdef"), image_id=[5, 4, 3, 2, 1, 0])
    assert identified(rows)["sample_id"][:] == [0, 1, 2, 3, 4, 5]
    assert identified(rows, "image_id") is rows
    hashed = identified(rows, "key")
    assert hashed["key"][:] == hash_ids(rows, "key")["sample_id"][:]
    assert hashed["key_key"][:] == list("abcdef")
