"""Metrics: accuracy for the Trainer, how well scores find the samples known to be wrong, and those of image-text models.

The latter live in retrieval.py (recall, zero-shot accuracy) and embeddings.py (what stands for a class), what tells a
reference's training samples in membership.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_mimic.embeddings import class_embeddings
from hf_mimic.membership import discovered, membership
from hf_mimic.retrieval import recall, retrieval, zero_shot_accuracy

__all__ = [
    "accuracy",
    "class_embeddings",
    "detection",
    "discovered",
    "membership",
    "recall",
    "retrieval",
    "zero_shot_accuracy",
]


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the share of right predictions, as `compute_metrics` of a Trainer.

    Args:
        prediction: A `transformers.EvalPrediction` with logits (N, C) and label ids (N,).
    """
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def detection(
    wrong: np.ndarray, *, score: np.ndarray | None = None, keep: np.ndarray | None = None
) -> dict[str, float]:
    """Return how well wrong samples are found: `auroc` of a score, `f1` of a keep mask.

    Args:
        wrong: Booleans (N,), true for a sample known to be wrong.
        score: (N,), higher is better; NaN is left out.
        keep: Booleans (N,), false for a sample that was found to be wrong.

    Raises:
        ValueError: If all samples are wrong or none is.
    """
    from sklearn.metrics import f1_score, roc_auc_score

    wrong = np.asarray(wrong, dtype=bool)
    if wrong.all() or not wrong.any():
        raise ValueError(f"detection needs right and wrong samples, got {int(wrong.sum())} wrong of {len(wrong)}.")
    result = {}
    if score is not None:
        known = ~np.isnan(score)
        result["auroc"] = float(roc_auc_score(~wrong[known], score[known]))
    if keep is not None:
        result["f1"] = float(f1_score(wrong, ~np.asarray(keep, dtype=bool)))
    return result
