"""`HubTrainer`: a `Trainer` that tells when a checkpoint did not reach the Hub.

Checkpoints are pushed in the background. A plain `Trainer` never looks at what became of it: a token that may not write,
and a run of days has left nothing on the Hub, without a word.
"""

from __future__ import annotations

import logging
import warnings
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

from hf_mimic.hub_errors import explain, hub_errors, told
from hf_mimic.resuming import ResumingTrainer

logger = logging.getLogger(__name__)


class HubTrainer(ResumingTrainer):
    """Tells of every push that failed, at the next save and at the end of training; it never ends the training.

    `failed_pushes` is how many there were.
    """

    push_in_progress: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.failed_pushes = 0
        self._pushes: dict[Future, str] = {}  # those that nobody has looked at, and what they push

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repo that checkpoints go to, if it is not there; say what must be done where that is refused.

        Raises:
            HubError: If it cannot be created.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
        except hub_errors() as error:
            name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
            raise explain(error, name, "creating the repo", writing=True) from None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._look_at_pushes()
        before = self._jobs()
        super()._push_from_checkpoint(checkpoint_folder)
        self._pushes |= {job: Path(checkpoint_folder).name for job in self._jobs() if job not in before}

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._look_at_pushes()

    def _jobs(self) -> list[Future]:
        return list(getattr(getattr(self, "push_in_progress", None), "jobs", ()))

    def _look_at_pushes(self) -> None:
        """Tell of the pushes that have ended in an error, each once."""
        for job in [job for job in self._pushes if job.done()]:
            name = self._pushes.pop(job)
            error = CancelledError("it was cancelled") if job.cancelled() else job.exception()
            if error is not None:
                self.failed_pushes += 1
                self._tell(error, name)

    def _tell(self, error: BaseException, name: str) -> None:
        explained = explain(error, str(self.hub_model_id), f"pushing {name}", writing=True)
        text = told(explained, token=self.args.hub_token).rstrip(".")
        text += ". Training goes on, and the next save pushes again; `trainer.push_to_hub()` sends what is missing."
        logger.error(text)
        warnings.warn(text)
