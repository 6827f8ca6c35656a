"""When does a score mean something, and what should be the default? The study behind hf_mimic's choices.

    python examples/benchmarks/bench_trust.py --quick     # the defaults on one setting of each data set
    python examples/benchmarks/bench_trust.py             # everything; resumable, results are cached

Needs `pip install 'hf-mimic[bench]'` and the data sets of HF_MIMIC_DATA (scikit-learn's digits otherwise). Every result
is a line of `<output_dir>/results.jsonl`; what is there is not run again. Exit status 1: a limit does not hold.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path

import torch
from tqdm.auto import tqdm
from trust_runs import SELECTIONS, TEMPERATURES, TRAININGS, quiet, selection, train, training, trajectory
from trust_settings import CORE, HEADS, SETTINGS, Zoo, accuracy, make_setting
from trust_tables import limits, tables

EVERYWHERE = ("plain", "default", "trust alone", "paper (head, current, tau 1)", "mimic, all layers")
EVERYWHERE += ("mimic, all, reference's head", "ref_loss", "rho_loss", "small_loss")
SHARED = ("plain", "default", "default, all layers", "trust alone", "paper (head, current, tau 1)", "mimic, head")
SHARED += ("mimic, all layers", "rho_loss")
SCORED = [*CORE, "fashion-pair-0.4", "clothing-sym-0.4"]  # along every direction
CHEAP = [name for name in CORE if not name.startswith("cifar")]  # LoRA on the photographs' ResNet takes too long
TRIED = tuple(f"{strategy} {tau}" for strategy in ("default", "mimic, all layers") for tau in TEMPERATURES)


def tasks(quick: bool, seeds: int, settings: list[str]) -> list[dict]:
    """Return what is to be run, seed by seed: kind, setting, regime, head, method."""
    plan: list[tuple[str, list[str], tuple, tuple, tuple]] = [
        ("training", CORE, ("full",), ("independent",), ("plain", "default")),  # the hardest heads
        ("selection", CORE, ("full",), ("independent",), ("argmax",)),
    ]
    if not quick:
        plan = [
            ("training", SETTINGS, ("full",), ("independent",), EVERYWHERE),
            ("selection", SETTINGS, ("full",), ("independent",), SELECTIONS),
            ("training", CORE, ("full",), ("shared",), SHARED),
            ("temperature", CORE, ("full",), ("shared",), TRIED),
            ("training", CORE, ("full",), ("zero",), ("plain", "default", "mimic, head")),
            ("training", CORE, ("full",), ("independent",), tuple(m for m in TRAININGS if m not in EVERYWHERE)),
            ("training", CHEAP, ("lora", "probe"), ("shared", "independent"), ("plain", "default")),
            ("trajectory", SCORED, ("full",), HEADS, ("",)),
            ("trajectory", CHEAP, ("lora", "probe"), ("shared", "independent"), ("",)),
        ]
    found = []
    for seed in range(seeds):
        for kind, names, regimes, heads, methods in plan:
            for name in (name for name in names if name in settings):
                for regime, head in product(regimes, heads):
                    place = {"kind": kind, "setting": name, "seed": seed, "regime": regime, "head": head}
                    found.extend({**place, "method": method} for method in methods)
    return sorted(found, key=lambda task: task["kind"] == "trajectory")  # the slow ones last


def prepare(places: list[tuple], data: str, cache: str, scale: float) -> None:
    """Train the models of some places in a process of its own, so that no two train the same ones."""
    quiet()
    for name, seed, regime, head in places:
        Zoo(make_setting(name, seed, Path(data), Path(cache), scale), regime, head, Path(cache))


def run(task: dict, data: str, cache: str, scale: float) -> dict:
    """Run one task in a process of its own."""
    quiet()
    setting = make_setting(task["setting"], task["seed"], Path(data), Path(cache), scale)
    zoo = Zoo(setting, task["regime"], task["head"], Path(cache))
    task = {**task, "reference accuracy": accuracy(zoo.reference, setting.test)}
    with tempfile.TemporaryDirectory() as folder:
        if task["kind"] == "temperature":
            method, _, tau = task["method"].rpartition(" ")
            options = {**TRAININGS[method], "temperature": tau}
            trainer = train(zoo, Path(folder), **options)
            return {**task, "result": {"accuracy": accuracy(trainer.model, setting.test)}}
        if task["kind"] == "trajectory":
            return {**task, "result": trajectory(zoo, Path(folder))}
        how = training if task["kind"] == "training" else selection
        return {**task, "result": how(zoo, task["method"], Path(folder))}


def key_of(task: dict) -> str:
    return " | ".join(str(task[name]) for name in ("kind", "setting", "seed", "regime", "head", "method"))


def run_all(todo: list[dict], args: argparse.Namespace, path: Path) -> None:
    """Run what is left, on some processes; append each result as soon as it is there."""
    data, cache = os.environ.get("HF_MIMIC_DATA", "../shared/data"), str(path.parent / "cache")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    places: dict = defaultdict(dict)  # by what shares a base
    for task in todo:
        place = tuple(task[name] for name in ("setting", "seed", "regime", "head"))
        places[task["setting"].split("-")[0], task["seed"]][place] = None
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool, path.open("a") as file:
        made = [pool.submit(prepare, list(group), data, cache, args.scale) for group in places.values()]
        for future in tqdm(as_completed(made), total=len(made), desc="models", unit="set"):
            future.result()
        futures = [pool.submit(run, task, data, cache, args.scale) for task in todo]
        for future in tqdm(as_completed(futures), total=len(futures), desc="study", unit="run"):
            file.write(json.dumps(future.result()) + "\n")
            file.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the defaults on one setting of each data set")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="*", default=SETTINGS, choices=SETTINGS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks the parts, for a smoke test")
    parser.add_argument("--output_dir", default="outputs/trust")
    parser.add_argument("--json", help="also write the summary here")
    args = parser.parse_args()
    data = Path(os.environ.get("HF_MIMIC_DATA", "../shared/data"))
    settings = args.settings
    if not (data / "cifar10n").is_dir():
        print(f"HF_MIMIC_DATA must be a folder with the data sets, got {data}: digits only.", file=sys.stderr)
        settings = [name for name in settings if name.startswith("digits")]
    path = Path(args.output_dir) / "results.jsonl"
    (path.parent / "cache").mkdir(parents=True, exist_ok=True)
    wanted = tasks(args.quick, args.seeds, settings)
    done = {key_of(line): line for line in map(json.loads, path.read_text().splitlines())} if path.is_file() else {}
    run_all([task for task in wanted if key_of(task) not in done], args, path)
    done = {key_of(line): line for line in map(json.loads, path.read_text().splitlines())}
    results = [done[key_of(task)] for task in wanted]
    print(f"{len(results)} runs, {args.seeds} seeds, torch {torch.__version__}, {os.cpu_count()} cores\n")
    print(tables(results))
    broken = limits(results)
    print("\n".join(broken) if broken else "every limit holds")
    if args.json:
        machine = {"torch": torch.__version__, "processor": platform.machine(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps({"machine": machine, "broken": broken, "results": results}, indent=1))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
