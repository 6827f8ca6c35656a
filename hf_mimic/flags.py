"""The flags of a command: a parser made of its dataclasses, and the same types and checks for values of a YAML file.

Read `set_values`: YAML says `1e-4` (a string), `2` where a real number is meant, `no` for False.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

_SCALAR = (int, float)
_MORE_THAN_TEXT = {"resume_from_checkpoint", "temperature"}  # texts for the parser, which also take true, a number


def parser_of(types: Sequence[type], **options: Any) -> Any:
    """Return an `HfArgumentParser` whose help is what the docstrings of the dataclasses say."""
    from transformers import HfArgumentParser

    kinds: Any = types
    parser = HfArgumentParser(kinds, **options)
    described = {name: text for kind in types for each in kind.__mro__ for name, text in _argument_docs(each).items()}
    for action in parser._actions:
        action.help = action.help or described.get(action.dest)
    return parser


def from_values(types: Sequence[type], values: Mapping[str, Any], where: str) -> list[Any]:
    """Return the dataclasses of a command, filled as its flags would fill them.

    Args:
        types: Dataclasses.
        values: Name of a flag to its value.
        where: What an error begins with.

    Raises:
        ValueError: If a name is unknown, a value is missing or has another type, or a check of the dataclasses fails.
    """
    parser = parser_of(types)
    set_values(parser, values, where)
    missing = [action.dest for action in parser._actions if action.required]
    if missing:
        raise ValueError(f"{where}: it must have {' and '.join(f'`{name}`' for name in missing)}, got none.")
    try:
        return list(parser.parse_args_into_dataclasses([], look_for_args_file=False))
    except ValueError as error:  # a check of the dataclass
        raise ValueError(f"{where}: {error}") from error


def set_values(parser: Any, values: Mapping[str, Any], where: str) -> None:
    """Make values the defaults of a parser; flags on the command line win.

    Args:
        parser: Of `parser_of`.
        values: Name of a flag to its value.
        where: What an error begins with.

    Raises:
        ValueError: If a name is unknown, or a value has another type.
    """
    actions: dict[str, Any] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # before its --no_ twin
    hints = {name: hint for kind in parser.dataclass_types for name, hint in get_type_hints(kind).items()}
    texts = {name for name, hint in hints.items() if hint in (str, str | None)} - _MORE_THAN_TEXT
    for name, value in values.items():
        if name not in actions:
            raise ValueError(f"{where}: unknown key {name!r}{closest(name, actions)}")
        action = actions[name]
        if value is None and (action.required or action.default is not None):
            raise ValueError(f"{where}: `{name}` must have a value, got null. Leave the line out for the default.")
        if name in texts and isinstance(value, (bool, int, float, list, dict)):
            raise ValueError(
                f"{where}: `{name}` must be one text, got {value!r}. Put what YAML reads otherwise (no, on, 1.10) in quotes, or "
                "leave the line out."
            )
        typed = _typed(parser, action, value, where)
        action.required = False
        parser.set_defaults(**{name: typed})


def read_yaml(path: str | Path, where: str) -> dict[str, Any]:
    """Return the `key: value` lines of a file; an empty one has none.

    Args:
        path: Of the file.
        where: What an error begins with.

    Raises:
        ValueError: If it cannot be read, holds something else, or a key twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is there twice: YAML would take the last one, without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key for key, _ in node.value if key.value != "<<"]
            for i, key in enumerate(keys):
                if key.value in [before.value for before in keys[:i]]:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is there twice", key.start_mark
                    )
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except yaml.MarkedYAMLError as error:  # which says it in five lines
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{where}: {line}{error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    return mapping(values, where)


def mapping(values: Any, where: str) -> dict[str, Any]:
    """Return `key: value` lines; nothing is none.

    Raises:
        ValueError: If it is something else.
    """
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{where}: it must hold `key: value` lines, got a {type(values).__name__}")
    return values


def names(types: Sequence[type]) -> set[str]:
    """Return the names of the flags of a command."""
    return {action.dest for action in parser_of(types)._actions} - {"help"}


def closest(name: Any, known: Iterable[str]) -> str:
    """Return a question for the name that was probably meant, empty if there is none like it."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _typed(parser: Any, action: Any, value: Any, where: str) -> Any:
    """Return a value as the flag would make it of a word, or of several."""
    if action.nargs in ("+", "*") and value is not None:
        return [_one(parser, action, each, where) for each in (value if isinstance(value, list) else [value])]
    if isinstance(value, (list, dict)) and action.type not in _SCALAR:
        return value  # settings of a Trainer that are tables
    return None if value is None else _one(parser, action, value, where)


def _one(parser: Any, action: Any, value: Any, where: str) -> Any:
    if value is False and "no" in (action.choices or ()):
        return "no"  # YAML's word for False
    try:
        found = parser._get_value(action, str(value))
        parser._check_value(action, found)
    except argparse.ArgumentError as error:
        raise ValueError(f"{where}: `{action.dest}`: {error.message}") from error
    return found


def _argument_docs(kind: type) -> dict[str, str]:
    """Return name to description from the `Args:` section of a dataclass's docstring."""
    doc = inspect.getdoc(kind) or ""
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)+)", doc, re.M)
    entries = re.findall(r"^ {4}(\w+): ((?:.*)(?:\n {8}.*)*)", section.group(1) if section else "", re.M)
    return {name: re.sub(r"\s+", " ", text).replace("%", "%%") for name, text in entries}
