"""What launching on several processes, sharding or compiling changes about a scored step; what is refused, and why.

`check_engine` refuses; `Engine` runs the scored forward pass and speaks to the other processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils.data import IterableDataset
from transformers import Trainer

from hf_mimic.finite import without_trace
from hf_mimic.losses import PerSampleLoss, model_inputs
from hf_mimic.mimic import MimicForward, mimic_forward
from hf_mimic.sharding import reshard, units


def check_engine(trainer: Trainer, *, reweight: str) -> None:
    """Refuse what would make scores or gradients wrong.

    Raises:
        ValueError: With the reason and the alternative.
    """
    model: Any = trainer.model
    args, plugin = trainer.args, getattr(trainer.accelerator.state, "fsdp_plugin", None)
    parallel = trainer.accelerator.parallelism_config
    if args.n_gpu > 1:
        raise ValueError(
            f"one process must use one device, got {args.n_gpu} GPUs (DataParallel), which would split the batch that "
            "weights are normalised over. Use `accelerate launch` (one process per GPU), or set CUDA_VISIBLE_DEVICES."
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > trainer.accelerator.num_processes:
        raise ValueError(
            f"processes must train together; {launched} processes were launched but each would train alone. "
            "Give every process a GPU. Without GPUs, --use_cpu makes them work together."
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "the engine must leave gradients where they can be rescaled, got DeepSpeed, which keeps them to itself. "
            "Use FSDP2 to shard (examples/accelerate/fsdp2.yaml), or plain `accelerate launch --multi_gpu`."
        )
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP must be version 2, got version 1, whose flat parameters cannot carry tangents. "
            "Set fsdp_version: 2 (examples/accelerate/fsdp2.yaml)."
        )
    if parallel is not None and parallel.non_data_parallel_size > 1:
        raise ValueError(
            "every process must have samples of its own, got tensor, context or sequence parallelism "
            f"({parallel}). Use data parallelism: DDP or FSDP2."
        )
    if (plugin is not None or units(model)) and (args.torch_compile or reweight == "mimic_layers"):
        wrong = "torch_compile=True" if args.torch_compile else 'reweight="mimic_layers"'
        raise ValueError(f"FSDP2 must be used without {wrong}, which needs unsharded parameters. Use DDP for it.")
    if any(isinstance(module, OptimizedModule) for module in model.modules()):
        raise ValueError(
            "`model` must be given as it was before torch.compile, whose code drops tangents. Pass it uncompiled with "
            "torch_compile=True: it is then scored eagerly and trained compiled."
        )


class Engine:
    """The processes and wrappers of one run.

    Args:
        trainer: After its set-up.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.accelerator = trainer.accelerator
        self.processes = self.accelerator.num_processes
        self.sharded = self.compiled = False
        # Whether all processes' batches have as many rows: not those of a stream that each process reads for itself.
        alone = isinstance(trainer.train_dataset, IterableDataset) and self.accelerator.dispatch_batches is False
        self.even = bool(self.accelerator.even_batches) and not alone
        self.parameters: list[Tensor] = []

    def prepared(self, model: nn.Module) -> None:
        """Take note of how the model was wrapped for training."""
        self.compiled = any(
            isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in model.modules()
        )
        if self.compiled:
            from torch._inductor import config

            # NOTE: inductor draws dropout masks of its own: scores would be of another model than the one trained.
            config.fallback_random = True
        self.sharded = bool(units(model))
        reshard(model)
        # NOTE: those that hold gradients. After a forward pass, FSDP2 may have left others in the model's place.
        self.parameters = list(model.parameters())
        if self.sharded:
            # NOTE: gradients that FSDP2 holds back between micro-batches cannot be reached; averaged ones can.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    def gather(self, row: Tensor) -> Tensor:
        """Return the rows (k,) of all processes as (P, k)."""
        return row[None] if self.processes == 1 else self.accelerator.gather(row[None])

    def gather_unequal(self, values: Tensor) -> Tensor:
        """Return the values (n,) of all processes as (N,), where n may differ between them; NaN fills up."""
        if self.processes == 1:
            return values
        return self.accelerator.gather(self.accelerator.pad_across_processes(values, pad_index=float("nan")))

    def gather_columns(self, ids: Tensor, values: Tensor, *, even: bool | None = None) -> tuple[Tensor, Tensor]:
        """Return ids and values (n,) of all processes as (N,); where n may differ, those that are not NaN.

        Args:
            ids: Integers.
            values: Floating-point numbers.
            even: Whether n is the same on all; by default whether their batches are.
        """
        if self.processes == 1:
            return ids, values
        if self.even if even is None else even:
            return self.accelerator.gather(ids), self.accelerator.gather(values)
        ids = self.accelerator.gather(self.accelerator.pad_across_processes(ids))
        values = self.gather_unequal(values)
        return ids[~values.isnan()], values[~values.isnan()]

    def anywhere(self, found: bool) -> bool:
        """Return whether something was found on any of the processes that must run their modules in step."""
        flag = torch.tensor([float(found)], device=self.accelerator.device)
        return bool(self.gather(flag).any())

    def averages(self, model: nn.Module) -> bool:
        """Return whether the next backward pass through `model` averages gradients over processes."""
        if self.accelerator.sync_gradients:
            return True
        return self.processes > 1 and bool(getattr(model, "require_backward_grad_sync", True))

    def forward(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        *,
        base: nn.Module,
        direction: Mapping[str, Tensor] | None,
        loss_fn: PerSampleLoss,
    ) -> MimicForward:
        """Run and score a batch; a compiled model is scored by an eager pass of its own, which costs a forward pass.

        Args:
            model: The model as it is trained, wrappers included.
            batch: B samples.
            base: The model inside.
            direction: Parameter name to v.
            loss_fn: (outputs, batch) -> (B,).
        """
        if not self.compiled:
            return mimic_forward(model, batch, direction, loss_fn, base=base)
        with without_trace(base):
            scored = mimic_forward(base, batch, direction, loss_fn)
        outputs = model(**model_inputs(batch))
        return MimicForward(loss_fn(outputs, batch), scored.scores, outputs, scored.norm)


@torch.no_grad()
def rescale(parameters: Iterable[Tensor], factor: Tensor | float | None) -> None:
    """Multiply the gradients accumulated so far; of a sharded parameter, this process's part."""
    if factor is None:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            gradient: Any = parameter.grad
            (gradient.to_local() if hasattr(gradient, "to_local") else gradient).mul_(factor)
