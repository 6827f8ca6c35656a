"""Scores of many samples: means, every filter, and the keep column, against one pass of pyarrow over the same Parquet.

    python examples/benchmarks/filters_scale.py [--rows 10000000] [--epochs 5] [--trust] [--images 1000000]
        [--max time=2.0] [--max memory=3.0] [--json out.json]

Shards are as training writes them: one per process and epoch, the rows in the order of the epoch's shuffle. "Ours" opens
the table, aggregates it, fits every filter and writes `sample_id, keep`; "pass" reads every column of every row group once
with pyarrow's threads (`for batch in dataset.to_batches()`). Both take turns in one process; time is the ratio of medians.
Memory is the peak of a process that does ours alone, in GiB, imports included. With --images: `attach_scores` and
`.filter()` on a data set of PNG images, none of which may be decoded.
"""

import argparse
import io
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from hf_mimic import (
    CombinedFilter,
    EnsembleFilter,
    MixtureFilter,
    ScoreTable,
    ThresholdFilter,
    TrustFilter,
    TwoMeansFilter,
    attach_scores,
)

BATCH = 64  # samples per process and step
Filters = Mapping[str, Callable[[ScoreTable], np.ndarray]]
FILTERS: Filters = {
    "ThresholdFilter": lambda table: ThresholdFilter().fit_predict(table),
    "top 30 %": lambda table: ThresholdFilter(top=0.3).fit_predict(table),
    "TwoMeansFilter": lambda table: TwoMeansFilter().fit_predict(table),
    "MixtureFilter": lambda table: MixtureFilter().fit_predict(table),
    "CombinedFilter": lambda table: CombinedFilter("top(mimic_score, 0.8) - bottom(loss, 0.1)").fit_predict(table),
    "EnsembleFilter": lambda table: EnsembleFilter().fit_predict(table),
}
TRUST: Filters = {"TrustFilter": lambda table: TrustFilter().fit_predict(table)}


