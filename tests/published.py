"""Records of runs and selections, and the cards that are made of them: tests/golden has these, byte for byte."""

from hf_mimic.cards import dataset_card, model_card, scores_card
from hf_mimic.run_record import RunRecord
from hf_mimic.selection_record import Counts, SelectionRecord

STUDENT, REFERENCE, DATA = "1" * 40, "2" * 40, "3" * 40
TRAINED = RunRecord(
    kind="training",
    model="google/vit-base-patch16-224-in21k",
    model_revision=STUDENT,
    reference_model="you/vit-trusted",
    reference_revision=REFERENCE,
    base_model="google/vit-base-patch16-224-in21k",
    dataset="you/noisy-images",
    dataset_revision=DATA,
    split="train",
    settings={
        "strategy": "trust",
        "mimic_layers": ["head"],
        "direction": "current",
        "temperature": "auto",
        "head_init": "reference",
        "selection_rate": 1.0,
        "epochs": 3,
        "batch_size": 32,
        "learning_rate": 5e-5,
        "gather_negatives": True,
        "eval_split": "test",
    },
    seeds={"seed": 42, "data_seed": 7},
    health={"score_fit_correlation": 0.41, "score_trust_correlation": 0.63, "unhealthy": 0.0},
    results={"eval_loss": 0.31, "eval_accuracy": 0.9137, "eval_runtime": 12.5, "epoch": 3.0},
    versions={
        "hf_mimic": "0.1.0",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "datasets": "5.2.0",
        "python": "3.13.1",
    },
    command="hf-mimic train --model google/vit-base-patch16-224-in21k --reference_model you/vit-trusted "
    "--dataset you/noisy-images --output_dir out --num_train_epochs 3",
)
QUALITY = {
    "n_samples": 9_900,
    "n_scored": 9_900,
    "retained": 0.7,
    "mean_score": 0.012,
    "noise_rate": 0.312,
    "noise_low": 0.287,
    "noise_high": 0.338,
    "evidence": "trust",
}
_NASTY = [
    "T-shirt/top",
    "a|b *bold* <script>alert(1)</script>",
    "traffic_light",
    "`code`",
    "Größe 雪 🙂",
    "line\nbreak",
]
CLASSES = {
    (_NASTY[i] if i < len(_NASTY) else f"class {i:02d}"): Counts(250, 240 - 5 * i if i != 20 else 40)
    for i in range(40)
}
RICH = SelectionRecord(
    run=TRAINED,
    rule="trust >= 0.412",
    threshold=0.412,
    rows=Counts(10_000, 5_640),
    unscored=100,
    unscored_kept=True,
    reasons={"trust of 0.412 or more": 5_540, "trust below 0.412": 4_360, "no trust": 100},
    classes=CLASSES,
    groups={"country": {"NZ": Counts(6_000, 4_500), "PE": Counts(4_000, 1_140)}},
    quality=QUALITY,
    splits={"train": 5_640, "validation": 1_000, "test": 2_000},
    split="train",
    original_dataset="you/noisy-images",
    original_revision=DATA,
    sample_id_column="sample_id",
    command="hf-mimic push --dataset you/noisy-images --scores out/scores --repo_id you/clean-images",
)
POOR = SelectionRecord(
    run=RunRecord(),
    rule="keep",
    threshold=None,
    rows=Counts(None, 70),
    unscored=0,
    unscored_kept=False,
    reasons={},
    classes={},
    groups={},
    quality=None,
    splits={"train": 70},
    split="train",
    original_dataset=None,
    original_revision=None,
    sample_id_column="sample_id",
    command=None,
)
CONFIGS = [
    {"config_name": "default", "default": True, "data_files": [{"split": "train", "path": "data/train-*"}]},
    {"config_name": "scores", "data_files": [{"split": "train", "path": "scores/train-*"}]},
    {"config_name": "selection", "data_files": [{"split": "train", "path": "selection/train-*"}]},
]
WRITTEN = """---
# by hand
license: cc-by-4.0
language: [en, no]
pretty_name: My images
tags:
- animals
---

# My images

Photographs that I took.

## Consent

All animals agreed.
"""


def rich_dataset_card(existing=WRITTEN):
    figures = {"Scores by class": "figures/scores.png", "Kept and dropped [by | epoch]": "figures/by epoch.png"}
    return dataset_card(
        RICH, repo_id="you/clean-images", metadata={"configs": CONFIGS}, figures=figures, existing=existing
    )


def poor_dataset_card():
    return dataset_card(POOR, repo_id="you/clean", metadata={})


def a_scores_card():
    run = RunRecord(
        kind="scoring",
        model="you/clip",
        reference_model="local folder trusted",
        dataset="you/noisy-images",
        split="train",
        settings={"mimic_layers": ["head", "last_block"], "batch_size": 64},
        health={"score_fit_correlation": -0.2, "unhealthy": 1.0},
    )
    columns = ["sample_id", "epoch", "step", "mimic_score", "loss", "ref_trust", "my_column"]
    return scores_card(
        run,
        repo_id="you/scores",
        metadata={"license": "mit"},
        n_samples=10_000,
        n_visits=30_000,
        columns=columns,
        quality={**QUALITY, "noise_rate": None, "noise_low": None, "noise_high": None, "evidence": "none"},
    )


def model_card_with_reference():
    metadata = {"pipeline_tag": "image-classification", "library_name": "transformers", "license": "apache-2.0"}
    return model_card(TRAINED, model_id="you/vit-clean", metadata=metadata, quality=QUALITY)


def model_card_without_reference():
    run = RunRecord(
        kind="training",
        model="local folder clip",
        dataset="local folder pairs",
        settings={"strategy": "dissect", "selection_rate": 0.5, "epochs": 20},
        results={"rsum": 487.0},
    )
    return model_card(run, model_id="you/clip-dissect")


CARDS = {
    "dataset_card_rich": rich_dataset_card,
    "dataset_card_poor": poor_dataset_card,
    "scores_card": a_scores_card,
    "model_card_with_reference": model_card_with_reference,
    "model_card_without_reference": model_card_without_reference,
}
