"""`hf-mimic train --text_column` in process on a tiny CLIP, webdatasets, the example; what goes wrong, in one line."""

import importlib.util
import io
import sys
import tarfile
from pathlib import Path

import datasets
import image_text
import models
import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from test_cli import cells, fails
from training import QUIET, visits
from transformers import AutoModel

from hf_mimic import MimicTrainer, MimicTrainingArguments, ScoreTable
from hf_mimic.cli import main
from hf_mimic.data import load_rows
from hf_mimic.evaluation import load_image_text_model
from hf_mimic.images import skip_unreadable
from hf_mimic.pairs import PairCollator, drop_empty_captions, hash_ids

FLAGS = "--use_cpu --report_to none --dataloader_pin_memory False --disable_tqdm True --save_strategy no".split()
FLAGS += "--per_device_train_batch_size 8 --num_train_epochs 2 --text_column text".split()
FLAGS += "--learning_rate 1e-3 --lr_scheduler_type constant".split()
TEXTS = [f"a {'dark' if i % 2 else 'bright'} {image_text.COLOURS[i % 3]} picture" for i in range(24)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return image_text.save(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return image_text.save(tmp_path_factory.mktemp("siglip"), "siglip")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    models.make("siglip", seed=1).save_pretrained(folder)
    return str(folder)


def train(model, folder, rows, *flags, strategy="dissect"):
    rows.to_parquet(folder / "rows.parquet")
    shared = ["--model", model, "--dataset", str(folder / "rows.parquet"), "--output_dir", str(folder / "run")]
    return main(["train", *shared, *FLAGS, *(["--strategy", strategy] if strategy else []), *flags])


def scores_of(folder):
    return ScoreTable.load(folder / "run" / "scores").to_arrow().to_pandas()


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "trained", "table"),
    [
        (["--warmup_data", "selected"], 2 * 12, ("dissect", "0.5")),
        (["--refresh", "epoch", "--rescore_share", "0", "--selection_rate", "0.25"], 24 + 6, ("dissect", "0.25")),
        (["--cache_negatives", "--gradient_accumulation_steps", "3"], 24 + 12, ("dissect", "0.5")),
    ],
)
def test_train(clip, tmp_path, capsys, flags, trained, table):
    assert train(clip, tmp_path, image_text.rows(TEXTS), *flags) == 0
    told, scores = cells(capsys.readouterr().out), scores_of(tmp_path)
    assert (told["rows"], told["pairs"]) == ("24", "24")
    assert (told["strategy"], told["selection rate"]) == table
    assert f"{trained} forward, {trained} backward" in told["samples"]
    assert (~scores.relative_weight.isna()).sum() == trained
    assert scores.clip_score.notna().all()
    model, tokenizer, processor = load_image_text_model(told["model"])
    assert tokenizer("red")["input_ids"] == image_text.tokenizer()("red")["input_ids"]
    assert processor.crop_size == image_text.processor().crop_size
    before = AutoModel.from_pretrained(clip)
    assert not torch.equal(model.visual_projection.weight, before.visual_projection.weight)


def test_siglip_with_a_reference_and_an_evaluation(siglip, reference, tmp_path, capsys):
    """Captions of one image are given by its id; the printed rsum is that of `hf-mimic evaluate`."""
    rows = image_text.rows(TEXTS[:6])
    held = rows.add_column("picture", ["x", "y", "x", "z", "y", "x"])
    rows = rows.add_column("picture", list("abcdef"))
    held.to_parquet(tmp_path / "held.parquet")
    flags = ["--eval_split", str(tmp_path / "held.parquet"), "--image_id_column", "picture"]
    assert train(siglip, tmp_path, rows, *flags, "--reference_model", reference, strategy="ref_loss") == 0
    told = cells(capsys.readouterr().out)
    shared = ["--model", told["model"], "--dataset", str(tmp_path / "held.parquet"), "--text_column", "text"]
    assert main(["evaluate", *shared, "--image_id_column", "picture"]) == 0
    found = cells(capsys.readouterr().out)
    assert (found["images"], found["captions"]) == ("3", "6")
    assert told["rsum"] == found["rsum"]


def test_what_was_left_out_is_told(clip, tmp_path, capsys):
    texts = [["red", "green"], ["the " * 16], [], ["", None], *([text] for text in TEXTS[:12])]
    rows = image_text.rows(texts, corrupt=[5], without=[6]).rename_columns({"text": "caption", "image": "jpg"})
    flags = ["--text_column", "caption", "--image_column", "jpg", "--on_error", "skip"]
    assert train(clip, tmp_path, rows, *flags, strategy="uniform") == 0
    told = cells(capsys.readouterr().out)
    assert (told["rows"], told["pairs"]) == ("16", "12")
    assert told["empty captions"] == "2 (left out)"
    assert told["captions cut off"] == "1 (longer than 16 tokens)"
    assert told["unreadable images"] == "2 (left out)"
    assert sorted(set(scores_of(tmp_path).sample_id)) == [0, 1, 4, *range(7, 16)]  # row numbers of the file


