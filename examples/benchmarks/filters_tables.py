"""Tables and limits of the benchmark of filters; the exact two-means cut against KMeans."""

import time
from collections import defaultdict
from statistics import mean, median, stdev

import numpy as np
from dissect_tables import table
from filters_runs import DETECTED, LEVELS, SHARES
from sklearn.cluster import KMeans

from hf_mimic.two_groups import two_means

Results = dict[tuple, dict]


def tables(done: Results) -> str:
    """Return all tables of what is there, as Markdown."""
    parts = [_detected(done), _quality(done), _clean(done), _members(done), _subsets(done)]
    return "\n\n".join(part for part in parts if part) + "\n"


def by_seed(done: Results, kind: str) -> dict[tuple, list[dict]]:
    """Return the results of a kind, over seeds: what else names a task to them."""
    found: dict[tuple, list[dict]] = defaultdict(list)
    for task, result in sorted(done.items(), key=str):
        if task[0] == kind:
            found[(task[1], *task[3:])].append(result)
    return found


def spread(values: list[float], digits: int = 1) -> str:
    """Return mean and deviation as text."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _detected(done: Results) -> str:
    runs = {key[0]: found for key, found in by_seed(done, "detectors").items()}
    names = [name for name in DETECTED if name in runs]
    if not names:
        return ""
    rows = [[method, *(spread([r[method] for r in runs[name]]) for name in names)] for method in runs[names[0]][0]]
    return f"F1 of finding wrong labels, in per cent, {len(runs[names[0]])} seeds\n\n" + table(
        ["method", *names], rows
    )


def _quality(done: Results) -> str:
    runs = by_seed(done, "judged")
    if not runs:
        return ""
    rows = []
    for (kind, level), found in runs.items():
        known = [r for r in found if "rate" in r]
        covered = sum(r["low"] <= r["noise"] <= r["high"] for r in known)
        cells = [spread([r[name] for r in known], 3) if known else "-" for name in ("noise", "rate")]
        ends = [f"{mean(r[name] for r in known):.3f}" if known else "-" for name in ("low", "high")]
        rows.append(
            [
                f"{kind} {level}",
                *cells,
                " to ".join(ends),
                f"{covered} of {len(found)}",
                spread([r["argmax kept"] for r in known], 3),
            ]
        )
    head = ["data", "noise", "estimate", "interval", "covers", "argmax keeps"]
    told = ", ".join(f"{kind} {r:.4f}" for kind, r in correlations(done).items())
    return f"Noise by the quality report\n\n{table(head, rows)}\n\nLowest correlation of estimate and noise, 8 levels: {told}. Interval covers {coverage(done):.1%} of these cells."


def correlations(done: Results) -> dict[str, float]:
    """Return for each data set the lowest correlation of estimate and noise over the levels, of the seeds."""
    curves: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    for task, result in done.items():
        if task[0] == "judged" and task[3] in LEVELS and "rate" in result:
            curves[task[1], task[2]].append((result["noise"], result["rate"]))
    found: dict[str, float] = {}
    for (kind, _), points in curves.items():
        if len(points) > 2:
            r = float(np.corrcoef(np.array(points).T)[0, 1])
            found[kind] = min(found.get(kind, 1.0), r)
    return found


def coverage(done: Results) -> float:
    """Return the share of cells (data set, level, seed) whose interval holds the true noise."""
    cells = [r for task, r in done.items() if task[0] == "judged" and task[3] in LEVELS]
    return mean("rate" in r and r["low"] <= r["noise"] <= r["high"] for r in cells)


def _clean(done: Results) -> str:
    runs = {key[0]: found for key, found in by_seed(done, "clean_run").items()}
    if not runs:
        return ""
    names = next(iter(runs.values()))[0]
    rows = [
        [name, *(spread([100 * r[name] for r in found]) for found in runs.values())]
        for name in names
        if name != "rate"
    ]
    return "Share that is kept of a data set without a wrong label, in per cent\n\n" + table(["filter", *runs], rows)


def _members(done: Results) -> str:
    runs = {key[0]: found for key, found in by_seed(done, "members").items()}
    if not runs:
        return ""
    rows = []
    for name in dict.fromkeys(key.split(" | ")[0] for key in next(iter(runs.values()))[0]):
        for kind, found in runs.items():
            cells = [
                spread([r[f"{name} | {what}"] for r in found], 3)
                for what in ("auroc", "null_deviation", "jaccard", "null_jaccard")
            ]
            rows.append([name, kind, *cells])
    head = ["score", "data", "AUROC", "deviation at random", "Jaccard", "at random"]
    return "Was the reference trained on it? Half of the samples are members\n\n" + table(head, rows)


def _subsets(done: Results) -> str:
    runs = by_seed(done, "subset")
    parts = []
    for name in dict.fromkeys(key[0] for key in runs):
        methods = runs[name, SHARES[0]][0] if (name, SHARES[0]) in runs else ()
        rows = [[m, *(spread([r[m] for r in runs[name, s]]) for s in SHARES if (name, s) in runs)] for m in methods]
        parts.append(
            f"{name}: test accuracy after plain training on a share\n\n"
            + table(["chosen by", *map(str, SHARES)], rows)
        )
    return "\n\n".join(parts)


def limits(done: Results) -> list[str]:
    """Return what does not hold, in sentences."""
    broken = []
    for key, found in by_seed(done, "detectors").items():
        scores = {method: mean(r[method] for r in found) for method in found[0]}
        best = max((m for m in scores if m != "ensemble"), key=lambda m: scores[m])
        if scores["ensemble"] < scores[best] - 0.3:
            broken.append(
                f"{key[0]}: the ensemble's F1 is {scores['ensemble']:.1f}, that of {best} {scores[best]:.1f}"
            )
    broken += [
        f"{kind}: estimate and noise correlate by {r:.3f} only" for kind, r in correlations(done).items() if r < 0.97
    ]
    cells = any(task[0] == "judged" for task in done)
    if cells and coverage(done) < 0.85:
        broken.append(f"the interval covers {coverage(done):.1%} of the cells")
    for key, found in by_seed(done, "clean_run").items():
        if (kept := mean(r["ensemble"] for r in found)) < 0.9:
            broken.append(f"{key[0]}: the ensemble keeps {kept:.1%} of a clean data set")
    return broken


def two_means_times(sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000), turns: int = 5) -> tuple[str, bool]:
    """Return a table of the exact cut against `KMeans(n_init=10)`, and whether a limit is broken."""
    rows, broken = [], False
    for size in sizes:
        values = np.random.default_rng(0).gamma(1.0, size=size)
        exact, kmeans = [], []
        for _ in range(turns):
            begin = time.perf_counter()
            cut = two_means(values)
            middle = time.perf_counter()
            found = KMeans(2, n_init=10, random_state=0).fit(values[:, None])
            exact.append(middle - begin)
            kmeans.append(time.perf_counter() - middle)
        groups = values[values < cut], values[values >= cut]
        cost = sum(((group - group.mean()) ** 2).sum() for group in groups)
        ratio, worse = median(kmeans) / median(exact), cost / found.inertia_
        broken |= ratio < 50 or worse > 1 + 1e-9
        rows.append(
            [f"{size:,}", f"{1e3 * median(exact):.2f}", f"{1e3 * median(kmeans):.0f}", f"{ratio:.0f}", f"{worse:.7f}"]
        )
    head = ["values", "exact, ms", "KMeans, ms", "times as fast", "cost over KMeans'"]
    return table(head, rows), broken