def write_shards(folder: Path, rows: int, epochs: int, *, ranks: int = 2, trust: bool = False) -> int:
    """Write the scores of `rows` samples, three tenths of which are wrong; return the bytes."""
    generator = np.random.default_rng(0)
    wrong = generator.random(rows) < 0.3
    judged = np.clip(generator.normal(np.where(wrong, 0.3, 0.8), 0.15), 0, 1).astype(np.float32) if trust else None
    steps = -(-rows // (ranks * BATCH))
    folder.mkdir(parents=True)
    for epoch in range(epochs):
        order = generator.permutation(rows)
        for rank in range(ranks):
            ids = np.concatenate([order[i : i + BATCH] for i in range(rank * BATCH, rows, ranks * BATCH)])
            of = epoch * steps + np.arange(len(ids)) // BATCH
            noise = generator.normal(size=(3, len(ids))).astype(np.float32)
            score = np.where(wrong[ids], np.float32(-2), np.float32(2)) + noise[0]
            known = {
                "mimic_score": score,
                "relative_weight": np.exp(score / 4 - 0.3),
                "loss": np.abs(1 - score + noise[1]),
            }
            known |= {} if judged is None else {"ref_trust": judged[ids], "ref_loss": np.abs(noise[2])}
            write_shard(folder / f"steps-{of[0]:08d}-{of[-1]:08d}-rank-{rank:05d}.parquet", ids, epoch, of, known)
    return sum(path.stat().st_size for path in folder.iterdir())


def write_shard(path: Path, ids: np.ndarray, epoch: int, steps: np.ndarray, known: Mapping[str, np.ndarray]) -> None:
    """Write what `ScoreTable.flush` would."""
    from hf_mimic.scores import SCHEMA

    keys = {"sample_id": ids, "epoch": np.full(len(ids), epoch, np.int32), "step": steps}
    columns = [{**keys, **known}.get(name, pa.nulls(len(ids), pa.float32())) for name in SCHEMA.names]
    pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd")


def one_pass(folder: Path) -> float:
    """Return the seconds in which pyarrow reads every column of every row group once."""
    begin = time.perf_counter()
    for batch in pyarrow.dataset.dataset(folder, format="parquet").to_batches():
        del batch
    return time.perf_counter() - begin


def ours(folder: Path, filters: Filters, output: Path) -> dict[str, float]:
    """Aggregate, fit every filter, write what is kept; return the seconds of each."""
    found, begin = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begin
        now = time.perf_counter()
        found[name], begin = now - begin, now

    table = ScoreTable.load(folder)
    samples = table.aggregate()
    lap("aggregate")
    for name, fit in filters.items():
        keep = fit(table)
        lap(name)
    kept = pa.table({"sample_id": samples["sample_id"], "keep": keep})
    encoding = {"sample_id": "DELTA_BINARY_PACKED"}  # sorted ids take a byte or less
    pq.write_table(kept, output, compression="zstd", use_dictionary=False, column_encoding=encoding)
    lap("write")
    return found


def peak() -> float:
    """Return the most memory that this process has held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def in_process(function: Callable, *arguments: Any) -> Any:
    """Return what a function returns in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def alone(folder: Path, trust: bool, output: Path) -> dict[str, float]:
    before = peak()
    found = ours(folder, FILTERS | TRUST if trust else FILTERS, output)
    return {"imports": before, "peak": peak(), "seconds": sum(found.values())}


def by_turns(folder: Path, trust: bool, output: Path, turns: int) -> dict[str, Any]:
    """Return the seconds of passes and of ours, which take turns."""
    filters = FILTERS | TRUST if trust else FILTERS
    found: dict[str, list] = {"pass": [], "ours": [], "parts": []}
    one_pass(folder)  # fills the file cache
    for _ in range(turns):
        found["pass"].append(one_pass(folder))
        found["parts"].append(ours(folder, filters, output))
        found["ours"].append(sum(found["parts"][-1].values()))
    return found


def measure(
    rows: int, epochs: int, *, trust: bool = False, turns: int = 5, folder: Path | None = None
) -> dict[str, Any]:
    """Return the ratio of times, the peak of memory, and what they are made of.

    Args:
        rows: Samples.
        epochs: Visits of each.
        trust: Whether the reference was run, too.
        turns: Of the pass and of ours.
        folder: Where the shards go; they are made once.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary) / f"scores-{rows}-{epochs}{'-trust' * trust}"
        size = sum(p.stat().st_size for p in place.iterdir()) if place.is_dir() else None
        size = size or in_process(_write, place, rows, epochs, trust)
        output = Path(temporary) / "keep.parquet"
        memory = in_process(alone, place, trust, output)
        times = in_process(by_turns, place, trust, output, turns)
        kept = pq.read_table(output)
    parts = {name: median(turn[name] for turn in times["parts"]) for name in times["parts"][0]}
    ratio = median(times["ours"]) / median(times["pass"])
    result = {"rows": rows, "epochs": epochs, "trust": trust, "bytes": size, "time": ratio, "memory": memory["peak"]}
    return {**result, "imports": memory["imports"], "parts": parts, "seconds": times, "kept": sum_kept(kept)}


def sum_kept(table: pa.Table) -> float:
    return float(np.mean(table["keep"].to_numpy()))


def _write(place: Path, rows: int, epochs: int, trust: bool) -> int:
    return write_shards(place, rows, epochs, trust=trust)


def images(rows: int) -> dict[str, float]:
    """Attach scores to images and filter them; return seconds and GiB. Fails if an image is decoded."""
    import datasets
    from PIL import Image

    datasets.disable_progress_bars()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an image was decoded")

    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    data = pa.array([file.getvalue()]).take(pa.array(np.zeros(rows, int)))
    column = pa.StructArray.from_arrays([data, pa.nulls(rows, pa.string())], names=["bytes", "path"])
    ids = np.random.default_rng(0).permutation(rows)
    features = datasets.Features({"image": datasets.Image(), "sample_id": datasets.Value("int64")})
    given = datasets.Dataset(pa.table({"image": column, "sample_id": ids}, schema=features.arrow_schema))
    table = ScoreTable()
    table.record(np.arange(rows), epoch=0, step=0, mimic_score=np.linspace(-1, 1, rows), relative_weight=1.0, loss=1.0)
    keep = np.linspace(-1, 1, rows) > 0
    datasets.Image.decode_example, Image.open = fail, fail
    before, begin = peak(), time.perf_counter()
    scored = attach_scores(given, table, keep=keep)
    middle = time.perf_counter()
    kept = scored.filter(lambda kept: kept, input_columns="keep", batched=True, batch_size=10_000)
    single = time.perf_counter()
    assert len(kept) == keep.sum()
    by_row = scored.filter(lambda score: score > 0, input_columns="mimic_score")
    end = time.perf_counter()
    assert len(by_row) == (np.linspace(-1, 1, rows) > 0).sum()
    seconds = {"attach": middle - begin, "filter": single - middle, "filter row by row": end - single}
    return {**seconds, "before": before, "peak": peak()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--trust", action="store_true", help="the reference was run, too: ref_loss and ref_trust")
    parser.add_argument("--images", type=int, default=0, metavar="ROWS", help="also attach scores to so many images")
    parser.add_argument("--folder", type=Path, help="keeps the shards there for the next time")
    parser.add_argument("--max", action="append", default=[], metavar="NAME=LIMIT", help="time or memory; 1 above it")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    found = measure(options.rows, options.epochs, trust=options.trust, turns=options.turns, folder=options.folder)
    passes, mine = found["seconds"]["pass"], found["seconds"]["ours"]
    print(f"{options.rows:,} samples x {options.epochs} epochs, {found['bytes'] / 2**20:.0f} MiB of Parquet")
    print(f"one pass of pyarrow  {median(passes):6.2f} s  ({min(passes):.2f}-{max(passes):.2f})")
    print(f"ours                 {median(mine):6.2f} s  ({min(mine):.2f}-{max(mine):.2f})")
    for name, seconds in found["parts"].items():
        print(f"  {name:<19}{seconds:6.2f} s")
    print(
        f"time: {found['time']:.2f} of a pass; memory: {found['memory']:.2f} GiB, imports {found['imports']:.2f} GiB"
    )
    if options.images:
        found["images"] = in_process(images, options.images)
        told = ", ".join(
            f"{name} {value:.2f} {'GiB' if name in ('before', 'peak') else 's'}"
            for name, value in found["images"].items()
        )
        print(f"{options.images:,} images: {told}; none was decoded")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    limits = dict(limit.split("=") for limit in options.max)
    return 1 if any(found[name] > float(limit) for name, limit in limits.items()) else 0


if __name__ == "__main__":
    sys.exit(main())
