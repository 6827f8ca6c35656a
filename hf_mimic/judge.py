"""P(the label is right) for every sample of a data set, from a `LabelNoiseModel` that was fitted on all or some of them.

A judge that was fitted once is kept in a file: shards of a data set that are scored apart then judge alike.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import numpy as np

from hf_mimic.files import write_atomically
from hf_mimic.trust import LabelNoiseModel, agrees_beyond_chance


class LabelJudge:
    """The fitted noise of the labels, if the reference is a judge of them at all.

    Args:
        model: Fitted; None for no judgement, which gives no trust.
    """

    def __init__(self, model: LabelNoiseModel | None) -> None:
        self.model = model

    @property
    def noise_rate(self) -> float | None:
        """Return the estimated share of wrong labels."""
        return None if self.model is None else self.model.noise_rate_

    @classmethod
    def fit(cls, log_probs: np.ndarray, labels: np.ndarray) -> LabelJudge:
        """Fit the noise, with a warning if predictions and labels agree no more than by chance.

        Args:
            log_probs: The reference's log-probabilities (N, C), each sample once.
            labels: Given labels (N,); others than 0 .. C - 1 are left out.
        """
        labelled = _labelled(log_probs, labels)
        z, y = log_probs[labelled], labels[labelled]
        if not len(y):
            return cls(None)
        if agrees_beyond_chance(z, y):
            return cls(LabelNoiseModel().fit(z, y))
        warnings.warn(
            f"the reference agrees with {(z.argmax(1) == y).mean():.0%} of {len(y)} labels, no "
            "more than chance: it is no judge of them, and there is no trust. Look at the order of the labels, at how "
            'images are preprocessed, and at the reference\'s accuracy. Without a trust, strategy="trust" weighs all alike.'
        )
        return cls(None)

    def trust(self, log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return P(the label is right) (B,), NaN where it is not known.

        Args:
            log_probs: (B, C).
            labels: (B,).
        """
        found = np.full(len(labels), np.nan)
        if self.model is not None:
            labelled = _labelled(log_probs, labels)
            found[labelled] = self.model.predict_proba(log_probs[labelled], labels[labelled])
        return found

    def save(self, path: Path) -> None:
        """Write what was fitted, whole or not at all."""
        model = self.model
        known = {} if model is None else {name: getattr(model, name) for name in _FITTED}
        write_atomically(path, lambda file: np.savez(file, **known))

    @classmethod
    def load(cls, path: Path) -> LabelJudge | None:
        """Read what `save` wrote; None if there is no whole file."""
        try:
            with open(path, "rb") as file, np.load(file) as known:
                if not known.files:
                    return cls(None)
                model = LabelNoiseModel()
                for name in _FITTED:
                    setattr(model, name, known[name] if known[name].ndim else float(known[name]))
                return cls(model)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None


_FITTED = ("beta_", "transition_", "noise_rate_")


def _labelled(log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return (labels >= 0) & (labels < log_probs.shape[1]) & np.isfinite(log_probs).all(1)
