"""The page of a report: one HTML file that asks the network for nothing and never executes data.

Read `render`. Data stand in a JSON block in which no tag can begin, texts of the template are escaped by jinja2, the
scripts set `textContent` only, and a Content-Security-Policy lets nothing run but the scripts in hf_mimic/report_page.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np
from markupsafe import Markup

from hf_mimic.report_charts import plot, ridges
from hf_mimic.report_numbers import length_curve, per_class, quality_curves
from hf_mimic.report_rows import Rows
from hf_mimic.thumbnails import KIND, Thumbnails

_SCRIPTS = ("data.js", "cut.js", "samples.js")
_MOST_CLASSES = 200
_CAPTION, _CAPTIONS = 300, 5_000_000  # characters of one caption at most, bytes of all of them
_STEPS = 5  # of a heat table
SECTIONS = {
    "cut": "Cut",
    "extremes": "Best and worst",
    "samples": "Samples",
    "classes": "Classes",
    "epochs": "Epochs",
    "confusions": "Neighbours",
    "filters": "Filters",
    "captions": "Captions",
    "quality": "Quality",
    "health": "Health",
}
# What may not stand in a script element, or ends a line of JavaScript.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def safe_json(value: Any) -> str:
    """Return JSON that may stand in a `<script>` element: no character of it can begin a tag.

    Raises:
        ValueError: If a number is not finite.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def render(numbers: Mapping[str, Any], rows: Rows, shown: np.ndarray, pictures: Thumbnails) -> str:
    """Return the page.

    Args:
        numbers: What `build_report` found.
        rows: All rows.
        shown: Those that the page holds.
        pictures: Of some of them.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"num": _num, "share": _share, "format": _formatted, "num2": _num2, "level": _level}
    environment.filters["exact"] = "{:.10g}".format
    style = _asset("page.css")
    script = "\n".join(map(_asset, _SCRIPTS))
    data = page_data(numbers, rows, shown, pictures)
    return environment.from_string(_asset("page.html")).render(
        n=numbers,
        longest_caption=data["longest_caption"],
        style=Markup(style),
        script=Markup(script),
        data=Markup(safe_json(data)),
        policy=_policy(style, script),
        sections=[*SECTIONS.items()],
        pictures=bool(pictures.data or pictures.broken),
        **_classes(numbers, rows, shown),
        **_tables(numbers),
        **_charts(numbers),
    )


def data_uri(picture: bytes) -> str:
    """Return a picture as an address that needs no network."""
    return f"data:image/{KIND};base64,{base64.b64encode(picture).decode()}"


def page_data(numbers: Mapping[str, Any], rows: Rows, shown: np.ndarray, pictures: Thumbnails) -> dict[str, Any]:
    """Return what the scripts work on: the rows in the order of their score, those without one last.

    Args:
        numbers: What `build_report` found.
        rows: All rows.
        shown: Those that the page holds.
        pictures: Of some of them.
    """
    order = shown[np.argsort(rows.score[shown], kind="stable")]
    score = rows.score[order]
    pictured = [(place, pictures.data[row]) for place, row in enumerate(order.tolist()) if row in pictures.data]
    captions, longest = shortened(rows.captions(order)) if "text" in rows.columns_of else (None, None)
    return {
        "score": rows.score_name,
        "cut": numbers["cut"]["value"],
        "classes": rows.classes,
        "scores": _packed(score[np.isfinite(score)], "<f4"),
        "ids": _packed(rows.ids[order], "<i8"),
        "labels": _packed(rows.labels[order], "<i4"),
        "captions": captions,
        "longest_caption": longest,
        "columns": [{"name": name, "values": _packed(v[order], "<f4")} for name, v in rows.columns.items()],
        "kind": KIND,
        "pictured": _packed(np.asarray([place for place, _ in pictured]), "<i4"),
        "pictures": [base64.b64encode(picture).decode() for _, picture in pictured],
        "broken": _packed(np.flatnonzero(np.isin(order, [*pictures.broken])), "<i4"),
    }


def _packed(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()


def shortened(captions: list[str], most: int = _CAPTIONS) -> tuple[list[str], int | None]:
    """Return captions of at most 300 characters, fewer where all of them are too many bytes; and that limit, if it cut.

    Args:
        captions: (N,).
        most: Bytes of all of them.
    """
    limit = _CAPTION
    while sum(len(text[:limit].encode()) for text in captions) > most and limit > 1:
        limit = limit * 3 // 4
    if all(len(text) <= limit for text in captions):
        return captions, None
    return [text if len(text) <= limit else text[: limit - 1] + "…" for text in captions], limit


def _asset(name: str) -> str:
    return resources.files("hf_mimic").joinpath("report_page", name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _policy(style: str, script: str) -> str:
    """Return a Content-Security-Policy: no network; this style and this script, by their hashes, and no other."""
    css, code = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    allowed = f"default-src 'none'; img-src data:; style-src 'sha256-{css}'; script-src 'sha256-{code}'"
    return f"{allowed}; base-uri 'none'; form-action 'none'"


# ---- what the template shows ---------------------------------------------------------------------------------------


def _num(value: float | None) -> str:
    """Return a number as the scripts do."""
    if value is None:
        return "-"
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.4g}"


def _num2(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _formatted(value: float | None, how: str) -> str:
    return {"num": _num, "num2": _num2, "share": _share}[how](value)


def _level(value: float | None, low: float, high: float) -> int:
    if value is None:
        return 0
    return int(np.clip(round((value - low) / (high - low) * _STEPS), 0, _STEPS))


def _classes(numbers: Mapping[str, Any], rows: Rows, shown: np.ndarray) -> dict[str, Any]:
    cut, score = numbers["cut"]["value"], rows.score[shown]
    trust = rows.columns.get("trust") if rows.score_name != "trust" else None
    here = None if trust is None else trust[shown]
    found = per_class(rows.labels[shown], rows.classes, score, ~(score < cut), here)
    most = sorted(found, key=lambda c: -c["count"])[:_MOST_CLASSES]
    listed = sorted(most, key=lambda c: c["code"])
    return {"shown_classes": listed, "hidden_classes": len(found) - len(listed), "trusted": trust is not None}


def _tables(numbers: Mapping[str, Any]) -> dict[str, Any]:
    epochs = numbers["epochs"]["epochs"] if numbers["epochs"] else []
    pairs, agreement = numbers["confusions"], numbers["agreement"]
    kept = zip(agreement["filters"], agreement["kept"], strict=True) if agreement else ()
    compared = numbers["compare"] or {}
    names = list(dict.fromkeys(name for row in compared.values() for name in row))
    run, least = numbers["health"]["run"], numbers["health"]["least"]
    signals = {name: value for name, value in run.items() if name not in ("steps", "unhealthy")}
    signals |= numbers["health"]["table"]
    matrix = np.asarray((pairs and pairs["matrix"]) or np.zeros((0, 0)), dtype=float)
    there = np.flatnonzero(matrix.sum(1) + matrix.sum(0))
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    return {
        "epoch_rows": [
            [r["epoch"], f"{r['scored']:,}", _num(r["mean"]), _num(r["std"]), _num(r["median"])] for r in epochs
        ],
        "confusion_rows": [[p["given"], p["neighbours"], p["count"], _share(p["share"])] for p in pairs["pairs"]]
        if pairs
        else [],
        "confusion_names": [numbers["class_names"][i] for i in there],
        "confusion_shares": shares[np.ix_(there, there)].tolist(),
        "highest_share": float(shares.max(initial=1e-9)),
        "filter_rows": [[name, f"{row['kept']:,}", _share(row["kept_share"])] for name, row in kept],
        "quality_names": names,
        "quality_rows": [[name, *(_num(row.get(key)) for key in names)] for name, row in compared.items()],
        "health_rows": [[name.replace("_", " "), _num2(v), _num2(least.get(name))] for name, v in signals.items()],
    }


def _charts(numbers: Mapping[str, Any]) -> dict[str, Any]:
    bins = numbers["caption_length"]["bins"] if numbers["caption_length"] else []
    length = length_curve(bins, numbers["score"])
    quality = [plot(**curve) for curve in quality_curves(numbers["compare"] or {})]
    steps = numbers["health"]["run"].get("steps", [])
    health = []
    for name in ("score_trust_correlation", "score_fit_correlation"):
        known = [(row["step"], row[name]) for row in steps if "step" in row and name in row]
        if len(known) > 1:
            x, y = zip(*known, strict=True)
            health.append(plot(x, y, names=("step", name.replace("_", " "))))
    return {
        "ridges": ridges(numbers["epochs"], numbers["by_epoch_of"]) if numbers["epochs"] else "",
        "length_chart": plot(**length) if bins else "",
        "quality_charts": quality,
        "health_charts": health,
    }
