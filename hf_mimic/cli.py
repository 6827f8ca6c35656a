"""`hf-mimic COMMAND --help`: flags from the dataclasses in commands.py, values from `--config file.yaml` too.

Exit code 0, 1 (a failure, with one line that says what to do), 2 (wrong use) or 130 (interrupted).
"""

from __future__ import annotations

import argparse
import inspect
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from hf_mimic.commands import COMMANDS
from hf_mimic.flags import closest, parser_of, read_yaml, set_values
from hf_mimic.origins import COMMAND


def parse(command: str, argv: Sequence[str]) -> list[Any]:
    """Return the command's dataclasses, filled from `--config file.yaml` and then from the flags."""
    types = COMMANDS[command][1]()
    parser = parser_of(types, prog=f"hf-mimic {command}", description=inspect.getdoc(COMMANDS[command][0]))
    path = None
    if "--config" not in parser._option_string_actions:  # of `run` it is the recipe
        parser.add_argument("--config", help="YAML file with values for these flags; flags on the command line win.")
        config = argparse.ArgumentParser(add_help=False)
        config.add_argument("--config")
        path = config.parse_known_args(argv)[0].config
    try:
        if path is not None:
            set_values(parser, read_yaml(path, f"--config {path}"), f"--config {path}")
        *options, unknown = parser.parse_args_into_dataclasses(
            list(argv), look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:  # of the file, or a check of the dataclass
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown {' '.join(unknown)}{closest(unknown[0], parser._option_string_actions)}")
    return options[: len(types)]


def _told(error: BaseException) -> str:
    """Return an error's message; of a data loader's worker, which wraps it in its traceback, the last line."""
    text = str(error)
    return text.strip().splitlines()[-1] if text.startswith("Caught ") and "Original Traceback" in text else text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    listed = "\n".join(f"  {name:<10}{inspect.getdoc(run)}" for name, (run, _) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="hf-mimic",
        description=f"commands:\n{listed}\n\n`hf-mimic COMMAND --help` lists a command's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    if not argv or argv[0] not in COMMANDS:
        parser.parse_args(argv[:1] or ["--help"])
    options = parse(argv[0], argv[1:])
    COMMAND.set(shlex.join(["hf-mimic", *argv]))
    try:
        told = COMMANDS[argv[0]][0](*options)
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        print(f"hf-mimic {argv[0]}: {_told(error)}", file=sys.stderr)
        return 1
    except (
        RuntimeError,
        ArithmeticError,
        IndexError,
        KeyError,
    ) as error:  # from a library: its kind says as much as its message
        print(f"hf-mimic {argv[0]}: {type(error).__name__}: {_told(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"hf-mimic {argv[0]}: interrupted", file=sys.stderr)
        return 130
    if told:  # one of several processes tells it for all
        print(told)
    return 0


if __name__ == "__main__":  # accelerate launch -m hf_mimic.cli
    sys.exit(main())