def test_string_ids_are_hashed(clip, tmp_path):
    """By the training and by what attaches the scores later."""
    keys = [f"{i:09d}" for i in range(24)]
    rows = image_text.rows(TEXTS, key=keys)
    assert train(clip, tmp_path, rows, "--sample_id_column", "key") == 0
    assert set(scores_of(tmp_path).sample_id) == set(hash_ids(rows, "key")["sample_id"][:])
    shared = ["--dataset", str(tmp_path / "rows.parquet"), "--scores", str(tmp_path / "run" / "scores")]
    output = str(tmp_path / "all.parquet")
    with pytest.warns(UserWarning, match="must have scores that differ"):
        assert main(["filter", *shared, "--output", output, "--sample_id_column", "key", "--keep_all"]) == 0
    curated = load_rows(output)
    assert curated["key_key"][:] == keys
    assert curated["n_visits"][:] == [2] * 24


def test_a_run_that_was_interrupted_goes_on(clip, tmp_path, capsys):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    rows, saving = image_text.rows(TEXTS), ["--variant", "momentum", "--save_strategy", "steps", "--save_steps", "3"]
    for folder, more in ((whole, []), (halves, ["--max_steps", "3"])):
        folder.mkdir()
        assert train(clip, folder, rows, *saving, *more) == 0
    assert (halves / "run" / "checkpoint-3" / "tokenizer.json").is_file()
    assert train(clip, halves, rows, "--variant", "momentum", "--resume_from_checkpoint", "true") == 0
    capsys.readouterr()
    assert scores_of(halves).equals(scores_of(whole))


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        (image_text.rows(["", None, " "]), [], "at least one row must have a caption in 'text', got 3 that are al"),
        (image_text.rows(TEXTS), ["--text_column", "caption"], "must have the column 'caption', got image, text."),
        (image_text.rows(TEXTS), ["--image_column", "jpg"], "must have the column 'jpg', got image, text."),
        (image_text.rows(TEXTS), ["--image_column", "text"], "the column 'text' must hold images"),
        (image_text.rows(TEXTS, corrupt=[7]), [], "every image must decode; row 7 (sample_id 7) does not"),
        (image_text.rows(TEXTS, without=[7]), [], "sample_id 7: every image must decode, got one that does not"),
        (image_text.rows(TEXTS[:2], corrupt=[0, 1]), ["--on_error", "skip"], "at least one image must decode, got 2"),
        (image_text.rows(TEXTS), ["--on_error", "drop"], "`on_error` must be one of 'raise', 'skip', got 'drop'"),
        (image_text.rows(TEXTS), ["--selection_rate", "0.1"], "must keep at least 2 pairs of a batch"),
        (image_text.rows(TEXTS, key=["a"] * 24), ["--sample_id_column", "key"], "unique, got 23 repeated ones"),
        (image_text.rows(TEXTS), ["--strategy", "mimic"], '`reference_model` must be a Hub repo id, a folder'),
        (image_text.rows(TEXTS), ["--eval_split", "test"], "a single file has only the split 'train', got 'test'"),
    ],
)  # fmt: skip
def test_what_does_not_fit(clip, tmp_path, capsys, rows, flags, message):
    fails(capsys, 1, message, lambda: train(clip, tmp_path, rows, *flags))


def test_without_reference_a_strategy_must_be_chosen(clip, tmp_path, capsys):
    message = (
        "--strategy must be chosen where there is no --reference_model, one of small_loss, uniform, random, big_loss, "
        "clip_score, dissect, scan, info_batch, got neither"
    )
    fails(capsys, 1, message, lambda: train(clip, tmp_path, image_text.rows(TEXTS), strategy=None))


def test_columns_of_pairs_elsewhere(clip, tmp_path, capsys):
    image_text.rows(TEXTS).to_parquet(tmp_path / "rows.parquet")
    shared = ["--model", clip, "--dataset", str(tmp_path / "rows.parquet"), "--output_dir", str(tmp_path)]
    ids = ["train", *shared, "--image_id_column", "key"]
    fails(capsys, 1, "--image_id_column must come with --text_column", lambda: main(ids))
    score = ["score", *shared, "--reference_model", clip, "--text_column", "text"]
    fails(capsys, 1, "--text_column and --image_id_column are for `hf-mimic train`", lambda: main(score))


# ---- streams -------------------------------------------------------------------------------------------------------


