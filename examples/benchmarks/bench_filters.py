"""What filters find, what quality says, how fast: wrong labels by method, noise estimates, subsets, ten million rows.

    python examples/benchmarks/bench_filters.py [--seeds 3] [--quick]     # resumable; results are cached
    python examples/benchmarks/bench_filters.py --tables                  # of what is there
    python examples/benchmarks/bench_filters.py --rows 10000000           # time and memory; see filters_scale.py
    python examples/benchmarks/bench_filters.py --two_means               # the exact cut against KMeans

Needs `pip install 'hf-mimic[bench]'` and the data sets of HF_MIMIC_DATA. Every result is a line of
`<output_dir>/results.jsonl`. Exit status 1: a limit does not hold.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import filters_scale
import torch
from filters_runs import DETECTED, LEVELS, SHARES, clean_run, detectors, judged, members, subset
from filters_tables import limits, tables, two_means_times
from tqdm.auto import tqdm
from turns import quiet

SUBSETS = ("cifar-worse", "fashion-sym-0.4")


def tasks(seeds: int, quick: bool) -> list[tuple]:
    """Return what is to be run: kind, arguments."""
    found: list[tuple] = []
    for seed in range(seeds):
        found += [("detectors", name, seed) for name in (DETECTED[2:4] if quick else DETECTED)]
        found += [("judged", kind, seed, level) for kind in ("fashion", "cifar") for level in LEVELS]
        found += [("judged", "cifar", seed, name) for name in ("aggre", "random1", "worse")]
        found += [(what, kind, seed) for what in ("clean_run", "members") for kind in ("fashion", "cifar")]
        found += [] if quick else [("subset", name, seed, share) for name in SUBSETS for share in SHARES]
    return found


def run(task: tuple, data: str, cache: str) -> dict:
    """Run one task in a process of its own."""
    quiet()
    kind, *given = task
    how = {"detectors": detectors, "judged": judged, "clean_run": clean_run, "members": members, "subset": subset}
    return {"task": list(task), "result": how[kind](*given, Path(data), Path(cache))}


def run_all(todo: list[tuple], workers: int, path: Path) -> None:
    """Run what is left on some processes; first what trains the models that the others share."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    data, cache = os.environ.get("HF_MIMIC_DATA", "../shared/data"), str(path.parent / "cache")
    context = torch.multiprocessing.get_context("spawn")
    waves = [[t for t in todo if t[0] == "judged" and t[3] == 0.0], [t for t in todo if t[0] == "detectors"], todo]
    done: set[tuple] = set()
    with ProcessPoolExecutor(workers, mp_context=context) as pool, path.open("a") as file:
        for wave in waves:
            futures = [pool.submit(run, task, data, cache) for task in wave if task not in done]
            for future in tqdm(as_completed(futures), total=len(futures), desc="filters", unit="run"):
                file.write(json.dumps(future.result()) + "\n")
                file.flush()
            done |= set(wave)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two settings, no subsets")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/filters"))
    parser.add_argument("--tables", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--two_means", action="store_true", help="the exact cut against KMeans(n_init=10)")
    parser.add_argument("--rows", type=int, help="time and memory for so many samples; other flags: filters_scale.py")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args, others = parser.parse_known_args()
    if args.rows is not None:
        extra = [] if args.json is None else ["--json", str(args.json)]
        sys.argv = [sys.argv[0], "--rows", str(args.rows), *extra, *others]
        return filters_scale.main()
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if args.two_means:
        text, broken = two_means_times()
        print(text)
        return int(broken)
    path = args.output_dir / "results.jsonl"
    (path.parent / "cache").mkdir(parents=True, exist_ok=True)
    done = (
        {tuple(line["task"]): line["result"] for line in map(json.loads, path.read_text().splitlines())}
        if path.is_file()
        else {}
    )
    if not args.tables:
        run_all([task for task in tasks(args.seeds, args.quick) if task not in done], args.workers, path)
        done = {tuple(line["task"]): line["result"] for line in map(json.loads, path.read_text().splitlines())}
    print(f"{len(done)} results, torch {torch.__version__}, {os.cpu_count()} cores\n")
    print(tables(done))
    broken = limits(done)
    print("\n".join(broken) if broken else "every limit holds")
    if args.json:
        args.json.write_text(json.dumps([{"task": list(task), "result": result} for task, result in done.items()]))
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
