"""`HubTrainer`: a `Trainer` whose run has a record and a card, and which tells when a checkpoint did not reach the Hub.

Checkpoints are pushed in the background. A plain `Trainer` never looks at what became of it: a token that may not write,
and a run of days has left nothing on the Hub, without a word.
"""

from __future__ import annotations

import logging
import re
import warnings
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi

from hf_mimic.cards import model_card
from hf_mimic.files import write_atomically
from hf_mimic.hub import CARD, Contents, Destination, Present, publish
from hf_mimic.hub_errors import explain, hub_errors, told
from hf_mimic.resuming import ResumingTrainer
from hf_mimic.trainer_record import record_of_run, task_of

_CARD_ARGUMENTS = ("language", "license", "tags", "model_name", "finetuned_from", "tasks", "dataset_tags", "dataset")
_SCORES = r"scores(-\d+)?"  # folders
# As the Trainer and its client leave out; and scores.
_IGNORED = re.compile(rf"_|checkpoint-|.*/_|.*\.tmp$|(.*/)?\.(git|cache)/|{_SCORES}/")
logger = logging.getLogger(__name__)


class HubTrainer(ResumingTrainer):
    """Writes `mimic_record.json` beside the scores; pushes the model with its card, all in one commit.

    A push of a checkpoint that failed is told at the next save and at the end of training; it never ends the training.
    `failed_pushes` is how many there were.
    """

    args: Any
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

    # ---- what is told of the run -----------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; write the record of the run beside its scores."""
        output = super().train(*args, **kwargs)
        self._write_record()
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; the record holds the last results."""
        metrics = super().evaluate(*args, **kwargs)
        self._write_record()
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self._write_record()

    def _write_record(self) -> None:
        folder = Path(self.args.scores_dir)
        if not (self.args.record_scores and self.is_world_process_zero() and folder.is_dir()):
            return
        try:
            record_of_run(self).write(folder)
        except (OSError, ValueError) as error:  # the training is worth more than its record
            warnings.warn(f"the record of the run could not be written to {folder}: {error}")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md: how the model was trained, on what, and what that risks; what people wrote in it stays.

        Args:
            *args: As of the Trainer.
            **kwargs: `language`, `license`, `tags`, `model_name`, `dataset_tags` ... as of the Trainer; they go into its head.
        """
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / CARD
        before = path.read_text(encoding="utf-8") if path.is_file() else None
        text = self._card(before, **dict(zip(_CARD_ARGUMENTS, args, strict=False)), **kwargs)
        write_atomically(path, lambda file: file.write(text.encode()))

    def _card(self, existing: str | None, **given: Any) -> str:
        record = record_of_run(self)
        if given.get("finetuned_from"):
            record = replace(record, model=given["finetuned_from"], model_revision=None)
        names = {"language": "language", "license": "license", "tags": "tags", "tasks": "pipeline_tag"}
        head = {name: given[argument] for argument, name in names.items() if given.get(argument)}
        datasets = given.get("dataset_tags") or given.get("dataset")
        head |= {"datasets": [datasets] if isinstance(datasets, str) else list(datasets)} if datasets else {}
        name = str(self.hub_model_id or given.get("model_name") or Path(str(self.args.output_dir)).absolute().name)
        head = {"library_name": "transformers", "pipeline_tag": task_of(self.model), **head}
        return model_card(record, model_id=name, metadata=head, existing=existing)

    # ---- to the Hub ------------------------------------------------------------------------------------------------

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push the model, its processor and a card in one commit; wait and try again where the Hub fails for a while.

        Scores are published by `push_scores`, or with the data set by `push_curated_dataset`; they are left out here.

        Args:
            commit_message: Of the commit.
            blocking: Whether to wait until it is done; if not, a future is returned.
            token: By default `args.hub_token`, then the one of `hf auth login` or HF_TOKEN.
            revision: Branch; by default `args.hub_revision`, then main.
            private: Whether a repo that is made is private; by default `args.hub_private_repo`.
            **kwargs: For `create_model_card`.

        Returns:
            A `CommitInfo`, or a future of one; None on the other processes.

        Raises:
            HubError: If it cannot be published; the branch is as it was.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        private = private if private is not None else self.args.hub_private_repo
        to = Destination(
            str(self.hub_model_id), "model", revision=revision or self.args.hub_revision, private=private, token=token
        )

        def push() -> CommitInfo:
            done = publish(to, lambda present: self._contents(present, kwargs), message=commit_message or "Push")
            return CommitInfo(f"{done.url}/commit/{done.commit}", str(commit_message), "", done.commit)

        return push() if blocking else HfApi().run_as_future(push)

    def _contents(self, present: Present, given: dict[str, Any]) -> Contents:
        """Return the files of the output folder, without checkpoints and scores, and the card merged into the Hub's."""
        from hf_mimic.shared_scores import stale_scores  # with scikit-learn behind it

        folder = Path(str(self.args.output_dir))
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        named = {path.relative_to(folder).as_posix(): path for path in paths}
        files: dict[str, Path | bytes] = {name: path for name, path in named.items() if not _IGNORED.match(name)}
        if present.card is not None:
            files[CARD] = self._card(present.card, **given).encode()
        return Contents(files, stale_scores(present, _SCORES))

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
