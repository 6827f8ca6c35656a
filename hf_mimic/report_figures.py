"""The figures of a report as PNG and SVG, for papers and cards; needs matplotlib (the extra `report`).

The names in brackets are the figures of arXiv 2501.06708 that they follow.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_mimic.report_numbers import length_curve, quality_curves
from hf_mimic.thumbnails import Thumbnails

_KEPT, _DROPPED = "#1d5fbf", "#b4430f"
_MOST_BARS, _GRID = 40, 8


def check_matplotlib() -> None:
    """Raise an `ImportError` that says what to install, if matplotlib is not there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the figures of a report must have matplotlib, got: {error}. Install it: pip install 'hf_mimic[report]'"
        ) from error


def draw_figures(numbers: Mapping[str, Any], pictures: Thumbnails, folder: Path) -> list[Path]:
    """Write a PNG and an SVG of each figure that there are numbers for; return the paths.

    Args:
        numbers: What `build_report` found.
        pictures: Of the best and the worst samples.
        folder: Made if it is not there.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawers: dict[str, tuple[bool, Callable[[Any], None]]] = {
        "score_by_epoch": (bool(numbers["epochs"]), lambda f: _epochs(f, numbers)),  # (3)
        "best_and_worst": (bool(pictures.data), lambda f: _samples(f, numbers, pictures)),  # (1)
        "quality": (bool(quality_curves(numbers["compare"] or {})), lambda f: _quality(f, numbers)),  # (4)
        "caption_length": (bool(numbers["caption_length"]), lambda f: _lengths(f, numbers)),  # (5)
        "classes": (bool(numbers["classes"]), lambda f: _classes(f, numbers)),
        "confusions": (bool((numbers["confusions"] or {}).get("matrix")), lambda f: _confusions(f, numbers)),
        "agreement": (bool(numbers["agreement"]), lambda f: _agreement(f, numbers)),
        "drift": (bool(numbers["drift"]), lambda f: _drift(f, numbers)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    # a name in dollars is no formula, and the same numbers give the same file
    with rc_context({"text.parse_math": False, "svg.hashsalt": "hf_mimic", "font.family": "DejaVu Sans"}):
        for name, (known, draw) in drawers.items():
            if not known:
                continue
            figure = Figure(layout="constrained")
            FigureCanvasAgg(figure)
            draw(figure)
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                path = folder / f"{name}.{kind}"
                figure.savefig(path, dpi=150, metadata=metadata)
                paths.append(path)
    return paths


def plain(text: Any, most: int = 24) -> str:
    """Return a text that a figure can show: on one line, not too long, without what the font has no sign for."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap()
    shown = "".join(c if ord(c) in known or c == " " else "?" for c in " ".join(str(text).split()))
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _epochs(figure: Any, numbers: Mapping[str, Any]) -> None:
    rows, edges = numbers["epochs"]["epochs"], numbers["epochs"]["edges"]
    figure.set_size_inches(6, 1 + 0.7 * len(rows))
    for i, (axes, row) in enumerate(zip(np.ravel(figure.subplots(len(rows), sharex=True)), rows, strict=True)):
        axes.stairs(row["counts"], edges, fill=True, color=_KEPT, alpha=0.6)
        axes.axvline(row["mean"], color=_DROPPED, label="mean" if not i else None)
        axes.set(ylabel=f"epoch {row['epoch']}", yticks=[])
    figure.axes[0].legend(frameon=False)
    figure.axes[-1].set_xlabel(numbers["by_epoch_of"])


def _samples(figure: Any, numbers: Mapping[str, Any], pictures: Thumbnails) -> None:
    from PIL import Image

    figure.set_size_inches(1.3 * _GRID, 3.6)
    places = figure.subplots(2, _GRID, squeeze=False)
    for line, name in zip(places, ("best", "worst"), strict=True):
        shown = [sample for sample in numbers[name] if sample["row"] in pictures.data][:_GRID]
        for i, axes in enumerate(line):
            axes.set(xticks=[], yticks=[])
            if i >= len(shown):
                axes.set_visible(i == 0)
                continue
            sample = shown[i]
            axes.imshow(Image.open(io.BytesIO(pictures.data[sample["row"]])))
            lines = [f"{sample['score']:.3g}", plain(sample["label"] or "", 16), plain(sample["caption"], 16)]
            axes.set_title("\n".join(filter(None, lines)), fontsize=8)
        line[0].set_ylabel(name)


