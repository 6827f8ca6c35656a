"""Tables, figure and limits of the study of DISSect, from its results."""

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from dissect_runs import EPOCHS, METHODS, WARMUP

RECALLS = [f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


def grouped(results: list[dict], kind: str) -> dict[tuple, list[dict]]:
    """Return the results of all seeds by data, noise, method, rate and budget."""
    found = defaultdict(list)
    for line in results:
        if line["kind"] == kind:
            key = tuple(line[name] for name in ("data", "noise", "method", "rate", "budget"))
            found[key].append(line["result"])
    return found


def tables(results: list[dict]) -> str:
    """Return everything there is as Markdown."""
    runs = grouped(results, "training")
    parts = []
    for data, noise in sorted({key[:2] for key in runs}):
        parts.append(f"{data}, {noise:.0%} of the captions shuffled: RSum (mean ± deviation over seeds), compute")
        parts.append(_rsum_table({key[2:]: found for key, found in runs.items() if key[:2] == (data, noise)}))
    parts.append(_recall_table(runs))
    parts.append(_clean_table(runs))
    scored = grouped(results, "scores")
    if scored:
        parts.append("AUROC of finding shuffled captions (mean over seeds), by the layers that are scored")
        parts.append(_score_table(scored))
    return "\n\n".join(part for part in parts if part)


def _rsum_table(runs: dict[tuple, list[dict]]) -> str:
    columns = sorted({key[1:] for key in runs if key[0] != "full"}, key=lambda c: (c[1] != "steps", c[0]))
    full = next((found for key, found in runs.items() if key[0] == "full"), None)
    unit = mean(r["compute"] for r in full) if full else None
    head = ["method", *(f"r = {rate}, equal {budget}" for rate, budget in columns)]
    rows = []
    for method in METHODS:
        found = [runs.get((method, *column)) for column in columns]
        if method == "full":
            found = [full] * len(columns)
        if any(found):
            rows.append([method, *(_rsum(cell, unit) for cell in found)])
    return table(head, rows)


def _rsum(cell: list[dict] | None, unit: float | None) -> str:
    if not cell:
        return "-"
    values = [r["rsum"] for r in cell]
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    cost = f" ({mean(r['compute'] for r in cell) / unit:.2f})" if unit else ""
    return f"{mean(values):.1f}{spread}{cost}"


def _recall_table(runs: dict[tuple, list[dict]]) -> str:
    here = {key[2:]: found for key, found in runs.items() if key[:2] == ("icons", 0.4)}
    chosen = {key[0]: found for key, found in here.items() if key[1:] == (0.5, "steps") or key[0] == "full"}
    rows = [
        [m, *(f"{100 * mean(r[n] for r in chosen[m]):.1f}" for n in RECALLS)]
        for m in METHODS
        if m in chosen and RECALLS[0] in chosen[m][0]
    ]
    names = [f"{'I->T' if 'image_to' in name else 'T->I'} R@{name.split('@')[1]}" for name in RECALLS]
    return (
        "icons, 40 % shuffled, r = .5, equal steps: recalls in per cent\n\n" + table(["method", *names], rows)
        if rows
        else ""
    )


def _clean_table(runs: dict[tuple, list[dict]]) -> str:
    rows = []
    for method in METHODS:
        cells = [runs.get(("icons", 0.4, method, rate, "steps")) for rate in (0.3, 0.5, 0.7)]
        if any(cells) and method != "full":
            rows.append([method, *("-" if not c else f"{clean_after(c):.3f}" for c in cells)])
    title = f"icons, 40 % shuffled (chance .600): share of right pairs among those trained on, after {WARMUP} epochs"
    return f"{title}\n\n" + table(["method", "r = 0.3", "r = 0.5", "r = 0.7"], rows) if rows else ""


def clean_after(cell: list[dict]) -> float:
    """Return the share of right pairs after the warm-up, mean over epochs and seeds."""
    return mean(mean(r["clean"][WARMUP:]) for r in cell)


def _score_table(scored: dict[tuple, list[dict]]) -> str:
    names = list(next(iter(scored.values()))[0])
    rows = [[key[2], *(f"{mean(r[n] for r in found):.3f}" for n in names)] for key, found in scored.items()]
    return table(["layers", *names], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def limits(results: list[dict]) -> list[str]:
    """Return what should hold at 40 % noise and r = .5, and does not."""
    runs = grouped(results, "training")

    def of(method: str) -> list[dict] | None:
        return runs.get(("icons", 0.4, method, 1.0 if method == "full" else 0.5, "steps"))

    ours, random, full = of("DISSect warm-up"), of("random"), of("full")
    broken = []
    if ours and random and full:
        rsum = [mean(r["rsum"] for r in cell) for cell in (ours, random, full)]
        if rsum[0] < 1.02 * rsum[1]:
            broken.append(f"DISSect's RSum must be 2 % above random's, got {rsum[0]:.1f} and {rsum[1]:.1f}")
        if rsum[0] < rsum[2]:
            broken.append(f"DISSect's RSum must be full training's at least, got {rsum[0]:.1f} and {rsum[2]:.1f}")
        if clean_after(ours) < 0.65:
            broken.append(f"the share of right pairs must be .65 after the warm-up, got {clean_after(ours):.3f}")
    return broken


def figure(results: list[dict], path: Path) -> None:
    """Draw the share of right pairs by epoch, 40 % shuffled, r = .5."""
    import matplotlib.pyplot as plt

    runs = grouped(results, "training")
    chart, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for method in METHODS:
        cell = runs.get(("icons", 0.4, method, 0.5, "steps"))
        if cell:
            curve = [mean(values) for values in zip(*(r["clean"] for r in cell), strict=True)]
            style = "-" if method.startswith("DISSect") else "--" if "(reference)" in method else ":"
            axes.plot(range(1, len(curve) + 1), curve, style, label=method)
    axes.axvline(WARMUP + 0.5, color="grey", linewidth=0.5)
    axes.set(xlabel="epoch", ylabel="right pairs among those trained on", xlim=(1, EPOCHS))
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    chart.savefig(path)
    plt.close(chart)
