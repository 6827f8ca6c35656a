"""Kill training at random moments, resume it, and compare with a run that nothing happened to.

    python examples/benchmarks/bench_resume.py            # 20 kills of one process, 20 of one of two
    python examples/benchmarks/bench_resume.py --quick    # 3 and 3

A kill is a SIGKILL at a random moment of the run, in the middle of a step, of a checkpoint or of a score shard. Exact
means: the same weights bit for bit, and the same rows in the score table. Exit code 1 if any run is not exact.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from ranks import kill, run_ranks, start_ranks
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

from hf_mimic import MimicTrainer, MimicTrainingArguments, ScoreTable
from hf_mimic.data import add_sample_ids

ROWS, BATCH, EPOCHS, SAVE_STEPS = 250, 16, 3, 2


def train(folder: str, processes: int, resume: bool) -> None:
    """One run: dropout, shuffled rows that do not divide, AdamW, the automatic temperature."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(1 if not resume else 2)  # a resumed run must not depend on the model that it is given
    shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
    model = ViTForImageClassification(
        ViTConfig(**shape, image_size=16, patch_size=4, num_labels=10, hidden_dropout_prob=0.1)
    )
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(ROWS, 3, 16, 16, generator=generator)
    labels = torch.randint(10, (ROWS,), generator=generator)
    rows = add_sample_ids(Dataset.from_dict({"pixel_values": pixels.numpy(), "labels": labels.numpy()}))
    torch.manual_seed(4)
    reference = {name: 0.1 * torch.randn(p.shape) for name, p in model.named_parameters()}
    args = MimicTrainingArguments(
        folder,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        per_device_train_batch_size=BATCH // processes,
        num_train_epochs=EPOCHS,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        mimic_layers=["last_block"],
    )
    trainer = MimicTrainer(model, args, train_dataset=rows.with_format("torch"), reference_model=reference)
    trainer.train(resume_from_checkpoint=resume or None)
    if args.process_index == 0:
        torch.save(trainer.model.state_dict(), Path(folder) / "final.pt")


def outcome(folder: Path) -> tuple[dict, dict]:
    return torch.load(folder / "final.pt"), ScoreTable.load(folder / "scores").to_arrow().to_pydict()


def is_exact(folder: Path, expected: tuple[dict, dict]) -> bool:
    weights, rows = outcome(folder)
    return rows == expected[1] and all(torch.equal(weights[name], value) for name, value in expected[0].items())


def killed_run(folder: Path, processes: int, moment: float, rng: random.Random) -> tuple[int, str]:
    """Start a run, kill it `moment` seconds after its first checkpoint; return from where and after what it can go on."""
    ranks = start_ranks(train, (str(folder), processes, False), processes)
    while not list(folder.glob("checkpoint-*/mimic_state.json")) and all(rank.is_alive() for rank in ranks):
        time.sleep(0.005)
    time.sleep(moment)
    victim = [rng.choice(ranks)]
    kill(victim)
    kill(ranks)  # as a launcher does
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    torn = sum(not (path / "mimic_state.json").is_file() for path in found)
    return int(found[-1 - torn].name.split("-")[1]), "while saving" if torn else ""


def measure(root: Path, processes: int, kills: int, rng: random.Random) -> list[dict]:
    whole, begin = root / f"whole-{processes}", time.monotonic()
    run_ranks(train, (str(whole), processes, False), processes)
    total, expected, results = time.monotonic() - begin, outcome(whole), []
    for number in tqdm(range(kills), desc=f"{processes} process{'es' * (processes > 1)}", unit="kill"):
        folder, moment = root / f"{processes}-{number}", rng.uniform(0, 0.6 * total)
        step, note = killed_run(folder, processes, moment, rng)
        run_ranks(train, (str(folder), processes, True), processes)
        exact = is_exact(folder, expected)
        results.append({"processes": processes, "resumed_from": step, "note": note, "exact": exact})
        shutil.rmtree(folder)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 kills of each kind in place of 20")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng, root, results = random.Random(options.seed), Path(tempfile.mkdtemp()), []
    try:
        for processes in (1, 2):
            results += measure(root, processes, 3 if options.quick else 20, rng)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    steps = EPOCHS * -(-ROWS // BATCH)
    print(f"{steps} steps, {EPOCHS} epochs, a checkpoint every {SAVE_STEPS} steps, torch {torch.__version__}")
    print("processes  kills  exact  while saving  resumed from step")
    for processes in (1, 2):
        found = [r for r in results if r["processes"] == processes]
        saving, places = sum(bool(r["note"]) for r in found), sorted(r["resumed_from"] for r in found)
        exact = sum(r["exact"] for r in found)
        print(f"{processes:9d} {len(found):6d} {exact:6d} {saving:13d}  {' '.join(map(str, places))}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    return 0 if all(r["exact"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