def shard(path, rows):
    """Write a webdataset's shard: for each key a picture, a caption, or what is given."""
    with tarfile.open(path, "w") as tar:
        for key, parts in rows.items():
            for kind, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def jpeg(row):
    file = io.BytesIO()
    Image.open(io.BytesIO(image_text.picture(row)["bytes"])).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Return two shards of eight pairs each; one has no words, one picture does not decode."""
    rows = {f"{i:05d}": {"jpg": jpeg(i), "txt": TEXTS[i].encode()} for i in range(16)}
    rows["00003"]["txt"] = b"  "
    rows["00012"]["jpg"] = rows["00012"]["jpg"][:50]
    for first in (0, 8):
        shard(tmp_path / f"{first}.tar", dict(list(rows.items())[first : first + 8]))
    return str(tmp_path / "*.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_webdataset_is_streamed(clip, shards, tmp_path, workers):
    """Four steps of DISSect over epochs of fourteen pairs; ids are the same at every visit, whoever reads."""
    stream, skipped = skip_unreadable(
        load_dataset("webdataset", data_files=shards, streaming=True, split="train"), "jpg"
    )
    stream, _ = drop_empty_captions(hash_ids(stream, "__key__"), "txt")
    model, tokenizer, processor = load_image_text_model(clip)
    options = {"strategy": "dissect", "refresh": "step", "max_steps": 4, "remove_unused_columns": False}
    options |= {"dataloader_num_workers": workers, "train_sampling_strategy": "random"}
    args = MimicTrainingArguments(str(tmp_path / "run"), **{**QUIET, **options})
    trainer = MimicTrainer(model, args, PairCollator(tokenizer, processor, "jpg", "txt", model=model), stream)
    trainer.train()
    assert trainer.state.global_step == 4
    keys = datasets.Dataset.from_dict({"key": [f"{i:05d}" for i in range(16) if i not in (3, 12)]})
    assert visits(trainer) == [sorted(hash_ids(keys, "key")["sample_id"][:])] * 2
    assert int(skipped) == 2


# ---- the example ---------------------------------------------------------------------------------------------------


def example(name="train_clip_dissect"):
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # a dataclass looks itself up there
    specification.loader.exec_module(module)
    return module


QUICK = "--use_cpu --report_to none --disable_tqdm True --dataloader_pin_memory False --save_strategy no".split()


def test_the_example(tmp_path, capsys):
    """A model made on the spot, mixed-up captions, the share of right ones chosen, scores as columns."""
    script = example()
    image_text.rows(TEXTS * 3).to_parquet(tmp_path / "rows.parquet")
    image_text.rows(TEXTS[:6]).to_parquet(tmp_path / "held.parquet")
    flags = ["--tiny", "--dataset", str(tmp_path / "rows.parquet"), "--eval_dataset", str(tmp_path / "held.parquet")]
    flags += ["--noise", "0.4", "--per_device_train_batch_size", "9", "--pretrain_epochs", "1", "--image_size", "16"]
    script.main([*flags, "--num_train_epochs", "2", "--output_dir", str(tmp_path / "run"), *QUICK])
    told = capsys.readouterr().out
    scored = load_rows(str(tmp_path / "run" / "scored.parquet"))
    clean = np.mean(scored["clean"][:])
    assert f"dissect, epoch 0: trained on 36 pairs, {clean:.3f} clean (of all {clean:.3f})" in told
    assert "dissect, epoch 1: trained on 16 pairs" in told
    assert "eval_rsum" in told
    assert "'samples_scored': 72.0, 'samples_forward': 52.0" in told
    assert len(scored) == 36
    assert set(np.round(scored["kept"][:], 2)) <= {0.5, 1.0}
    load_image_text_model(str(tmp_path / "run"))


def test_the_example_on_a_webdataset(clip, shards, tmp_path, capsys):
    script = example()
    flags = ["--dataset", "webdataset", "--data_files", shards.replace("*", "{0..0}"), "--streaming", "--model", clip]
    flags += ["--per_device_train_batch_size", "4", "--max_steps", "4", "--output_dir", str(tmp_path / "run")]
    script.main([*flags, *QUICK])
    scores = ScoreTable.load(tmp_path / "run" / "scores").to_arrow().to_pandas()
    assert sorted(scores.sample_id.value_counts()) == [2] * 7
    assert "0 times an image did not decode" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--noise and --tiny need all captions at once"):
        script.main([*flags, *QUICK, "--noise", "0.4"])


def test_the_example_names_files():
    assert example().expand("a/{008..010}-{1..2}.tar") == [f"a/{i:03}-{j}.tar" for i in (8, 9, 10) for j in (1, 2)]
    assert example().expand("a/*.tar") == ["a/*.tar"]
