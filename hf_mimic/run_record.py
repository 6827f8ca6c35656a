"""How scores were made: a record that is written beside them, and that cards and `selection.json` tell from.

Read `RunRecord`. It is for the public: names of Hub repos and of folders, never where those lie on a machine, no tokens.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_mimic.checks import check_choice
from hf_mimic.corpus_folder import read_settings
from hf_mimic.files import write_atomically

RECORD_NAME = "mimic_record.json"
KINDS = ("training", "scoring", "unknown")
_NAMES = ("model", "reference_model", "base_model", "dataset")
_TEXTS = (*_NAMES, "model_revision", "reference_revision", "dataset_revision", "dataset_config", "split", "command")
_TABLES: dict[str, tuple[type, ...]] = {
    "settings": (object,),
    "seeds": (int,),
    "health": (object,),
    "results": (int, float, type(None)),
    "versions": (str,),
}
_PACKAGES = ("hf_mimic", "torch", "transformers", "datasets")
_LOCAL = ("local folder ", "local file ")
_ABSOLUTE = re.compile(r"/|~[\w-]*([/\\]|$)|[A-Za-z]:[\\/]|\\\\|file:")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_DATA_FILES = (".parquet", ".csv", ".json", ".jsonl", ".arrow", ".safetensors")


@dataclass(frozen=True)
class RunRecord:
    """How scores were made, in JSON values; what is not known is None or missing.

    Names are what `public_name` makes of what a user gave. An absolute path that is given nevertheless is cut to its
    last part, a number that is not finite becomes null.

    Args:
        kind: "training", "scoring" (of a frozen model), or "unknown".
        model: The student as it was given.
        model_revision: Commit sha.
        reference_model: The reference.
        reference_revision: Commit sha.
        base_model: What the reference was fine-tuned from, where it was used or its card names one.
        dataset: What was scored.
        dataset_revision: Commit sha.
        dataset_config: Name of the configuration; None for the default one.
        split: Of the data set.
        settings: `mimic_layers`, `direction`, `temperature`, `strategy`, `epochs` and so on.
        seeds: By name, such as `seed` and `data_seed`.
        health: What `Health.report` said.
        results: Metrics of the last evaluation.
        versions: By package.
        command: What made the scores, if it was a command.
    """

    kind: str = "unknown"
    model: str | None = None
    model_revision: str | None = None
    reference_model: str | None = None
    reference_revision: str | None = None
    base_model: str | None = None
    dataset: str | None = None
    dataset_revision: str | None = None
    dataset_config: str | None = None
    split: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)
    results: dict[str, float | None] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        for name in _TEXTS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"`{name}` must be a string or None, got {value!r}. Use None for what is not known.")
        for name in _NAMES:
            object.__setattr__(self, name, _without_path(getattr(self, name)))
        for name, kinds in _TABLES.items():
            object.__setattr__(self, name, _table(name, getattr(self, name), kinds))
        if self.command is not None:
            object.__setattr__(self, "command", public_command(self.command))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, as JSON takes them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> RunRecord:
        """Return the record in a dict; keys that are not known are left out.

        Raises:
            ValueError: If it is no dict, or a value has another type.
        """
        return cls(**known_fields(cls, given))

    def to_bytes(self) -> bytes:
        """Return what `mimic_record.json` holds."""
        return (json.dumps(self.as_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()

    def write(self, folder: str | Path) -> None:
        """Write `mimic_record.json` into a folder that exists."""
        write_atomically(Path(folder) / RECORD_NAME, lambda file: file.write(self.to_bytes()))

    @classmethod
    def read(cls, folder: str | Path) -> RunRecord | None:
        """Return the record of a folder of scores: its own, else its scoring pass's, else that of the folder it lies in.

        Raises:
            ValueError: If a record is there and cannot be read.
        """
        scores = Path(folder).resolve()
        own = _read_record(scores)
        if own is not None:
            return own
        settings = read_settings(scores)
        return _read_record(scores.parent) if settings is None else _of_a_pass(settings)


def known_fields(cls: type, given: Any) -> dict[str, Any]:
    """Return those items of a dict that are fields of a dataclass.

    Raises:
        ValueError: If it is no dict.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"a {cls.__name__} must come from a dict, got {given!r}. Give what `as_dict` returned.")
    return {entry.name: given[entry.name] for entry in fields(cls) if entry.name in given}


