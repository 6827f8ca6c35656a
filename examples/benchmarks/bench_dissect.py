"""Does it pay to choose batches? Contrastive training on drawings with shuffled captions, every strategy, at equal cost.

    python examples/benchmarks/bench_dissect.py --quick          # 40 % shuffled, r = .5, the main methods, one seed
    python examples/benchmarks/bench_dissect.py                  # everything; resumable, results are cached
    python examples/benchmarks/bench_dissect.py --time           # wall clock of an epoch over full training

Needs the data sets of HF_MIMIC_DATA. Every result is a line of `<output_dir>/results.jsonl`; what is there is not run
again. Exit status 1: a limit does not hold.
"""

import argparse
import json
import math
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from dissect_runs import EPOCHS, LAYERS, METHODS, WARMUP, reference_of, scores, train
from dissect_settings import load_pairs
from dissect_tables import figure, limits, tables
from dissect_time import time_table
from tqdm.auto import tqdm
from turns import quiet

MAIN = ("full", "random", "random after warm-up", "DISSect warm-up")
OTHER_NOISE = (*MAIN, "DISSect momentum", "small loss", "CLIPScore", "coreset CLIPScore (reference)")


def tasks(quick: bool, seeds: int) -> list[dict]:
    """Return what is to be run, the most important first."""
    found = []

    def add(methods: tuple, *, noise: float = 0.4, rates: tuple = (0.5,), budget: str = "steps", data: str = "icons"):
        for method in methods:
            for rate in (1.0,) if method == "full" else rates:
                for seed in range(seeds):
                    place = {"kind": "training", "data": data, "noise": noise, "seed": seed, "method": method}
                    epochs = EPOCHS if budget == "steps" else epochs_for(method, rate)
                    found.append({**place, "rate": rate, "budget": budget, "epochs": epochs})

    add(MAIN)
    if quick:
        return found
    every = tuple(METHODS)
    add(every)
    for layers in LAYERS:
        place = {"kind": "scores", "data": "icons", "noise": 0.4, "method": layers, "rate": 1.0, "budget": "steps"}
        found += [{**place, "seed": seed, "epochs": EPOCHS} for seed in range(seeds)]
    add(every, rates=(0.3, 0.7))
    add(OTHER_NOISE, noise=0.0)
    add(OTHER_NOISE, noise=0.2)
    add(tuple(m for m in every if m != "full"), budget="compute")
    add((*MAIN, "small loss", "CLIPScore"), data="icons-shifted")
    add(MAIN, data="emoji")
    unique = {key_of(task): task for task in found}
    return list(unique.values())


def epochs_for(method: str, rate: float) -> int:
    """Return for how many epochs a method may train at the cost of full training: scoring is a third of a step."""
    options, step = METHODS[method], rate
    if options["strategy"] in (
        "small_loss",
        "big_loss",
        "clip_score",
        "mimic",
        "rho_loss",
        "dissect",
        "dissect_mimic",
    ):
        step += 0.1 * (1 - rate) / 3 if options.get("refresh") == "epoch" else 1 / 3
    free = EPOCHS - (1 / 3 if "(reference)" in method else 0)  # the reference's own pass over the data
    warm = WARMUP if options.get("warmup_epochs") and options.get("warmup_data") != "selected" else 0
    if options["strategy"] == "info_batch":  # everything in the first epoch and in the last eighth
        return round(free / (rate + (1 - rate) * 0.19))
    if options["strategy"] == "scan":
        return round(free / max(rate, 0.55))
    return math.floor(warm + (free - warm - (1 / 3 if warm else 0)) / step)


def prepare(name: str, noise: float, seed: int, data: str, cache: str) -> None:
    """Read the data and train the reference in a process of its own, so that no two do the same."""
    quiet()
    study = load_pairs(name, noise, seed, Path(data), Path(cache))
    reference_of(study, name, noise, seed, Path(cache))


def run(task: dict, data: str, cache: str) -> dict:
    """Run one task in a process of its own."""
    return (train if task["kind"] == "training" else scores)(task, Path(data), Path(cache))


def key_of(task: dict) -> str:
    return " | ".join(str(task[n]) for n in ("kind", "data", "noise", "seed", "method", "rate", "budget"))


def run_all(todo: list[dict], workers: int, path: Path, data: str) -> None:
    """Run what is left, on some processes; append each result as soon as it is there."""
    cache = str(path.parent / "cache")
    context = torch.multiprocessing.get_context("spawn")
    places = sorted({(task["data"], task["noise"], task["seed"]) for task in todo})
    with ProcessPoolExecutor(workers, mp_context=context) as pool, path.open("a") as file:
        for name in {place[0] for place in places}:  # the pictures are decoded once
            pool.submit(load_pairs, name, 0.0, 0, Path(data), Path(cache)).result()
        made = [pool.submit(prepare, *place, data, cache) for place in places]
        for future in tqdm(as_completed(made), total=len(made), desc="references", unit="model"):
            future.result()
        futures = [pool.submit(run, task, data, cache) for task in todo]
        for future in tqdm(as_completed(futures), total=len(futures), desc="study", unit="run"):
            file.write(json.dumps(future.result()) + "\n")
            file.flush()


def study(args: argparse.Namespace, data: str) -> tuple[str, list[str], list[dict]]:
    """Return the tables, the limits that do not hold, and the results."""
    path = Path(args.output_dir) / "results.jsonl"
    (path.parent / "cache").mkdir(parents=True, exist_ok=True)
    wanted = tasks(args.quick, 1 if args.quick else args.seeds)
    done = known(path)
    todo = [task for task in wanted if key_of(task) not in done]
    if todo and not args.tables:
        run_all(todo, args.workers, path, data)
    done = known(path)
    results = [done[key_of(task)] for task in wanted if key_of(task) in done]
    figure(results, path.parent / "clean_share.svg")
    seeds = f"{len(results)} of {len(wanted)} runs, up to {args.seeds} seeds"
    return f"{seeds}, {EPOCHS} epochs\n\n{tables(results)}", limits(results), results


def known(path: Path) -> dict[str, dict]:
    if not path.is_file():
        return {}
    return {key_of(line): line for line in map(json.loads, path.read_text().splitlines())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few runs, or fewer rounds")
    parser.add_argument("--time", action="store_true", help="time epochs instead")
    parser.add_argument("--tables", action="store_true", help="run nothing: the tables of what is there")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output_dir", default="outputs/dissect")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    data = os.environ.get("HF_MIMIC_DATA", "../shared/data")
    if not (Path(data) / "icons").is_dir():
        print(f"HF_MIMIC_DATA must be a folder with the data sets icons and emoji, got {data}.", file=sys.stderr)
        return 2
    told, broken, results = time_table(args.quick, Path(data)) if args.time else study(args, data)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {told}\n")
    print("\n".join(broken) if broken else "every limit holds")
    if args.json:
        machine = {"torch": torch.__version__, "processor": platform.machine(), "cores": os.cpu_count()}
        args.json.write_text(json.dumps({"machine": machine, "broken": broken, "results": results}, indent=1))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
