"""The metadata of a card, the YAML between two lines "---": ours is brought in, a person's stays as it was written.

Read `merge_metadata`. Keys that do not change keep their text to the letter: comments, quotes, the order, and words that
YAML takes for something else (`language: no`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hf_mimic.run_record import hub_id

OURS = ("configs", "dataset_info", "base_model", "datasets")  # replaced; of other keys a person's value stays
SOURCE = "hf_mimic"  # of results in a model-index
_BLOCK = re.compile(
    r"\A\s*---\n(.*?)(?<=\n)---[ \t]*(?:\n|\Z)", re.DOTALL
)  # as the Hub finds it, with line feeds only
_KEY = re.compile(r"""("[^"]*"|'[^']*'|[^\s#\-\[{&*!|>%@`"'][^#]*?)\s*:(\s|$)""")
_REMEDY = "Correct the README.md of the repo, or delete it, and publish again."


def split_card(text: str) -> tuple[str, str]:
    """Return metadata and body of a card with line feeds only; no metadata is ""."""
    found = _BLOCK.match(text)
    return (found[1].strip("\n"), text[found.end() :]) if found else ("", text)


def read_metadata(text: str) -> dict[str, Any]:
    """Return metadata as a dict.

    Raises:
        ValueError: If they are no YAML, or no dict.
    """
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        told = " ".join(str(error).split())
        raise ValueError(f"the metadata of a card must be YAML, got what cannot be read ({told}). {_REMEDY}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"the metadata of a card must be `key: value` lines, got {text[:80]!r}. {_REMEDY}")
    return found


def merge_metadata(existing: str, fresh: str) -> str:
    """Return the metadata of a card with ours brought in, as YAML.

    Args:
        existing: YAML of the card as it is.
        fresh: Ours.
    """
    before, ours = read_metadata(existing), read_metadata(fresh)
    wanted = dict(before)
    for key, value in ours.items():
        if key == "tags":
            wanted[key] = _united(before.get(key), value)
        elif key in OURS or before.get(key) is None:
            wanted[key] = value
    results = _with_results(before.get("model-index"), ours.get("model-index") or [])
    wanted = {key: value for key, value in wanted.items() if key != "model-index" or results}
    if results:
        wanted["model-index"] = results
    return _written(existing, before, wanted)


def repo_ids(*names: str | None) -> list[str]:
    """Return those of some names that are ids of Hub repos, each once."""
    return list(dict.fromkeys(name for name in names if name is not None and hub_id(name)))


def _united(before: Any, ours: Any) -> list[Any]:
    """Return the items of two lists, each once; a single item stands for a list of it."""
    united: list[Any] = []
    for items in (before, ours):
        for item in items if isinstance(items, list) else [items]:
            if item is not None and item not in united:
                united.append(item)
    return united


def _with_results(before: Any, ours: list[dict[str, Any]]) -> Any:
    """Return a model-index in which our results are new and the others as they were."""
    if not (isinstance(before, list) and before and all(isinstance(entry, Mapping) for entry in before)):
        return ours
    kept = [{**entry, "results": [r for r in entry.get("results") or [] if not _is_ours(r)]} for entry in before]
    kept[0]["results"] += [result for entry in ours for result in entry["results"]]
    return [entry for entry in kept if entry["results"]]


def _is_ours(result: Any) -> bool:
    source = result.get("source") if isinstance(result, Mapping) else None
    return isinstance(source, Mapping) and source.get("name") == SOURCE


def _written(text: str, before: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return YAML of what is wanted that differs from a text as little as possible."""
    new = {key: value for key, value in wanted.items() if key not in before or before[key] != value}
    gone = before.keys() - wanted.keys()
    lines: list[str] = []
    for key, block in _blocks(text):
        if key in new or key in gone:
            lines += [line for line in block if line.lstrip().startswith("#")]
            lines += _dumped({key: new.pop(key)} if key in new else {})
        else:
            lines += block
    lines += _dumped(new)
    joined = "\n".join(lines).strip("\n")
    try:
        return joined if read_metadata(joined) == dict(wanted) else "\n".join(_dumped(wanted))
    except ValueError:  # written in a way that cannot be cut into lines, such as {license: mit}
        return "\n".join(_dumped(wanted))


def _blocks(text: str) -> list[tuple[str | None, list[str]]]:
    """Return the lines of each top-level key; those between keys, comments, belong to none."""
    blocks: list[tuple[str | None, list[str]]] = []
    between: list[str] = []
    for line in text.split("\n") if text else []:
        found = _KEY.match(line)
        if found:
            if between:
                blocks.append((None, between))
            blocks.append((found[1].strip("\"'"), [line]))
            between = []
        elif not line.strip() or line.startswith("#"):
            between.append(line)
        else:  # it goes on
            if not blocks:
                blocks.append((None, []))
            blocks[-1][1].extend([*between, line])
            between = []
    return [*blocks, (None, between)] if between else blocks


def _dumped(given: Mapping[str, Any]) -> list[str]:
    from huggingface_hub.utils import yaml_dump

    return yaml_dump(dict(given), sort_keys=False).rstrip("\n").split("\n") if given else []
