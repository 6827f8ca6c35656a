"""What the card of a curated data set says of its selection: who was kept, what that risks, how to redo and undo it.

Read `selection_words`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_mimic.card_run import load_line, source_of_mistakes
from hf_mimic.card_words import (
    UNKNOWN,
    code,
    escape,
    fenced,
    named,
    number,
    percent,
    python,
    repo_link,
    shell,
    table,
    value,
)
from hf_mimic.run_record import RunRecord, hub_id
from hf_mimic.selection_record import Counts, SelectionRecord

_MOST_CLASSES, _ENDS = 30, 15  # above, the least and the most kept ones are shown
_IMPORT = ("from datasets import load_dataset", "")
CONFIGS = ("scores", "selection")


def selection_words(record: SelectionRecord, repo_id: str, configs: Any, *, config: str) -> dict[str, Any]:
    """Return what the template says of a selection, as Markdown.

    Args:
        record: What was kept, and why.
        repo_id: Where it is published.
        configs: Of the metadata; None where they are not known.
        config: That of the rows.
    """
    rows = record.rows
    original = record.original_dataset
    source = "" if original is None else repo_link(original, record.original_revision, kind="dataset")
    threshold = record.threshold
    return {
        "source": source,
        "kept_words": f"of its split {code(record.split)}, {_kept(rows)}",
        "rule": code(record.rule),
        "threshold": f"{value(threshold)}{' (one for each epoch)' if isinstance(threshold, list) else ''}"
        if threshold is not None
        else "",
        "split": code(record.split),
        "rows_words": _rows_words(rows),
        "unscored_words": _unscored(record),
        "reasons": _reasons(record),
        "classes": counts_table("class", record.classes) if record.classes else "",
        "classes_words": _shown("class", "classes", record.classes) or "In the order of the labels.",
        "groups": [
            (escape(column), _group_words(values), counts_table(column, values))
            for column, values in record.groups.items()
        ],
        "splits_words": _splits_words(record, _earlier(record, configs, config)),
        "splits": table(
            ("split", "rows", "filtered"),
            [(escape(n), number(k), "yes" if n == record.split else "no") for n, k in record.splits.items()],
            align="lrl",
        ),
        "usage": fenced("\n".join(_usage(repo_id, configs, config)), "python"),
        "reproduce": _reproduce(record, repo_id, configs),
        "undo": _undo(record, repo_id, configs),
        "limits": "\n\n".join(_limits(record)),
    }


def _reasons(record: SelectionRecord) -> str:
    total = record.rows.before
    rows = [
        (escape(reason), number(n), *([percent(n / total)] if total else [])) for reason, n in record.reasons.items()
    ]
    head = ("reason", "samples", *(["share"] if total else []))
    return table(head, rows, align="lrr") if rows else ""


def counts_table(name: str, counts: Mapping[str, Counts]) -> str:
    """Return the table of some classes: all in their order, or of many the least and the most kept."""
    shown = list(counts.items())
    if len(shown) > _MOST_CLASSES:
        ranked = ranked_by_share(counts)
        shown = [*ranked[:_ENDS], *ranked[-_ENDS:]]
    rows = [
        (escape(n), UNKNOWN if c.before is None else number(c.before), number(c.after), percent(c.share))
        for n, c in shown
    ]
    if len(shown) < len(counts):
        rows.insert(_ENDS, ("...", "...", "...", "..."))
    return table((escape(name), "before", "after", "kept"), rows, align="lrrr")


def ranked_by_share(counts: Mapping[str, Counts]) -> list[tuple[str, Counts]]:
    """Return names and counts, the least kept first; those whose share is not known last."""
    return sorted(counts.items(), key=lambda item: (item[1].share is None, item[1].share or 0.0))


def _kept(rows: Counts) -> str:
    if rows.before is None:
        return f"{number(rows.after)} rows were kept"
    return f"{number(rows.after)} of {number(rows.before)} rows ({percent(rows.share)}) were kept"


def _rows_words(rows: Counts) -> str:
    if rows.before is None:
        return f"{number(rows.after)} kept; how many there were is not known"
    dropped = number(rows.before - rows.after)
    return f"{number(rows.before)} before, {number(rows.after)} after ({percent(rows.share)} kept, {dropped} dropped)"


def _unscored(record: SelectionRecord) -> str:
    if not record.unscored:
        return "none"
    fate = "kept: there is no evidence against them" if record.unscored_kept else "dropped"
    return f"{number(record.unscored)}, which were {fate}"


def _shown(one: str, many: str, counts: Mapping[str, Counts]) -> str:
    if len(counts) <= _MOST_CLASSES:
        return ""
    return (
        f"Of {number(len(counts))} {many} these are the {_ENDS} least and the {_ENDS} most kept ones, the least kept "
        f"{one} first; `selection.json` has all."
    )


def _group_words(values: Mapping[str, Counts]) -> str:
    told = _shown("value", "values", values)
    return f". {told.removesuffix('.')}" if told else ""


def _earlier(record: SelectionRecord, configs: Any, config: str) -> list[str]:
    """Return the splits of a config that another publication wrote, by the metadata."""
    return [name for name in _splits(configs, config) if name not in record.splits]


def _splits_words(record: SelectionRecord, earlier: list[str]) -> str:
    others, split = [name for name in record.splits if name != record.split], code(record.split)
    words = f"Only the split {split} is here, and it was filtered."
    if others:
        are = "are as they were" if len(others) > 1 else "is as it was"
        words = f"Only the split {split} was filtered. {named([code(n) for n in others])} {are}."
    elif earlier:
        words = f"Only the split {split} was filtered now."
    if earlier:
        are = "are" if len(earlier) > 1 else "is"
        words += f" {named([code(n) for n in earlier])}, published before, {are} here, too."
    return words


def _split_in(configs: Any, name: str, split: str) -> str:
    """Return the split of a config to load, by its metadata: the one that was filtered, or the first if it is not there."""
    found = _splits(configs, name)
    return split if split in found or not found else found[0]


def _splits(configs: Any, name: str) -> list[str]:
    """Return the splits of a config, by its metadata."""
    listed = next((entry.get("data_files") for entry in configs or [] if entry.get("config_name") == name), None)
    return [str(entry["split"]) for entry in listed or [] if isinstance(entry, Mapping) and entry.get("split")]


def _has(configs: Any, name: str) -> bool:
    return configs is None or any(config.get("config_name") == name for config in configs)


def _usage(repo_id: str, configs: Any, config: str) -> list[str]:
    which = "" if config == "default" else f", {python(config)}"
    lines = ["from datasets import load_dataset", "", f"curated = load_dataset({python(repo_id)}{which})"]
    comments = {"scores": "what the run said of every sample", "selection": "which samples were kept, and why"}
    return lines + [
        f"{name} = load_dataset({python(repo_id)}, {python(name)})  # {comments[name]}"
        for name in CONFIGS
        if _has(configs, name)
    ]


def _reproduce(record: SelectionRecord, repo_id: str, configs: Any) -> str:
    parts = [
        "The scores were made by" if record.run.command else "",
        fenced(shell(record.run.command), "bash") if record.run.command else "",
        "The selection was made by" if record.command else "",
        fenced(shell(record.command), "bash") if record.command else "",
    ]
    missing = [
        what for what, command in (("scores", record.run.command), ("selection", record.command)) if command is None
    ]
    if missing:
        parts.append(
            f"The command that made the {' and the '.join(missing)} is not known; the settings above are all that is."
        )
    pins = _pins(record.run) + _pin("data set", record.original_dataset, record.original_revision)
    if pins:
        parts.append("Take these revisions:\n\n" + "\n".join(f"- {pin}" for pin in dict.fromkeys(pins)))
    loading = _loading(record, repo_id, configs)
    if len(loading) == 2:
        parts.append("The same rows, without any model:")
        parts.append(fenced("\n".join([*_IMPORT, *loading, *_same_rows(record.sample_id_column)]), "python"))
    return "\n\n".join(part for part in parts if part)


def _pins(run: RunRecord) -> list[str]:
    return [
        *_pin("model", run.model, run.model_revision),
        *_pin("reference", run.reference_model, run.reference_revision),
        *_pin("data set", run.dataset, run.dataset_revision),
    ]


def _pin(what: str, name: str | None, revision: str | None) -> list[str]:
    if name is None or hub_id(name) is None:
        return []
    return [f"{what} `{name}`: " + (code(revision) if revision else "revision not known")]


def _undo(record: SelectionRecord, repo_id: str, configs: Any) -> str:
    words = "The original has every row"
    if hub_id(record.original_dataset) is None:
        words = "Where the original is published is not known, so the dropped rows cannot be loaded from here."
    else:
        words += "." if record.original_revision else "; its revision is not known, so it may have changed since."
    lines = [*_IMPORT, *_loading(record, repo_id, configs)]
    if _has(configs, "selection"):
        lines.append('dropped = selection.filter(lambda keep: not keep, input_columns="keep")')
        words += (
            " `selection` has the columns `sample_id`, `keep` and `reason`. The id is that of the column "
            f"{code(record.sample_id_column)}; where the original has no such column, it is the number of the row."
        )
    return f"{words}\n\n{fenced(chr(10).join(lines), 'python')}" if len(lines) > len(_IMPORT) else words


def _loading(record: SelectionRecord, repo_id: str, configs: Any) -> list[str]:
    """Return the lines that load the original and the selection, as far as they are published."""
    original = load_line(record.original_dataset, record.original_config, record.original_revision, record.split)
    lines = [f"original = {original}"] if original else []
    if _has(configs, "selection"):
        split = _split_in(configs, "selection", record.split)
        lines.append(f'selection = load_dataset({python(repo_id)}, "selection", split={python(split)})')
    return lines


def _same_rows(column: str) -> list[str]:
    return [
        'kept = set(selection.filter(lambda keep: keep, input_columns="keep")["sample_id"])',
        f"# without this column first: original = hf_mimic.data.add_sample_ids(original, {python(column)})",
        f"curated = original.filter(lambda sample: sample in kept, input_columns={python(column)})",
    ]


def _limits(record: SelectionRecord) -> list[str]:
    told = []
    for what, counts in [("class", record.classes), *((f"value of {escape(c)}", v) for c, v in record.groups.items())]:
        told += _unequal(what, counts, record.rows)
    unknown = [] if record.classes else ["- Which classes lost most is not known: there are no counts by class."]
    return [
        *[line for line in told if line.startswith(">")],
        "\n".join(
            [
                *[line for line in told if line.startswith("-")],
                *unknown,
                source_of_mistakes(record.run),
                "- Dropped does not mean wrong, and kept does not mean right: rare and hard samples look like mistakes.",
                "- This is for training. A split for evaluation must not be filtered like this: what is hard would be gone, "
                "and results would look too good.",
            ]
        ),
    ]


def _unequal(what: str, counts: Mapping[str, Counts], rows: Counts) -> list[str]:
    """Return a warning, and who is kept least and most."""
    ranked = [(name, c.share) for name, c in ranked_by_share(counts) if c.share is not None]
    if len(ranked) < 2:
        return []
    said = [f"{escape(name)} ({percent(share)})" for name, share in ranked]
    (_, least), (_, most) = ranked[0], ranked[-1]
    if least == most:
        return [f"- Every {what} keeps the same share, {percent(least)}."]
    ratio = f"{most / least:.1f} times the share of the least kept" if least else "while the least kept lost all"
    lines = [f"- Least kept, by {what}: {', '.join(said[:-1][:3])}. Most kept: {said[-1]}, {ratio}."]
    halved = [name for name, (_, share) in zip(said, ranked, strict=True) if share < 0.5]
    if halved and rows.share is not None and rows.share > 0.5:
        lines.append(
            f"> **Warning: these lose more than half of their samples** (by {what}): {named(halved)}. The whole keeps "
            f"{percent(rows.share)}, so a model that is trained on this sees less of them."
        )
    return lines
