"""Which samples a run trains on: the strategies that choose, wired to the loader, the step and the checkpoint.

Read `BatchSelection`: its methods come in the order in which a run calls them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Subset
from tqdm.auto import tqdm
from transformers.trainer_utils import seed_worker

from hf_mimic.candidates import Candidates, FiniteForward
from hf_mimic.data import SampleIdDataset
from hf_mimic.dissect import DISSect, keep_count
from hf_mimic.losses import clip_score, model_inputs
from hf_mimic.micro_batch import MicroBatch
from hf_mimic.mimic import eval_mode
from hf_mimic.padding import EvenBatches
from hf_mimic.samplers import DISSectBatchSampler
from hf_mimic.selection import DISSECT, RANKINGS, SUBSETS
from hf_mimic.subsets import KEEPERS, LEAST_SCAN_RATE, SubsetBatchSampler

HISTORY_NAME = "selection_history.safetensors"


class BatchSelection:
    """What a run trains on.

    Args:
        trainer: The `MimicTrainer`, with its strategy.

    Raises:
        ValueError: If the strategy cannot choose from these data.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.args, self.strategy = trainer, trainer.args, trainer.strategy
        self.rate = self.args.rate
        chooses = self.rate < 1 and self.strategy in (*RANKINGS, *DISSECT, *SUBSETS)
        self.in_epochs = chooses and (self.strategy in SUBSETS or self.args.refresh == "epoch")
        self._least = 2 if trainer.couples else 1  # one pair has no negative
        self.rule = self._rule() if chooses and self.strategy in DISSECT else None
        self.sampler: Any = None
        self._dataset: Any = None
        self._options: dict[str, Any] = {}
        if chooses:
            _check(trainer, self.in_epochs)
        in_steps = chooses and not self.in_epochs
        self.candidates = Candidates(trainer, self.rule, least=self._least) if in_steps else None

    def _rule(self) -> DISSect:
        args = self.args
        options = {name: getattr(args, name) for name in ("variant", "momentum", "warmup_epochs", "warmup_data")}
        return DISSect(self.rate, least=self._least, seed=args.seed, **options)

    # ---- the loader ------------------------------------------------------------------------------------------------

    def loader(self, dataset: Any, sampler: Any, batch_size: int) -> DataLoader:
        """Return the loader of a run that chooses before loading.

        Args:
            dataset: N rows.
            sampler: Of their indices, as the Trainer made it.
            batch_size: Candidates per batch.
        """
        accelerator = self.trainer.accelerator
        self._dataset, self._options = dataset, self._loader_options()
        self.sampler = self._batches(_seeded(sampler, self.args), batch_size, _ids_of(dataset))
        batches: Any = self.sampler
        if accelerator.num_processes > 1:
            batches = EvenBatches(batches, accelerator.num_processes, accelerator.process_index)
        loader = accelerator.prepare(DataLoader(dataset, batch_sampler=batches, **self._options))
        wrapper = loader.batch_sampler
        if wrapper is not batches:  # accelerate would share out again what is shared out already
            wrapper.num_processes, wrapper.process_index, wrapper.batch_size = 1, 0, None
        return loader

    def _batches(self, sampler: Any, batch_size: int, ids: Tensor) -> Any:
        args = self.args
        options: dict[str, Any] = {"sample_ids": ids, "drop_last": args.dataloader_drop_last}
        if self.rule is not None:
            options |= {"refresh": "epoch", "rescore_share": args.rescore_share}
            return DISSectBatchSampler(sampler, batch_size, rule=self.rule, **options)
        keeper = self._keeper(args.num_train_epochs)  # see `begin_run`
        return SubsetBatchSampler(sampler, batch_size, keeper=keeper, seed=args.seed, **options)

    def _keeper(self, epochs: float) -> Callable[..., Any]:
        return partial(KEEPERS[self.strategy], rate=self.rate, epochs=epochs)

    def _loader_options(self) -> dict[str, Any]:
        args = self.args
        workers = args.dataloader_num_workers
        return {
            "collate_fn": self.trainer.data_collator,
            "num_workers": workers,
            "pin_memory": args.dataloader_pin_memory,
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "worker_init_fn": partial(seed_worker, num_workers=workers, rank=args.process_index),
        }

    # ---- a run, an epoch, a step -----------------------------------------------------------------------------------

    def begin_run(self, *, resumed: bool) -> None:
        """Forget an earlier run; take what the reference said of the samples, for a coreset."""
        epochs = self.trainer.state.num_train_epochs  # with `max_steps` the argument says nothing
        if self.rule is not None and not resumed:
            self.rule.forget()
        if self.rule is not None and self.rule.variant == "warmup" and epochs <= self.rule.warmup_epochs:
            warnings.warn(
                f"the run must be longer than the warm-up for DISSect to choose anything, got {epochs} epochs and "
                f"warmup_epochs={self.rule.warmup_epochs}. Use more epochs, fewer warmup_epochs, or "
                'variant="momentum".'
            )
        if isinstance(self.sampler, SubsetBatchSampler) and self.args.max_steps > 0:
            self.sampler.keeper = self._keeper(epochs)
        reference = self.trainer.reference_scores
        if self.strategy in ("ref_clip_score", "ref_clip_loss") and self.sampler is not None:
            losses, _, clip_scores = reference.find(self.sampler.sample_ids)
            self.sampler.reference = clip_scores if self.strategy == "ref_clip_score" else -losses

    def begin_epoch(self) -> None:
        """Score again what is due, before an epoch is chosen from old scores."""
        due = self.sampler.due() if isinstance(self.sampler, DISSectBatchSampler) else []
        if not due:
            return
        trainer, args = self.trainer, self.args
        each = len(due) // args.world_size  # as many forward passes on every process
        mine = Subset(self._dataset, due[args.process_index :: args.world_size][:each])
        loader = DataLoader(mine, args.train_batch_size, **{**self._options, "persistent_workers": False})
        hidden = args.disable_tqdm or args.process_index > 0
        ids, scores = [], []
        with eval_mode(trainer.model), torch.no_grad():
            for given in tqdm(loader, desc="scoring again", unit="batch", leave=False, disable=hidden):
                batch = trainer._prepare_inputs(given)
                ids.append(batch.pop(args.sample_id_column))
                scores.append(clip_score(trainer.model(**model_inputs(batch))))
        nothing = torch.zeros(0, device=args.device)
        found = torch.cat(ids) if ids else nothing.long(), torch.cat(scores) if scores else nothing
        trainer.ledger.add(samples_decoded=len(mine), samples_scored=len(mine))
        self.sampler.update(*trainer.engine.gather_columns(*found, even=True), rescored=True)

    def keep(self, part: MicroBatch, finite: FiniteForward) -> MicroBatch:
        """Return what is trained on of a micro-batch; see `Candidates.keep`."""
        return part if self.candidates is None else self.candidates.keep(part, finite)

    def learn(self, ids: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Take note of what training said of samples (b,), for the epochs to come."""
        if self.sampler is not None:
            unknown = torch.full(ids.shape, torch.nan, device=ids.device)
            signal = columns.get(getattr(self.sampler, "signal", "clip_score"), unknown)
            self.sampler.update(*self.trainer.engine.gather_columns(ids, signal, even=False))

    def importance(self, ids: Tensor) -> Tensor | None:
        """Return 1 / P(kept) of samples (b,), None if all count alike."""
        return self.sampler.importance(ids) if isinstance(self.sampler, SubsetBatchSampler) else None

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        """Write the history of all samples, the same on every process."""
        owner = self.rule if self.sampler is None else self.sampler
        if owner is not None and self.args.should_save:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(_flat(owner.state_dict()), str(Path(folder) / HISTORY_NAME))

    def resume(self, folder: str | None) -> None:
        """Go on with the history of a checkpoint.

        Raises:
            FileNotFoundError: If it has none.
            ValueError: If that is of another way of choosing.
        """
        owner = self.rule if self.sampler is None else self.sampler
        if owner is None:
            return
        path = Path(folder or "") / HISTORY_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f'strategy="{self.strategy}" goes on from the scores of earlier epochs, {path} is missing. Resume from '
                "another checkpoint, or begin a new run."
            )
        state = _nested(load_file(str(path)))
        if set(state) != set(owner.state_dict()):
            raise ValueError(
                "a checkpoint's history can be gone on with by the same way of choosing only, got "
                f'strategy="{self.strategy}", refresh="{self.args.refresh}" and {path} of another one. Resume with the '
                "settings of the checkpoint, or begin a new run."
            )
        owner.load_state_dict(state)


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return nested states as tensors by dotted name; an integer as a 0-d tensor."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = torch.as_tensor(value).cpu().contiguous()
    return found


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tensors.items():
        *parents, last = name.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value.item() if value.dim() == 0 else value
    return found


def _seeded(sampler: Any, args: Any) -> Any:
    """Return accelerate's sampler in place of a random one: the order of an epoch then depends on its number only."""
    if not isinstance(sampler, RandomSampler):
        return sampler
    return SeedableRandomSampler(
        data_source=sampler.data_source,
        replacement=sampler.replacement,
        num_samples=sampler._num_samples,
        generator=torch.Generator(),
        data_seed=args.seed if args.data_seed is None else args.data_seed,
    )


def _ids_of(dataset: Any) -> Tensor:
    """Return the sample ids (N,) without loading a sample.

    Raises:
        ValueError: If the data set does not say them, or not one whole number for each of its rows.
    """
    # NOTE: a data set may have `ids` of its own that mean something else, as torchvision's CocoDetection has.
    ids = dataset.ids if isinstance(dataset, SampleIdDataset) else getattr(dataset, "sample_ids", None)
    if ids is None:
        raise ValueError(
            "a data set of which batches are chosen before loading must be a datasets.Dataset with ids, or have an "
            f"attribute `sample_ids` (N,), got {type(dataset).__name__} without."
        )
    found = np.asarray(ids)
    if found.dtype.kind not in "iu" or found.shape != (len(dataset),) or len(np.unique(found)) < len(found):
        raise ValueError(
            f"`sample_ids` must be different integers ({len(dataset)},), one for each row, got {found.dtype} of shape "
            f"{found.shape}, {len(np.unique(found))} of them different. They are the `sample_id` of the items."
        )
    return torch.from_numpy(found.astype(np.int64))


def _check(trainer: Any, in_epochs: bool) -> None:
    """Raise if the strategy cannot choose from these data, or would leave a batch without negatives."""
    args, strategy, rows = trainer.args, trainer.strategy, trainer.train_dataset
    stream = isinstance(rows, IterableDataset) or not hasattr(rows, "__len__")
    if in_epochs and rows is not None and stream:
        raise ValueError(
            f'strategy="{strategy}" chooses before loading, which needs a data set with a length, got a stream. Use '
            'refresh="step" with dissect, dissect_mimic or random.'
        )
    config = args.accelerator_config
    if in_epochs and (config.dispatch_batches or config.split_batches):
        raise ValueError(
            f'strategy="{strategy}" chooses the batches of every process itself, got an accelerator_config with '
            "dispatch_batches or split_batches. Leave both out."
        )
    if args.refresh == "epoch" and strategy in RANKINGS and strategy != "random":
        raise ValueError(
            f'`refresh`="epoch" must come with dissect, dissect_mimic or random, got strategy="{strategy}", which needs the '
            'scores of the present weights. Use refresh="step".'
        )
    if strategy == "scan" and args.rate < LEAST_SCAN_RATE:
        raise ValueError(
            f'`selection_rate` must be {LEAST_SCAN_RATE} at least with strategy="scan", which drops in the mean no more than '
            f"that leaves, got {args.rate}. The paper keeps 0.65 to 0.7."
        )
    kept = keep_count(args.per_device_train_batch_size, args.rate)
    if trainer.couples and kept < 2:
        raise ValueError(
            f"`selection_rate` must keep at least 2 pairs of a batch, as one has no negative, got {args.rate} of "
            f"{args.per_device_train_batch_size}. Use larger batches, or a larger selection_rate."
        )