def public_name(name: str | Path | None) -> str | None:
    """Return what may be said of a model or data set: a repo id as it is, of a path the last part.

    NOTE: a relative path that does not exist looks like a repo id. Call this where the name is used, not later.
    """
    if name is None or str(name).startswith(_LOCAL):
        return None if name is None else str(name)
    text = str(name)
    if "://" in text and not text.startswith("file:"):
        url = urlsplit(text)
        return f"{url.scheme}://{url.hostname or ''}{url.path}"  # no password, no signature
    path = os.path.expanduser(text)
    if isinstance(name, str) and hub_id(text) and not os.path.exists(path):
        return text
    is_file = os.path.isfile(path) or (text.endswith(_DATA_FILES) and not os.path.isdir(path))
    return f"local {'file' if is_file else 'folder'} {_last_part(text)}"


def hub_id(name: str | None) -> str | None:
    """Return a name of a record if it is the id of a Hub repo, else None."""
    if name is None or name.endswith(_DATA_FILES):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def public_command(command: str) -> str:
    """Return a command line with absolute paths cut to their last part, and without tokens.

    Raises:
        ValueError: If a shell could not read it.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"`command` must be a line that a shell can read, got {command!r} ({error}).") from error
    secret = [False, *(word.startswith("-") and _is_secret(word) for word in words)]
    return shlex.join("hf_***" if hide else _public_word(word) for word, hide in zip(words, secret, strict=False))


def as_json(value: Any, where: str) -> Any:
    """Return a value as JSON takes it, with null for what is not finite and without absolute paths.

    Args:
        value: Of numbers, strings, lists and dicts.
        where: Its name, for the error.

    Raises:
        ValueError: If JSON has no such thing.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (str, Path)):
        return _TOKEN.sub("hf_***", _without_path(str(value)) or "")
    if isinstance(value, Mapping):
        return {str(key): as_json(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a number of numpy or torch
        return as_json(value.item(), where)
    raise ValueError(
        f"`{where}` must hold JSON values, got a {type(value).__name__}. Give numbers, strings and lists."
    )


def versions() -> dict[str, str]:
    """Return the version of every package that scores depend on, by name, and of Python."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from its source
            continue
    return found | {"python": platform.python_version()}


def _table(name: str, given: Any, kinds: tuple[type, ...]) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"`{name}` must be a dict, got {given!r}. Use {{}} for what is not known.")
    table = as_json(given, name)
    for key, value in table.items():
        if not isinstance(value, kinds) or (isinstance(value, bool) and object not in kinds):
            raise ValueError(
                f"`{name}` must have {' or '.join(k.__name__ for k in kinds)} values, got {key}: {value!r}."
            )
    return table


def _read_record(folder: Path) -> RunRecord | None:
    path = folder / RECORD_NAME
    try:
        return RunRecord.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} must hold the record of a run, it does not ({error}). Restore or delete it."
        ) from error


def _of_a_pass(settings: Mapping[str, Any]) -> RunRecord:
    """Return what the settings of a scoring pass say; a revision that is no commit sha is a setting."""
    revision = settings.get("revision")
    is_sha = isinstance(revision, str) and re.fullmatch("[0-9a-f]{40}", revision) is not None
    own = {"mimic_layers": settings.get("layers"), "batch_size": settings.get("batch_size")}
    return RunRecord(
        kind="scoring",
        model=public_name(settings.get("model")),
        reference_model=public_name(settings.get("reference")),
        reference_revision=revision if is_sha else None,
        dataset=public_name(settings.get("data")),
        split=settings.get("split"),
        settings={
            name: value
            for name, value in {**own, "reference_revision": None if is_sha else revision}.items()
            if value is not None
        },
    )


def _last_part(text: str) -> str:
    kind = PureWindowsPath if "\\" in text or re.match("[A-Za-z]:", text) else PurePosixPath
    name = kind(text).name
    return name if name.strip(".") else Path(text).resolve().name or "/"


def _without_path(text: str | None) -> str | None:
    """Return a string as it is, or the last part of one that is an absolute path."""
    return public_name(text) if text is not None and _ABSOLUTE.match(text) else text


def _is_secret(name: str) -> bool:
    return name.lower().endswith("token")


def _public_word(word: str) -> str:
    has_name = re.match(r"--?[\w-]+=|\w+=", word)
    name, equals, value = word.partition("=") if has_name else ("", "", word)
    shown = "hf_***" if _is_secret(name) else _last_part(value) if _ABSOLUTE.match(value) else value
    return _TOKEN.sub("hf_***", name + equals + shown)
