"""What the benchmarks that train share: a quiet process, quiet trainers, and trainers that take turns."""

import warnings
from collections.abc import Callable, Mapping

import torch
import transformers

# Arguments of a run that writes nothing but scores.
QUIET = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "logging_strategy": "no",
}


def quiet() -> None:
    """Let this process use one core, and say nothing."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def take_turns(run: Mapping[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """Return the seconds that each way takes, turn by turn: in every second turn they go backwards; the first warms up.

    Args:
        run: Name to a function that trains once and returns seconds.
        turns: That count.
    """
    found: dict[str, list[float]] = {name: [] for name in run}
    for turn in range(turns + 1):
        for name in sorted(run, reverse=bool(turn % 2)):
            seconds = run[name]()
            if turn:
                found[name].append(seconds)
    return found
