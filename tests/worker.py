"""Runs jobs in one of several processes: `torchrun --nproc-per-node 2 worker.py JOBS.pt FOLDER`.

A job is (name, function, arguments): the function of `jobs.py` to call; what it returns is saved per process.
"""

import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

torch.set_num_threads(1)

import jobs  # noqa: E402
import transformers  # noqa: E402
from accelerate import PartialState  # noqa: E402

if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    folder = Path(sys.argv[2])
    state = PartialState(cpu=True)
    for name, function, arguments in torch.load(sys.argv[1], weights_only=True):
        try:
            result = getattr(jobs, function)(folder / name, **arguments)
        except Exception:
            result = {"failed": traceback.format_exc()}
        torch.save(result, folder / f"{name}-{state.process_index}.pt")
        state.wait_for_everyone()
    (folder / f"done-{state.process_index}").touch()
    dist.destroy_process_group()
