"""GradCache: the pairs of a whole optimizer step are each other's negatives, while one micro-batch is in memory.

Read `CachedStep.forward`: features of all micro-batches without graph (pass 1), their losses and scores; `differentiate`:
the gradient at the features (pass 2); then `loss`, whose gradient is what a micro-batch contributes (pass 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_mimic.contrastive import ContrastiveLoss, caption_hashes
from hf_mimic.finite import without_trace
from hf_mimic.forward_ad import dual_parameters, primal_of, rng_state, tangent_of, with_tangent
from hf_mimic.losses import embeddings, model_inputs
from hf_mimic.micro_batch import MicroBatch, joined, rows_of
from hf_mimic.mimic import MimicForward, scores_from, tangents_of


@dataclass(frozen=True)
class Features:
    """Image and text features (B, 2, D) of finite samples, their tangents, and which of the B rows were finite."""

    primal: Tensor
    tangent: Tensor | None
    finite: Tensor


class CachedStep:
    """One optimizer step of A micro-batches.

    The random numbers of pass 1 are put back, so that pass 3 draws the same dropout masks.

    Args:
        model: Without wrappers, in train mode.
        direction: Gives v at the present weights: parameter name to tensor; None if nothing is scored.
        loss_fn: Over pairs.

    References:
        GradCache, arXiv 2101.06983.
    """

    def __init__(self, model: nn.Module, direction: Callable[[], Any], loss_fn: ContrastiveLoss) -> None:
        self.model, self.direction, self.loss_fn = model, direction, loss_fn
        self.parts: list[MicroBatch] = []
        self._features: list[Features] = []
        self._leaf: Tensor
        self._gradients: tuple[Tensor, ...] = ()

    def forward(self, parts: Sequence[MicroBatch]) -> tuple[MimicForward, MicroBatch, Tensor]:
        """Run all micro-batches without graph.

        Returns:
            Losses (with a graph back to the features) and scores of the finite samples (n,); all N samples as one
            micro-batch without inputs of the model; and which of them were finite (N,).
        """
        self.parts = list(parts)
        with without_trace(self.model):
            self._features = [self._run(part) for part in self.parts]
        finite = torch.cat([features.finite for features in self._features])
        together = MicroBatch(
            {"finite": finite},
            joined(part.ids for part in self.parts),
            torch.cat([part.everything for part in self.parts]),
            _columns(self.parts),
        )
        tangent = joined(features.tangent for features in self._features)
        self._leaf = torch.cat([features.primal for features in self._features]).requires_grad_()
        direction = self.direction()
        norm, tangents = tangents_of(self.model, direction)
        with torch.enable_grad(), dual_parameters(self.model, tangents) as scope:
            image, text = with_tangent(self._leaf, tangent, scope).unbind(1)
            captions = self._captions[finite] if self.loss_fn.multi_positive else None
            found = self.loss_fn.losses(image, text, captions=captions, counted=together.everything[finite])
            losses, slope = primal_of(found), tangent_of(found)
        outputs = SimpleNamespace(image_embeds=self._leaf.detach()[:, 0], text_embeds=self._leaf.detach()[:, 1])
        return MimicForward(losses, scores_from(slope, direction, norm, losses), outputs, norm), together, finite

    def differentiate(self, loss: Tensor) -> None:
        """Take the gradient of the step's loss (0-d) at the features and at the parameters of the loss itself."""
        wanted = [self._leaf, *(p for p in self.loss_fn.parameters if p.requires_grad)]
        self._gradients = torch.autograd.grad(loss, wanted)

    def loss(self, model: nn.Module, number: int) -> tuple[Tensor | None, Tensor]:
        """Return a number whose gradient is what one micro-batch contributes, None if it had no finite sample.

        Args:
            model: Wrappers included: they must see every micro-batch, finite or not.
            number: Of the micro-batch.

        Returns:
            The number, 0-d, and the features (b, 2, D) that it was made of.
        """
        part, features = self.parts[number], self._features[number]
        some = bool(features.finite.any()) and not bool(features.finite.all())
        inputs = rows_of(part.inputs, features.finite, len(features.finite)) if some else part.inputs
        both = torch.stack(embeddings(model(**model_inputs(inputs))), 1)
        if not len(features.primal):
            return None, both
        first = sum(len(before.primal) for before in self._features[:number])
        at_features, *at_own = self._gradients
        surrogate = (both * at_features[first : first + len(both)]).sum()
        own = (p for p in self.loss_fn.parameters if p.requires_grad)
        running = sum(len(features.primal) > 0 for features in self._features)
        # A part to every micro-batch: DistributedDataParallel expects a gradient wherever the outputs depend on it.
        return surrogate + sum((p * g).sum() / running for p, g in zip(own, at_own, strict=True)), both

    def _run(self, part: MicroBatch) -> Features:
        module, state = rng_state(part.inputs.values())
        primal, tangent = self._embed(part.inputs)
        finite = torch.isfinite(primal).flatten(1).all(1)
        if tangent is not None:
            finite &= torch.isfinite(tangent).flatten(1).all(1)
        if finite.all():
            return Features(primal, tangent, finite)
        if not finite.any():
            return Features(primal[:0], None if tangent is None else tangent[:0], finite)
        module.set_rng_state(state)  # in pass 3 there is one forward pass only
        primal, tangent = self._embed(rows_of(part.inputs, finite, len(finite)))
        return Features(primal, tangent, finite)

    def _embed(self, inputs: Any) -> tuple[Tensor, Tensor | None]:
        _, tangents = tangents_of(self.model, self.direction())
        with dual_parameters(self.model, tangents):
            both = torch.stack(embeddings(self.model(**model_inputs(inputs))), 1)  # (B, 2, D)
            return primal_of(both), tangent_of(both)

    @property
    def _captions(self) -> Tensor:
        return torch.cat([caption_hashes(part.inputs) for part in self.parts])


def _columns(parts: Sequence[MicroBatch]) -> dict[str, Tensor]:
    known = [part.columns or {} for part in parts]
    return {name: torch.cat([columns[name] for columns in known]) for name in known[0]}
