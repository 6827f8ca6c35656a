"""Runs jobs in one of several processes: `torchrun --nproc-per-node 2 worker.py JOBS.pt FOLDER`.

A job is (name, function, arguments): the function of `jobs.py` to call; what it returns is saved per process. The
first job's training arguments start the process group, as in a user's script.
"""

import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

torch.set_num_threads(1)

import jobs  # noqa: E402
import transformers  # noqa: E402

if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    folder, rank = Path(sys.argv[2]), os.environ["RANK"]
    for name, function, arguments in torch.load(sys.argv[1], weights_only=True):
        try:
            result = getattr(jobs, function)(folder / name, **arguments)
        except Exception:
            result = {"failed": traceback.format_exc()}
        torch.save(result, folder / f"{name}-{rank}.pt")
        dist.barrier()
    (folder / f"done-{rank}").touch()
    dist.destroy_process_group()