def _lines(axes: Any, curve: Mapping[str, Any]) -> None:
    x, y, band = curve["x"], curve["y"], curve.get("band")
    if curve.get("points") is None:
        order = np.argsort(x)
        axes.plot(np.asarray(x)[order], np.asarray(y)[order], color=_KEPT, marker="o", markersize=3)
        if band is not None:
            axes.fill_between(np.asarray(x)[order], *(np.asarray(end)[order] for end in band), color=_KEPT, alpha=0.2)
    else:
        axes.scatter(x, y, color=_KEPT)
        if band is not None:
            axes.vlines(x, *band, color=_DROPPED)
        for place, name in zip(zip(x, y, strict=True), curve["points"], strict=True):
            axes.annotate(plain(name), place, textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set(xlabel=curve["names"][0], ylabel=curve["names"][1])


def _quality(figure: Any, numbers: Mapping[str, Any]) -> None:
    curves = quality_curves(numbers["compare"])
    figure.set_size_inches(4.5 * len(curves), 3.5)
    for axes, curve in zip(np.ravel(figure.subplots(1, len(curves))), curves, strict=True):
        _lines(axes, curve)


def _lengths(figure: Any, numbers: Mapping[str, Any]) -> None:
    figure.set_size_inches(5.5, 3.5)
    _lines(figure.subplots(), length_curve(numbers["caption_length"]["bins"], numbers["score"]))


def _classes(figure: Any, numbers: Mapping[str, Any]) -> None:
    rows = sorted(numbers["classes"], key=lambda row: -row["count"])[:_MOST_BARS]
    rows = sorted(rows, key=lambda row: row["kept_share"])
    figure.set_size_inches(6, 1 + 0.25 * len(rows))
    axes = figure.subplots()
    axes.barh(range(len(rows)), [row["kept_share"] for row in rows], color=_KEPT)
    axes.set_yticks(range(len(rows)), [plain(row["class"]) for row in rows])
    axes.set(xlim=(0, 1), xlabel=f"share kept at {numbers['score']} >= {numbers['cut']['value']:g}")


def _heat(axes: Any, names: Sequence[Any], matrix: Any, title: str, low: float) -> None:
    values = np.array([[np.nan if cell is None else cell for cell in row] for row in matrix], dtype=float)
    axes.imshow(values, cmap="Blues", vmin=low, vmax=1)
    axes.set_xticks(range(len(names)), [plain(name, 16) for name in names], rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), [plain(name, 16) for name in names], fontsize=8)
    axes.set_title(title, fontsize=9)
    for (i, j), value in np.ndenumerate(values) if len(names) <= 12 else ():
        text = "-" if np.isnan(value) else f"{value:.2f}"
        axes.text(
            j,
            i,
            text,
            ha="center",
            va="center",
            fontsize=7,
            color="white" if value - low > 0.6 * (1 - low) else "black",
        )


def _confusions(figure: Any, numbers: Mapping[str, Any]) -> None:
    matrix = np.asarray(numbers["confusions"]["matrix"], dtype=float)
    there = np.argsort(-matrix.sum(1), kind="stable")[:_MOST_BARS]
    there = np.sort(there[matrix.sum(1)[there] > 0])
    shares = (matrix / np.maximum(matrix.sum(1, keepdims=True), 1))[np.ix_(there, there)]
    figure.set_size_inches(*2 * [3 + 0.3 * len(there)])
    names = [numbers["class_names"][i] for i in there]
    _heat(figure.subplots(), names, shares, "given label (row), kept neighbours (column)", 0)


def _agreement(figure: Any, numbers: Mapping[str, Any]) -> None:
    found = numbers["agreement"]
    figure.set_size_inches(7 + 0.5 * len(found["filters"]), 3 + 0.3 * len(found["filters"]))
    for axes, name, title in zip(
        figure.subplots(1, 2), ("equal", "kappa"), ("share of equal decisions", "Cohen's kappa"), strict=True
    ):
        _heat(axes, found["filters"], found[name], title, 0)


def _drift(figure: Any, numbers: Mapping[str, Any]) -> None:
    found, rows = numbers["drift"], numbers["epochs"]["epochs"]
    figure.set_size_inches(9, 3.8)
    left, right = figure.subplots(1, 2)
    means, spread = (np.array([row[name] for row in rows]) for name in ("mean", "std"))
    _lines(left, {"x": found["epochs"], "y": means, "names": ("epoch", f"mean {numbers['by_epoch_of']}")})
    left.fill_between(found["epochs"], means - spread, means + spread, color=_KEPT, alpha=0.2)
    _heat(right, found["epochs"], found["rank_correlation"], "rank correlation between epochs", -1)
