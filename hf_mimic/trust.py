"""Trust: the probability that a sample's label is right, from what the reference predicts and how the sample behaved.

Read `LabelNoiseModel` (the reference's predictions against the given labels), then `combine` (the mimic score and the
loss as further evidence), then `most_f1` (a cut for it). No clean label is used anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from scipy.special import log_softmax, logsumexp, ndtri
from sklearn.base import BaseEstimator

_FITTED_ROWS = 20_000
_BLOCK = 1 << 13  # rows whose evidence is weighed at once: their arrays stay in the processor's cache
_ENOUGH_EVIDENCE = 100  # rows
_HIGHEST_CUT = 2 / 3
_FLOOR = 1e-6
_RAREST = 1e-7  # share of values beyond which normal scores are cut off


class LabelNoiseModel(BaseEstimator):
    """How labels came about: the reference predicts the true class, a noisy transition turns it into the given one.

        P(label = y | x) = sum_c softmax(beta z(x))_c T_cy

    The temperature 1 / beta of the reference's log-probabilities z and the transition T are fitted together, by maximum
    likelihood of the given labels (EM). So an overconfident or weak reference is found out by the labels themselves:
    its own errors are not taken for label noise. Rows of T are drawn toward symmetric noise where a class is rare.

    Args:
        iterations: At most so many EM steps.
        prior: How many samples of symmetric noise each class is thought to have had; None for C^2 / 20, between 5
            and 5 C: with few rows for each of C^2 confusions, a free transition would explain the reference's errors.
        seed: Chooses the rows that are fitted where there are more than 20,000 (fewer for more than 100 classes).

    References:
        Noise adaptation layers: Goldberger and Ben-Reuven, ICLR 2017; confident learning, arXiv 1911.00068.
    """

    def __init__(self, iterations: int = 200, prior: float | None = None, seed: int = 0) -> None:
        self.iterations, self.prior, self.seed = iterations, prior, seed

    def fit(self, log_probs: np.ndarray, labels: np.ndarray) -> LabelNoiseModel:
        """Fit `beta_`, `transition_` (C, C) and `noise_rate_`.

        Args:
            log_probs: The reference's log-probabilities (N, C).
            labels: Given labels (N,), in 0 .. C - 1.

        Raises:
            ValueError: If a value is not finite, a label is out of range, or there is no row.
        """
        log_probs, labels = np.asarray(log_probs), np.asarray(labels)
        rows = np.random.default_rng(self.seed).permutation(len(log_probs))[: fitted_rows(log_probs.shape[-1])]
        z, y = _checked(log_probs[rows], labels[rows] if len(labels) == len(log_probs) else labels)
        classes = z.shape[1]
        beta, transition = 1.0, _symmetric(classes, 0.2)
        prior = max(5.0, min(classes**2 / 20, 5.0 * classes)) if self.prior is None else self.prior
        before = -np.inf
        for _ in range(self.iterations):
            predicted = log_softmax(beta * z, axis=1)  # (N, C)
            joint = predicted + np.log(transition[:, y].T)
            likelihood = logsumexp(joint, axis=1, keepdims=True)
            posterior = np.exp(joint - likelihood)  # P(true class | x, y)
            beta = _better_beta(beta, z, np.exp(predicted), posterior)
            counts = np.stack([posterior[y == c].sum(0) for c in range(classes)], 1)  # (true, given)
            rate = 1 - np.trace(counts) / len(y)
            counts += prior * _symmetric(classes, np.clip(rate, 1e-3, 1 - 1e-3))
            transition = counts / counts.sum(1, keepdims=True)
            total = float(likelihood.mean())
            if abs(total - before) < 1e-6:
                break
            before = total
        self.beta_, self.transition_ = float(beta), np.clip(transition, _FLOOR / classes, None)
        self.noise_rate_ = float(1 - self.predict_proba(z, y).mean())
        return self

    def predict_proba(self, log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return P(the label is right) (N,)."""
        parts = range(0, len(labels), _FITTED_ROWS)
        found = [self._part(log_probs[i : i + _FITTED_ROWS], labels[i : i + _FITTED_ROWS]) for i in parts]
        return np.concatenate(found) if found else np.zeros(0)

    def _part(self, log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        z, labels = _checked(log_probs, labels)
        joint = log_softmax(self.beta_ * z, axis=1) + np.log(self.transition_[:, labels].T)
        own = np.take_along_axis(joint, labels[:, None], 1)[:, 0]
        return np.exp(own - logsumexp(joint, axis=1))


def fitted_rows(classes: int) -> int:
    """Return how many rows a `LabelNoiseModel` is fitted on at most."""
    return int(np.clip(2_000_000 / max(classes, 1), 5_000, _FITTED_ROWS))


def agrees_beyond_chance(log_probs: np.ndarray, labels: np.ndarray) -> bool:
    """Return whether predictions and labels agree more often than independent ones would, by 3 standard deviations.

    Where they do not, the reference is no judge of these labels, and a noise rate cannot be told from its errors.
    """
    predicted, labels = np.asarray(log_probs).argmax(1), np.asarray(labels)
    shares = [np.bincount(column, minlength=np.shape(log_probs)[1]) / len(labels) for column in (predicted, labels)]
    chance = float(shares[0] @ shares[1])
    return bool((predicted == labels).mean() - chance > 3 * np.sqrt(chance * (1 - chance) / len(labels)))


def combine(trust: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """Add evidence of any scale and sign to a trust: what it says is learned from the trust itself.

    A logistic regression on the evidence's normal scores, with the trust as soft label, gives log-odds that are added
    to the trust's own. Evidence that points the wrong way gets a negative coefficient, evidence that says nothing
    none.

    Args:
        trust: P(the label is right) (N,); NaN where it is not known.
        evidence: (N, K), for instance the mean mimic score and the negative mean loss; NaN where there is none.

    Returns:
        Trust (N,): as it was where there is no evidence (or less than 100 rows of it), NaN where it was.
    """
    trust, evidence = np.asarray(trust, float), np.asarray(evidence)
    evidence = evidence[:, np.isfinite(evidence).any(0)]
    there = np.isfinite(trust)
    for column in evidence.T:
        there &= np.isfinite(column)
    rows = None if there.all() else np.flatnonzero(there)  # None for all: there may be ten million
    size = len(trust) if rows is None else len(rows)

    def of(which: slice | np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
        index = which if rows is None else rows[which]
        return index, trust[index].clip(_FLOOR, 1 - _FLOOR), evidence[index].astype(float)

    if size < _ENOUGH_EVIDENCE or not evidence.shape[1] or not _differ(trust, evidence, there):
        return trust
    # (n,), n <= 20,000
    fitted = np.arange(size) if size <= _FITTED_ROWS else np.random.default_rng(0).choice(size, _FITTED_ROWS, False)
    _, soft, shown = of(fitted)
    normal = to_normal_scores(shown)
    result, odds = trust.copy(), learned_odds(soft, normal(shown))

    def weigh(start: int) -> None:
        index, known, seen = of(slice(start, start + _BLOCK))
        result[index] = with_odds(known, odds(normal(seen)))

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        list(pool.map(weigh, range(0, size, _BLOCK)))
    return result


def _differ(trust: np.ndarray, evidence: np.ndarray, there: np.ndarray) -> bool:
    """Return whether both trust and evidence have more than one value where they are known."""
    spans = [np.max(c, where=there, initial=-np.inf) - np.min(c, where=there, initial=np.inf) for c in evidence.T]
    known = (function(trust, where=there, initial=first) for function, first in ((np.max, 0.0), (np.min, 1.0)))
    highest, lowest = (np.clip(value, _FLOOR, 1 - _FLOOR) for value in known)
    return bool(highest - lowest >= 1e-3 and any(span > 0 for span in spans))


def learned_odds(trust: np.ndarray, evidence: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Learn from a trust what evidence says: a logistic regression with the trust as soft label.

    Args:
        trust: P(the label is right) (N,), without NaN.
        evidence: (N, K), without NaN.

    Returns:
        A function of evidence (B, K): the log-odds (B,) that it adds to the mean trust's.
    """
    from sklearn.linear_model import LogisticRegression

    soft = trust.clip(_FLOOR, 1 - _FLOOR)
    model = LogisticRegression().fit(
        np.tile(evidence, (2, 1)), np.repeat([1, 0], len(soft)), sample_weight=np.concatenate([soft, 1 - soft])
    )
    base = model.intercept_[0] - _logit(soft.mean())
    return partial(_line, model.coef_[0], base)  # a lambda could not be pickled


def _line(slope: np.ndarray, base: float, rows: np.ndarray) -> np.ndarray:
    return rows @ slope + base


def with_odds(trust: np.ndarray, odds: np.ndarray) -> np.ndarray:
    """Return the trust (N,) with log-odds (N,) added."""
    return 1 / (1 + np.exp(-(_logit(trust.clip(_FLOOR, 1 - _FLOOR)) + odds)))


def to_normal_scores(evidence: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Learn where values stand among those of each column.

    Args:
        evidence: (n, K), without NaN; K > 0.

    Returns:
        A function of evidence (B, K): the normal scores (B, K) of its ranks.
    """
    from sklearn.preprocessing import QuantileTransformer

    scale = QuantileTransformer(
        output_distribution="normal", n_quantiles=min(len(evidence), 300), random_state=0, subsample=_FITTED_ROWS
    )
    return partial(_normal_scores, scale.fit(evidence))


def _normal_scores(scale: Any, evidence: np.ndarray) -> np.ndarray:
    """Return what a fitted `QuantileTransformer` would, at a tenth of the time, and for values of any size alike.

    Its own `transform` takes whatever is within 1e-7 of the least value for the least.
    """
    found = np.empty_like(evidence)  # (B, K)
    ranks = scale.references_
    for k, quantiles in enumerate(scale.quantiles_.T):
        share = np.interp(evidence[:, k], quantiles, ranks)
        if (quantiles[1:] == quantiles[:-1]).any():  # equal values have the mean of their ranks
            share = (share - np.interp(-evidence[:, k], -quantiles[::-1], -ranks[::-1])) / 2
        found[:, k] = ndtri(share.clip(_RAREST, 1 - _RAREST))
    return found


def most_f1(trust: np.ndarray) -> float:
    """Return the trust below which samples must be rejected for the highest expected F1 of finding wrong labels.

    With calibrated probabilities this is 1 minus half of that F1; it is found from the sorted trust. It is never above
    2/3: where few labels are wrong, or the trust does not tell them, the highest F1 would reject almost everything.

    Args:
        trust: P(the label is right) (N,), without NaN; N > 0.

    References:
        Lipton et al., arXiv 1402.1892.
    """
    wrong = np.sort(1 - np.asarray(trust, float))[::-1]
    expected = 2 * np.cumsum(wrong) / (np.arange(1, len(wrong) + 1) + wrong.sum())
    return min(float(1 - expected.max() / 2), _HIGHEST_CUT)


def _better_beta(beta: float, z: np.ndarray, predicted: np.ndarray, posterior: np.ndarray) -> float:
    """Take a Newton step for beta on the concave E[log softmax(beta z)] under the posterior."""
    mean = (predicted * z).sum(1)
    slope = ((posterior * z).sum(1) - mean).sum()
    curvature = ((predicted * z**2).sum(1) - mean**2).sum()
    return float(np.clip(beta + slope / max(curvature, 1e-12), beta / 2, beta * 2).clip(1e-2, 1e2))


def _symmetric(classes: int, rate: float) -> np.ndarray:
    matrix = np.full((classes, classes), rate / max(classes - 1, 1))
    np.fill_diagonal(matrix, 1 - rate)
    return matrix


def _logit(p: np.ndarray) -> np.ndarray:
    return np.log(p) - np.log1p(-p)


def _checked(log_probs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    z, labels = np.asarray(log_probs, float), np.asarray(labels)
    if z.ndim != 2 or len(z) != len(labels) or not len(z):
        raise ValueError(f"`log_probs` must be (N, C) and `labels` (N,), N > 0, got {z.shape} and {labels.shape}.")
    if not np.isfinite(z).all():
        raise ValueError("`log_probs` must be finite, got NaN or infinity: the reference does not predict everything.")
    if labels.min() < 0 or labels.max() >= z.shape[1]:
        raise ValueError(
            f"`labels` must be in 0 .. {z.shape[1] - 1}, got {labels.min()} .. {labels.max()}. Map them to the "
            "reference's classes."
        )
    return z, labels
