"""Fine-tune any Hub ViT on labels that cannot be trusted, and write the curated data set.

    python examples/finetune_vit_noisy.py --model google/vit-base-patch16-224-in21k \
        --reference_model you/vit-trusted --dataset you/noisy-images --output_dir outputs/vit

On several GPUs: `accelerate launch --config_file examples/accelerate/multi_gpu.yaml` in place of `python`.

Without a Hub, `--tiny` makes a small ViT from config, pre-trains it on `--trusted_dataset` and fine-tunes it there a
second time into the reference; on two cores, clothing photographs with 40 % wrong labels take about 5 minutes:

    python examples/finetune_vit_noisy.py --tiny --dataset ../shared/data/clothing/train.parquet \
        --trusted_dataset ../shared/data/clothing/validation.parquet --noise 0.4 --image_size 48 --output_dir outputs/vit
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_mimic import MimicTrainer, MimicTrainingArguments, attach_scores
from hf_mimic.data import add_label_noise, add_sample_ids, load_rows, with_class_labels, with_image_transform
from hf_mimic.filters import default_filter
from hf_mimic.metrics import accuracy, detection


@dataclass
class ScriptArguments:
    dataset: str
    model: str = "google/vit-base-patch16-224-in21k"
    eval_dataset: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    noise: float = 0.0  # share of labels to make wrong, for an experiment
    tiny: bool = False
    trusted_dataset: str | None = None
    image_size: int = 32
    pretrain_epochs: int = 20


def tiny_checkpoints(script: ScriptArguments, args: MimicTrainingArguments, labels: list[str]) -> None:
    """Stand in for the Hub: save a base and a reference fine-tuned from it, both trained on the trusted data set."""
    size = script.image_size
    config = ViTConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256)
    config.update({"image_size": size, "patch_size": size // 8, "id2label": dict(enumerate(labels))})
    config.label2id = {label: i for i, label in enumerate(labels)}
    model, processor = ViTForImageClassification(config), ViTImageProcessorPil(size={"height": size, "width": size})
    rows = with_class_labels(load_rows(script.trusted_dataset), script.label_column)
    rows = with_image_transform(rows, processor, script.image_column, script.label_column)
    for name in ("base", "reference"):
        options = TrainingArguments(
            f"{args.output_dir}/{name}",
            num_train_epochs=script.pretrain_epochs,
            learning_rate=5e-4,
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            use_cpu=args.use_cpu,
        )
        trainer = Trainer(model, options, train_dataset=rows, processing_class=processor)
        trainer.train()
        trainer.save_model()
    script.model, args.reference_model = f"{args.output_dir}/base", f"{args.output_dir}/reference"


def main() -> None:
    script, args = HfArgumentParser([ScriptArguments, MimicTrainingArguments]).parse_args_into_dataclasses()
    dataset = with_class_labels(load_rows(script.dataset), script.label_column)
    if script.noise:
        dataset = add_label_noise(dataset, script.noise, seed=args.seed, column=script.label_column)
    dataset = add_sample_ids(dataset)  # before any shuffle or filter
    labels = dataset.features[script.label_column].names
    if script.tiny:
        tiny_checkpoints(script, args, labels)

    model = AutoModelForImageClassification.from_pretrained(
        script.model,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
    )
    processor = AutoImageProcessor.from_pretrained(script.model)

    def prepare(rows):
        return with_image_transform(rows, processor, script.image_column, script.label_column)

    trainer = MimicTrainer(
        model,
        args,
        train_dataset=prepare(dataset),
        eval_dataset=prepare(load_rows(script.eval_dataset)) if script.eval_dataset else None,
        processing_class=processor,
        compute_metrics=accuracy,
    )
    trainer.train()
    trainer.save_model()
    if script.eval_dataset:
        trainer.log_metrics("eval", trainer.evaluate())
    if not trainer.is_world_process_zero():  # launched on several processes, one writes for all
        return

    keep = default_filter(trainer.scores).fit_predict(trainer.scores)
    scored = attach_scores(dataset, trainer.scores, keep=keep)
    curated = scored.filter(lambda keep: keep, input_columns="keep")
    curated.to_parquet(str(Path(args.output_dir) / "curated.parquet"))
    print(f"kept {len(curated)} of {len(dataset)} rows")
    if script.noise:
        wrong = np.array(scored[script.label_column]) != np.array(scored["clean_label"])
        score = "trust" if "trust" in scored.column_names else "mimic_score"
        print(score, detection(wrong, score=np.array(scored[score], dtype=float), keep=keep))


if __name__ == "__main__":
    main()
