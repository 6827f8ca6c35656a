"""Two groups among numbers: the exact two-means cut, a mixture of two Gaussians, and whether there are two at all.

Read `two_means`, then `Mixture`, then `has_two_groups`. Every function takes one row of finite numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_SAMPLE = 200_000  # values: in what modes are counted
_BLOCK = 1 << 15  # values, whose sums stay in the processor's cache
_FITTED = 20_000  # values: what a mixture is fitted to
_ENDS = (0.005, 0.995)
_FEWEST, _BINS, _REPEATS = 50, 512, 200
_ROUNDING = _SLACK = 1e-9


def two_means(values: np.ndarray) -> float | None:
    """Return the cut of the best split into two groups: halfway between their means.

    The split with the least sum of squares is one between neighbours in sorted order, so running sums find it exactly:
    one sort, no restarts. It lies at its own cut, as else one of the neighbours would better be in the other group; so
    only blocks of values are looked at whose ends and sums allow that.

    Args:
        values: (N,).

    Returns:
        The cut, so that the upper group is `values >= cut`; None where all values are equal.

    References:
        Fisher, JASA 53 (1958): in one dimension, groups of least variance are intervals.
    """
    ordered = np.sort(values)  # in its own precision: half the memory of float64 for float32
    if not len(ordered) or ordered[0] == ordered[-1]:
        return None
    shift = float(ordered[len(ordered) // 2])
    scale = max(float(ordered[-1]) - shift, shift - float(ordered[0]))  # squares of what is huge or tiny have no float
    size, starts = len(ordered), range(0, len(ordered), _BLOCK)
    sums = [float((ordered[i : i + _BLOCK].astype(float) - shift).sum()) for i in starts]
    below = np.cumsum([0.0, *sums])  # (blocks + 1,) of all that comes before a block
    best, split, low = -1.0, 0, 0.0
    for block in _with_cut(ordered, below, shift, _SLACK * scale):
        start = starts[block]
        part = ordered[start : min(start + _BLOCK, size - 1)].astype(float) - shift
        lower = np.arange(start + 1, start + len(part) + 1)
        gain = (size * (below[block] + np.cumsum(part)) - lower * below[-1]) / scale
        gain = gain**2 / (lower * (size - lower).astype(float))
        place = int(gain.argmax())
        if gain[place] > best:
            best, split = float(gain[place]), start + place + 1
            low = float(below[block] + part[: place + 1].sum()) / split
    return shift + (low + (float(below[-1]) - low * split) / (size - split)) / 2


def _with_cut(ordered: np.ndarray, below: np.ndarray, shift: float, slack: float) -> np.ndarray:
    """Return the blocks in which a split may lie at its own cut; cuts rise with the splits."""
    size = len(ordered)
    start = np.arange(0, size - 1, _BLOCK)  # of the last block, too, unless it is one value, after which none is split
    first, last = start + 1, np.minimum(start + _BLOCK, size - 1)  # sizes of the lower group
    least, most, end = (ordered[places].astype(float) - shift for places in (start, last, [-1]))
    sums = [below[: len(start)] + least, np.where(start + _BLOCK < size, below[1 : len(start) + 1], below[-1] - end)]
    cuts = [(s / k + (below[-1] - s) / (size - k)) / 2 for s, k in zip(sums, (first, last), strict=True)]
    return np.flatnonzero((least <= cuts[1] + slack) & (cuts[0] <= most + slack))


class Mixture(NamedTuple):
    """Two Gaussians, the lower first: weights, means and standard deviations, (2,) each."""

    weights: np.ndarray
    means: np.ndarray
    deviations: np.ndarray

    @classmethod
    def fit(cls, values: np.ndarray, seed: int = 0) -> Mixture | None:
        """Fit by scikit-learn's EM, to 20,000 of the values at most; None where all values are equal.

        It starts from the groups of `two_means`, so that no restart is needed.
        """
        from sklearn.mixture import GaussianMixture

        chosen = sampled(values, seed, _FITTED).astype(float)
        cut = two_means(chosen)
        if cut is None:
            return None
        spread = chosen.std()
        scaled = (chosen - chosen.mean()) / spread
        upper = chosen >= cut
        start = [[scaled[~upper].mean()], [scaled[upper].mean()]]
        precisions = [1 / max(scaled[group].var(), 1e-3) for group in (~upper, upper)]
        model = GaussianMixture(
            2,
            means_init=start,
            weights_init=[1 - upper.mean(), upper.mean()],
            precisions_init=np.reshape(precisions, (2, 1, 1)),
            random_state=seed,
            max_iter=300,
        )
        model.fit(scaled[:, None])
        order = model.means_[:, 0].argsort()
        deviations = np.sqrt(model.covariances_[order, 0, 0])
        return cls(model.weights_[order], model.means_[order, 0] * spread + chosen.mean(), deviations * spread)

    def cut(self, posterior: float = 0.5) -> float:
        """Return the value between the means from which on P(upper group | value) is at least `posterior`.

        NOTE: with unequal deviations the posterior turns around far outside the means: the wider group owns both
        tails. A score has a direction, so only the crossing between the means counts.
        """
        grid = np.linspace(self.means[0], self.means[1], 2_001)
        reached = self.posterior(grid) >= posterior
        return float(grid[reached.argmax()] if reached.any() else self.means[1])

    def posterior(self, values: np.ndarray) -> np.ndarray:
        """Return P(upper group | value) (N,)."""
        away = (np.asarray(values)[:, None] - self.means) / self.deviations  # (N, 2)
        log = np.log(self.weights / self.deviations) - away**2 / 2
        return 1 / (1 + np.exp(np.clip(log[:, 0] - log[:, 1], -700, 700)))


def sampled(values: np.ndarray, seed: int, size: int = _SAMPLE) -> np.ndarray:
    """Return so many of the values or rows at most, chosen by the seed (from many, some may come twice)."""
    values = np.asarray(values)
    return values[sampled_rows(len(values), seed, size)]


def sampled_rows(count: int, seed: int, size: int = _SAMPLE) -> slice | np.ndarray:
    """Return which rows of `count` these are."""
    return slice(None) if count <= size else np.random.default_rng(seed).integers(0, count, size)


def has_two_groups(values: np.ndarray, *, level: float = 0.02, seed: int = 0) -> bool:
    """Return whether there is evidence of more than one mode: Silverman's test.

    The smallest bandwidth at which a kernel density estimate has one mode is large where there are two groups. Samples
    from that estimate say how large: if hardly any of them (`level`) needs more smoothing, one mode is not enough.

    NOTE: groups that overlap so much that they leave no dent are not seen; 10 % wrong labels often are such. Half a
    per cent of the values at each end is left out: a few stray values are no group. The level holds for bell shapes and
    for mildly skewed ones. More pass of flat ones (of 5,000 uniform values half), of very heavy tails, and of values that
    are rounded to half a standard deviation.

    Args:
        values: (N,).
        level: Share of one-mode data sets that would pass for two groups.
        seed: Of the bootstrap.

    References:
        Silverman, JRSS B 43 (1981).
    """
    chosen = sampled(values, seed)
    low, high = np.quantile(chosen, _ENDS)
    if len(chosen) < _FEWEST or not high > low or not np.isfinite(high - low):
        return False
    counts = np.pad(np.histogram(chosen, _BINS, (low, high))[0], _BINS)  # room for what smoothing spreads
    width = _one_mode_width(counts.astype(float))
    place = np.arange(len(counts))
    mean = np.average(place, weights=counts)
    variance = np.average((place - mean) ** 2, weights=counts)
    density = _smooth(counts.astype(float), width)
    wider = mean + (place - mean) * np.sqrt(1 + width**2 / variance)  # smoothing adds to the variance: take it off
    density = np.interp(wider, place, density).clip(0)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(int(counts.sum()), density / density.sum(), size=_REPEATS)  # (repeats, bins)
    more = (_count_modes(_smooth(drawn, width)) > 1).sum()
    return bool(more <= level * _REPEATS)


def _one_mode_width(counts: np.ndarray) -> float:
    """Return the least width, in bins, at which the smoothed counts have one mode."""
    low, high = 0.5, float(_BINS)
    for _ in range(24):
        middle = float(np.sqrt(low * high))
        if _count_modes(_smooth(counts, middle)) > 1:
            low = middle
        else:
            high = middle
    return high


def _smooth(counts: np.ndarray, width: float) -> np.ndarray:
    """Return counts (..., bins) smoothed by a Gaussian of this width in bins."""
    frequencies = np.fft.rfftfreq(counts.shape[-1])
    spread = np.exp(-2 * (np.pi * frequencies * width) ** 2)
    return np.fft.irfft(np.fft.rfft(counts) * spread, counts.shape[-1])


def _count_modes(density: np.ndarray) -> np.ndarray:
    """Return how often densities (..., bins) go from rising to falling; what is rounding does not count."""
    steps = np.diff(density)
    steps[np.abs(steps) < _ROUNDING * density.max(-1, keepdims=True)] = 0.0
    rising = np.maximum.accumulate(
        np.where(steps != 0, np.arange(steps.shape[-1]), 0), -1
    )  # the last step that is one
    signs = np.sign(np.take_along_axis(steps, rising, -1))
    return ((signs[..., :-1] > 0) & (signs[..., 1:] < 0)).sum(-1)
