"""Tables and limits of the study of trust: means over seeds, worst settings, health on data sets left out.

Read `tables` and `limits`.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from sklearn.metrics import roc_auc_score

from hf_mimic.health import LEAST_FIT_CORRELATION, LEAST_TRUST_CORRELATION

HEALTHY, INVERTED = 0.7, 0.5  # AUROC of the score: at least, below
# Per sample, in forward passes of the model: 1 forward, 2 backward; a scored head adds next to nothing, all layers 2.
COSTS = {
    "plain": "3E",
    "default": "3E + 1",
    "default, all layers": "5E + 1",
    "trust alone": "3E + 1",
    "default, reference's head": "3E + 1",
    "paper (head, current, tau 1)": "3E",
    "mimic, head": "3E",
    "mimic, all layers": "5E",
    "mimic, all, reference's head": "5E",
    "mimic, head, task vector": "3E",
    "ref_loss": "3E + 1",
    "rho_loss": "3E + 1",
    "small_loss": "3E",
    "random": "3E",
    "argmax": "3E + 1",
    "cleanlab, reference": "3E + 1",
    "cleanlab, cross-validated": "9E + 1",
    "trust filter": "3E + 1",
}
Place = tuple[str, str, str]  # setting, regime, head


def _mean(results: list[dict], kind: str) -> dict[tuple[Place, str], dict[str, tuple[float, float]]]:
    """Return (place, method) -> figure -> (mean, standard deviation over seeds)."""
    found: dict = defaultdict(lambda: defaultdict(list))
    for line in results:
        if line["kind"] == kind:
            place = line["setting"], line["regime"], line["head"]
            for name, value in line["result"].items():
                found[place, line["method"]][name].append(value)
    return {
        key: {name: (float(np.mean(values)), float(np.std(values))) for name, values in figures.items()}
        for key, figures in found.items()
    }


def _cell(figures: dict | None, name: str, spread: bool = False) -> str:
    if not figures or name not in figures:
        return "-"
    mean, std = figures[name]
    text = f"{mean:.3f}".removeprefix("0") if mean >= 0 else f"{mean:.3f}"
    return f"{text} ±{std:.3f}".replace("±0", "±") if spread else text


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in ([head] if not rows else [head, ["---"] * len(head), *rows])]
    return "\n".join(lines)


def _references(results: list[dict]) -> dict[Place, tuple[float, float]]:
    found = defaultdict(list)
    for line in results:
        if "reference accuracy" in line:
            found[line["setting"], line["regime"], line["head"]].append(line["reference accuracy"])
    return {place: (float(np.mean(v)), float(np.std(v))) for place, v in found.items()}


def default_table(results: list[dict]) -> str:
    """The default beside plain training and what a line of code could do, by setting."""
    trained, chosen, references = _mean(results, "training"), _mean(results, "selection"), _references(results)
    rows = []
    for place in sorted({place for place, method in trained if method == "default"}):
        default, plain = trained[place, "default"], trained.get((place, "plain"))
        argmax, ours, others = (
            chosen.get((place, m)) for m in ("argmax", "cleanlab, reference", "cleanlab, cross-validated")
        )
        reference = {"a": references[place]} if place in references else None
        rows.append(
            [*place, _cell(reference, "a"), _cell(plain, "accuracy", True), _cell(default, "accuracy", True)]
            + [_cell(argmax, "accuracy")]
            + [_cell(default, f"{name} auroc") for name in ("trust", "mimic_score", "ref_loss", "loss")]
            + [_cell(default, "trust filter f1")]
            + [_cell(figures, "filter f1") for figures in (argmax, ours, others)]
        )
    names = (
        "setting, tuning, head, reference, plain, default, argmax filter, AUROC trust, mimic score, reference's loss, "
    )
    names += "own loss, F1 trust filter, argmax, cleanlab (reference), cleanlab (cross-validated)"
    return _table(names.split(", "), rows)


def method_table(results: list[dict], head: str) -> str:
    """Accuracy over plain training by method: mean and worst over the settings."""
    means = {**_mean(results, "training"), **_mean(results, "selection")}
    rows = []
    for method in COSTS:
        gains, aurocs, f1s = {}, [], []
        for (place, name), figures in means.items():
            plain = means.get((place, "plain"))
            if name != method or place[1:] != ("full", head) or plain is None:
                continue
            gains[place[0]] = 100 * (figures["accuracy"][0] - plain["accuracy"][0])
            own = "trust auroc" if "trust auroc" in figures else "mimic_score auroc"
            aurocs += [figures[own][0]] if own in figures else []
            names = ("trust filter f1", "threshold filter f1", "filter f1")
            f1s += [figures[n][0] for n in names if n in figures][:1]
        if gains:
            worst, best = min(gains, key=gains.__getitem__), max(gains, key=gains.__getitem__)
            rows.append(
                [method, COSTS[method], f"{np.mean(list(gains.values())):+.1f}", f"{gains[worst]:+.1f} ({worst})"]
                + [f"{gains[best]:+.1f} ({best})"]
                + [
                    "/".join(f"{f(v):.3f}".removeprefix("0") for f in (np.mean, np.min)) if v else "-"
                    for v in (aurocs, f1s)
                ]
            )
    return _table(["method", "cost", "points over plain", "worst", "best", "AUROC mean/least", "F1 mean/least"], rows)


def direction_table(results: list[dict]) -> str:
    """AUROC of the mimic score by what is trained, head, layers and direction; mean and least over the settings."""
    found: dict = defaultdict(list)
    for name, regime, head, way, figures in _ways(results):
        if "mimic_score auroc" in figures:
            found[regime, head, way].append((name, figures["mimic_score auroc"]))
    rows = []
    for regime, head in dict.fromkeys((regime, head) for regime, head, _ in found):
        for way in dict.fromkeys(way for r, h, way in found if (r, h) == (regime, head)):
            by_setting = defaultdict(list)
            for name, value in found[regime, head, way]:
                by_setting[name].append(value)
            means = {name: float(np.mean(values)) for name, values in by_setting.items()}
            worst = min(means, key=means.__getitem__)
            rows.append(
                [regime, head, *way.split(), f"{np.mean(list(means.values())):.3f}", f"{means[worst]:.3f} ({worst})"]
            )
    return _table(["tuning", "head", "layers", "direction", "AUROC mean", "least"], rows)


def _ways(results: list[dict]):
    for line in results:
        if line["kind"] == "trajectory":
            for way, figures in line["result"].items():
                if way != "models":
                    yield line["setting"], line["regime"], line["head"], way, figures


def temperature_table(results: list[dict]) -> str:
    means = _mean(results, "temperature")
    taus = list(dict.fromkeys(method.rpartition(" ")[2] for _, method in means))
    rows = []
    for strategy in dict.fromkeys(method.rpartition(" ")[0] for _, method in means):
        for place in dict.fromkeys(place for place, _ in means):
            cells = [means.get((place, f"{strategy} {tau}")) for tau in taus]
            rows.append([strategy, place[0], *(_cell(cell, "accuracy", True) for cell in cells)])
    return _table(["strategy", "setting", *(f"tau {tau}" for tau in taus)], rows)


# ---- health --------------------------------------------------------------------------------------------------------

# Signal of a run (higher is healthier) and the threshold that hf_mimic uses.
SIGNALS: dict[str, tuple[Callable[[dict], float], float]] = {
    "correlation with the trust": (lambda f: f["score_trust_correlation"], LEAST_TRUST_CORRELATION),
    "correlation with the fit": (lambda f: f["score_fit_correlation"], LEAST_FIT_CORRELATION),
}


def health_runs(results: list[dict], signal: str) -> list[tuple[str, bool, float]]:
    """Return (data set, healthy, signal) of every run that is healthy or inverted and has the signal."""
    figures = [(name, found) for name, _, _, _, found in _ways(results)]
    figures += [(line["setting"], line["result"]) for line in results if line["kind"] == "training"]
    runs = []
    for name, found in figures:
        auroc = found.get("mimic_score auroc", 0.6)
        if auroc >= HEALTHY or auroc < INVERTED:
            with suppress(KeyError):
                runs.append((name.split("-")[0], auroc >= HEALTHY, SIGNALS[signal][0](found)))
    return runs


def health_table(results: list[dict]) -> str:
    """How well each signal tells healthy from inverted runs, on data sets that its threshold was not chosen on."""
    rows = []
    for signal, (_, ours) in SIGNALS.items():
        found = health_runs(results, signal)
        for left_out in (*dict.fromkeys(name for name, _, _ in found), "all"):
            inside = [(healthy, value) for name, healthy, value in found if left_out in (name, "all")]
            cut = best_cut([(healthy, value) for name, healthy, value in found if name != left_out])
            healthy = np.array([flag for flag, _ in inside])
            values = np.array([value for _, value in inside])
            right = [np.mean((values >= c) == healthy) for c in (cut, ours)]
            auroc = separation(inside)
            cells = [signal, left_out, f"{healthy.sum()} / {(~healthy).sum()}"]
            cells += ["-" if auroc is None else f"{auroc:.3f}", f"{cut:+.2f}", *(f"{share:.1%}" for share in right)]
            rows.append(cells)
    names = "signal, left out, healthy / inverted, AUROC, cut from the others, right with it, right with ours"
    return _table(names.split(", "), rows)


def separation(runs: list[tuple[bool, float]]) -> float | None:
    """Return the AUROC of a signal for healthy against inverted runs; None if one kind is missing."""
    flags = [flag for flag, _ in runs]
    return float(roc_auc_score(*zip(*runs, strict=True))) if any(flags) and not all(flags) else None


def best_cut(runs: list[tuple[bool, float]]) -> float:
    """Return the threshold with the highest balanced accuracy."""
    ordered = sorted(runs, key=lambda run: run[1])
    healthy, values = np.array([flag for flag, _ in ordered], bool), np.array([value for _, value in ordered])
    if healthy.all() or not healthy.any():
        return 0.0
    cuts = np.concatenate([values[:1] - 1, (values[1:] + values[:-1]) / 2])
    balanced = [(values >= c)[healthy].mean() + (values < c)[~healthy].mean() for c in cuts]
    return float(cuts[int(np.argmax(balanced))])


# ---- all together --------------------------------------------------------------------------------------------------


def tables(results: list[dict]) -> str:
    """Return every table that the results have something for."""
    parts = ["## The default", default_table(results)]
    for head in ("independent", "shared", "zero"):
        if any(line["head"] == head and line["method"] not in ("", "plain", "default", "argmax") for line in results):
            parts += [f"\n## Methods, full fine-tuning, {head} heads (E epochs)", method_table(results, head)]
    if any(line["kind"] == "trajectory" for line in results):
        parts += ["\n## Directions", direction_table(results), "\n## Health", health_table(results)]
    if any(line["kind"] == "temperature" for line in results):
        parts += ["\n## Temperature", temperature_table(results)]
    return "\n".join(parts)


def limits(results: list[dict]) -> list[str]:
    """Return what does not hold of the promises that the package makes for its default."""
    trained, references, broken = _mean(results, "training"), _references(results), []
    for (place, method), figures in trained.items():
        plain = trained.get((place, "plain"))
        if method != "default" or plain is None:
            continue
        where, accuracy = " ".join(place), plain["accuracy"][0]
        lead = references[place][0] - accuracy
        auroc = figures.get("trust auroc", figures.get("mimic_score auroc"))
        if auroc and auroc[0] < (0.9 if lead >= 0.05 else 0.5):
            broken.append(
                f"{where}: AUROC {auroc[0]:.3f}, the reference is {100 * lead:.1f} points above plain training"
            )
        if figures["accuracy"][0] < accuracy - 0.005:
            broken.append(f"{where}: accuracy {figures['accuracy'][0]:.3f}, plain training {accuracy:.3f}")
    return broken + _filter_limits(results) + _health_limits(results) + _temperature_limits(results)


def _filter_limits(results: list[dict]) -> list[str]:
    """The default filter's F1 against the best one-line filter, mean over each data set's settings."""
    trained, chosen, found = _mean(results, "training"), _mean(results, "selection"), defaultdict(list)
    rivals = ("argmax", "cleanlab, reference", "cleanlab, cross-validated")
    for (place, method), figures in trained.items():
        theirs = [chosen[place, rival]["filter f1"][0] for rival in rivals if (place, rival) in chosen]
        if method == "default" and theirs and "trust filter f1" in figures:
            found[place[0].split("-")[0]].append((figures["trust filter f1"][0], max(theirs)))
    lost = [name for name, pairs in found.items() if np.mean([a - b for a, b in pairs]) < 0]
    return [f"the default filter's F1 loses on {', '.join(lost)}"] if len(lost) > 1 else []


def _health_limits(results: list[dict]) -> list[str]:
    runs, broken = health_runs(results, "correlation with the trust"), []
    for left_out in dict.fromkeys(name for name, _, _ in runs):
        inside = [(healthy, value) for name, healthy, value in runs if name == left_out]
        auroc = separation(inside)
        if auroc is not None and auroc < 0.95:
            broken.append(f"health: AUROC {auroc:.3f} on {left_out}")
    return broken


def _temperature_limits(results: list[dict]) -> list[str]:
    means, broken = _mean(results, "temperature"), []
    for (place, method), figures in means.items():
        strategy, _, tau = method.rpartition(" ")
        if tau == "auto":
            best = max(f["accuracy"][0] for (p, m), f in means.items() if p == place and m.startswith(f"{strategy} "))
            if figures["accuracy"][0] < best - 0.005:
                broken.append(f"{place[0]}, {strategy}: tau auto {figures['accuracy'][0]:.3f}, best {best:.3f}")
    return broken
