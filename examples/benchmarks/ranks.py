"""Run a function in one or two processes that train together (gloo, on the CPU), without starting Python again."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

FORK = multiprocessing.get_context("fork")


def start_ranks(function: Callable, arguments: tuple, processes: int) -> list:
    """Start `function(*arguments)` in each process; what it prints goes to `<first argument>/rank-R.log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        FORK.Process(target=_rank, args=(function, arguments, rank, processes, port)) for rank in range(processes)
    ]
    for process in ranks:
        process.start()
    return ranks


def run_ranks(function: Callable, arguments: tuple, processes: int, *, seconds: float = 600) -> None:
    """Run to the end; raise with the end of the log if a process fails."""
    failed = wait(start_ranks(function, arguments, processes), seconds)
    if failed:
        log = Path(arguments[0]) / f"rank-{failed[0]}.log"
        raise RuntimeError(f"process {failed[0]} of {processes} failed:\n{log.read_text()[-4000:]}")


def wait(ranks: list, seconds: float) -> list[int]:
    """Wait for all processes; once one fails, or time is over, kill the others. Return which failed."""
    end = time.monotonic() + seconds
    while any(process.is_alive() for process in ranks):
        if time.monotonic() > end or any(process.exitcode for process in ranks):
            kill(ranks)
        time.sleep(0.01)
    return [rank for rank, process in enumerate(ranks) if process.exitcode]


def kill(ranks: list) -> None:
    """SIGKILL, which no process can prepare for."""
    for process in ranks:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    for process in ranks:
        process.join()


def _rank(function: Callable, arguments: tuple, rank: int, processes: int, port: int) -> None:
    Path(arguments[0]).mkdir(parents=True, exist_ok=True)
    log = os.open(Path(arguments[0]) / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if processes > 1:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in values.items()})
    code = 1
    try:
        function(*arguments)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)  # without gloo's clean-up, which may abort a process that is done
