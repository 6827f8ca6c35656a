"""Import time over that of the libraries that a user imports anyway: whole processes, in turn, medians.

python examples/benchmarks/bench_import.py --max package=1.15 --max trainer=1.15
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

LIBRARIES = "import torch, transformers, datasets"
CASES = {
    "package": (LIBRARIES, f"{LIBRARIES}, hf_mimic"),
    "trainer": (f"{LIBRARIES}; from transformers import Trainer", f"{LIBRARIES}; from hf_mimic import MimicTrainer"),
}


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json")
    parser.add_argument("--max", action="append", default=[], metavar="NAME=RATIO", help=", ".join(CASES))
    args = parser.parse_args()
    limits = dict(limit.split("=") for limit in args.max)
    unknown = set(limits) - set(CASES)
    if unknown:
        parser.error(f"--max must name one of {', '.join(CASES)}, got {', '.join(sorted(unknown))}")
    results = {}
    for name, (before, after) in CASES.items():
        pairs = [(seconds(before), seconds(after)) for _ in range(args.repeats)]
        ratios = [ours / theirs for theirs, ours in pairs]
        results[name] = {"ratio": statistics.median(ratios), "seconds": statistics.median(p[0] for p in pairs)}
        print(f"{name:<10}{results[name]['ratio']:.3f} x {results[name]['seconds']:.2f} s   ({before})", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2))
    over = [name for name, limit in limits.items() if results[name]["ratio"] > float(limit)]
    for name in over:
        print(f"{name}: {results[name]['ratio']:.3f} is above {limits[name]}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
