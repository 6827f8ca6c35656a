"""The flags of the commands: every field is one, described by the docstring of its class."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_mimic.data_arguments import PlaceArguments


@dataclass
class DemoArguments:
    """Score, reweight, record and filter on scikit-learn's digits, without network.

    Args:
        output_dir: Where scores, the curated data set, figures and results.json go.
        seeds: How many seeds to run.
    """

    output_dir: str = "demo_output"
    seeds: int = 3


@dataclass
class ScoreArguments:
    """Score a data set with a frozen model.

    Args:
        reference_model: Hub repo id or folder of the reference.
        reference_revision: Branch, tag or commit of the reference's Hub repo.
        mimic_layers: "head", "last_mlp", "last_block", "all", names, suffixes or regular expressions.
        sample_id_column: Integer id column; added if the data set has none.
        batch_size: Samples per forward pass.
        num_workers: Processes that decode images.
        run_reference: Also run the reference: its loss, and how far it trusts the label. Twice the time.
        output_dir: Where the score shards go. What is there of the same pass is not scored again.
        num_shards: In how many shards the data set is scored, each by a command of its own, into the same output_dir.
        shard: Which of them this is, from 0. The processes of `accelerate launch` split it.
        part_batches: Batches after which scores are written, and from where a killed run goes on; by default 1/256 of all.
        overwrite: Score again what is there already.
    """

    reference_model: str
    reference_revision: str | None = None
    mimic_layers: list[str] = field(default_factory=lambda: ["head"])
    sample_id_column: str = "sample_id"
    batch_size: int = 32
    num_workers: int = 0
    run_reference: bool = True
    output_dir: str = "scores"
    num_shards: int = 1
    shard: int = 0
    part_batches: int | None = None
    overwrite: bool = False


@dataclass
class FilterArguments(PlaceArguments):
    """Write the curated data set: scores as columns, rejected rows left out.

    Args:
        dataset: The data set that was scored: Hub data set, folder or data file.
        scores: Folder with score shards: <output_dir>/scores of a training run, or of `hf-mimic score`; or a Hub data set
            that `hf-mimic push` wrote.
        output: Parquet file to write.
        split: Split of the data set.
        sample_id_column: Integer id column; added, in row order, if the data set has none.
        keep_all: Write every row, with the columns `keep` and `reason`.
    """

    dataset: str
    scores: str
    output: str = "curated.parquet"
    split: str = "train"
    sample_id_column: str = "sample_id"
    keep_all: bool = False


@dataclass
class RuleArguments:
    """What decides which samples are kept.

    Args:
        filter: The rule: trust (where the highest F1 is expected; the default where the reference was run), threshold
            (the papers' 1/b; the default where it was not), two_means, mixture, ensemble (of these two, over epochs,
            and of the trust). The last three keep everything where nothing tells two groups.
        expression: A set of score columns instead, such as "top(clip_score, 0.3) - bottom(mimic_score, 0.2)".
        min_trust: Keep by a probability that the label is right of at least this instead.
        threshold: Keep by a relative weight (uniform = 1) of at least this in most epochs instead.
        min_score: Keep by a mean mimic score of at least this instead; for scores without training.
        top: Keep this share instead, the best by the mean mimic score.
        column: The score that two_means, mixture and top look at: mimic_score, clip_score, loss ...
        more_scores: For --filter ensemble: more folders of scores of the same data set, of other layers or seeds.
        drop_unscored: Leave out rows without a score, such as images that did not decode.
    """

    filter: str | None = None
    expression: str | None = None
    min_trust: float | None = None
    threshold: float | None = None
    min_score: float | None = None
    top: float | None = None
    column: str | None = None
    more_scores: list[str] = field(default_factory=list)
    drop_unscored: bool = False


@dataclass
class PushArguments(PlaceArguments):
    """Where on the Hub the curated data set goes: data, scores, decisions, card and figures, in one commit.

    Args:
        repo_id: "user/name" of the data set on the Hub; made if it is not there.
        scores: Folder with score shards: <output_dir>/scores of a training run, or of `hf-mimic score`.
        dataset: The data set that was scored: Hub data set, folder or data file. Without it only the scores are published,
            for others to join by id with the data set that they have.
        split: Split of the data set; the only one that is filtered and published.
        sample_id_column: Integer id column; added, in row order, if the data set has none.
        label_column: Column with the labels, for the counts by class; by default "label", if there is one.
        group_columns: Columns by whose values the card tells who is dropped, too.
        config_name: Configuration of the repo that the data become; scores and decisions are `scores` and `selection`.
        revision: Branch to write to; made if it is not there.
        create_pr: Open a pull request instead.
        private: Make the repo private; one that is there must be.
        num_proc: Processes that write the data's files.
        commit_message: Of the commit.
    """

    repo_id: str
    scores: str
    dataset: str | None = None
    split: str = "train"
    sample_id_column: str = "sample_id"
    label_column: str | None = None
    group_columns: list[str] = field(default_factory=list)
    config_name: str = "default"
    revision: str | None = None
    create_pr: bool = False
    private: bool = False
    num_proc: int | None = None
    commit_message: str | None = None


@dataclass
class EvaluateArguments(PlaceArguments):
    """An image-text model, and the data set to measure it on.

    Args:
        model: Hub repo id or folder of an image and text model, with its tokenizer and image processor.
        dataset: Hub data set, folder (images, Parquet, save_to_disk) or data file.
        split: Split of the data set; a single data file has only one, and it is taken.
        image_column: Column with the images.
        text_column: Column with the captions: strings, or a list of strings for each image. By default "text", which
            may be missing if there is a label_column.
        image_id_column: Rows with the same value here are captions of one image, that of the first of them; by default
            every row has an image of its own.
        label_column: Column with class names (ClassLabel or strings): also measure zero shot classification.
        templates: Sentences that describe a class, with {} in place of its name.
        batch_size: Images, and texts, per forward pass.
        num_workers: Processes that decode images.
        on_error: What to do with an image that does not decode: "raise" names its row, "skip" drops and counts it.
        output: JSON file to write the results to.
    """

    model: str
    dataset: str
    split: str = "test"
    image_column: str = "image"
    text_column: str | None = None
    image_id_column: str | None = None
    label_column: str | None = None
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    batch_size: int = 64
    num_workers: int = 0
    on_error: str = "raise"
    output: str | None = None


@dataclass
class CompareArguments:
    """Rank data sets by the quality of their scores, before training on any of them.

    Args:
        scores: Folders with score shards, one per data set, scored against the same reference.
        names: What to call them, in the same order; by default their folders.
        by: Best first by noise_rate (the estimated share of wrong labels), retained (what the filter keeps) or mean_score
            (the mean mimic score; then all must be scored by the same model, too).
        level: Of the noise rate's interval.
        output: JSON file to write as well; `hf-mimic report --compare` draws it.
    """

    scores: list[str]
    names: list[str] = field(default_factory=list)
    by: str = "noise_rate"
    level: float = 0.95
    output: str | None = None


@dataclass
class ReportArguments(PlaceArguments):
    """What a report is about, and where it goes.

    Args:
        scores: Folder with score shards: <output_dir>/scores of a training run, or of `hf-mimic score`; without it the data
            set must have score columns, such as `hf-mimic filter --keep_all` writes.
        dataset: The data set that was scored: Hub data set, folder or data file; without it there are no images.
        split: Split of the data set.
        output_dir: Where report.html, report.json and figures/ go.
        title: Of the page.
        score: Column that is cut; by default the first that there is of trust, mimic_score, relative_weight, clip_score.
        cut: Where the slider starts.
        image_column: Column with the images; by default "image", if there is one.
        label_column: Column with the labels; by default "label", if there is one.
        text_column: Column with captions; by default "text", if there is one.
        sample_id_column: Integer id column; if there is none, row numbers are the ids.
        keep_column: Column with the decisions of a filter of yours, to compare with ours; by default "keep", if there is
            one.
        features: .npy file (N, D), one row per row of the data set, to find neighbours by.
        compare: JSON file: name of a data set to its quality, {"name": {"noise_rate": 0.1, ...}, ...}.
        health: Checkpoint folder, mimic_state.json or trainer_state.json of the run; by default the last checkpoint beside
            the scores.
        max_rows: Of how many rows the page holds the numbers.
        max_images: How many images are shown.
        seed: Of the samples.
        space: Also write the README.md of a static Space.
    """

    scores: str | None = None
    dataset: str | None = None
    split: str = "train"
    output_dir: str = "report"
    title: str | None = None
    score: str | None = None
    cut: float | None = None
    image_column: str | None = None
    label_column: str | None = None
    text_column: str | None = None
    sample_id_column: str = "sample_id"
    keep_column: str | None = None
    features: str | None = None
    compare: str | None = None
    health: str | None = None
    max_rows: int = 25_000
    max_images: int = 2_000
    seed: int = 0
    space: bool = False


@dataclass
class RunArguments:
    """Which recipe, and which of its steps.

    Args:
        config: YAML file with the recipe: keys that the steps share, and a section of flags for each of train (or score),
            filter, report, push, retrain, evaluate; see examples/recipe.yaml.
        from_step: Also --from: do this step and those after it again, though they are done.
        overwrite: Do every step again.
    """

    config: str
    from_step: str | None = field(default=None, metadata={"aliases": ["--from"]})
    overwrite: bool = False
