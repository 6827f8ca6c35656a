"""The online softmax against the softmax over everything at once, with made-up gradients and processes."""

import functools

import pytest
import torch

from hf_mimic.weights import OnlineSoftmax, Weighed


def draw(sizes, scale, seed=0):
    """Return log-weights, losses, scores and gradients (n, 3) of every process's micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            (
                scale * torch.randn(n, generator=generator, dtype=torch.float64),
                torch.rand(n, generator=generator, dtype=torch.float64),
                torch.randn(n, generator=generator, dtype=torch.float64),
                torch.randn(n, 3, generator=generator, dtype=torch.float64),
            )
            for n in process
        ]
        for process in sizes
    ]


def sent(softmax, visit):
    """Return what a process would send to the others at a micro-batch."""
    copy, rows = OnlineSoftmax(softmax.processes), []
    copy.__dict__.update(softmax.__dict__)
    copy.add(Weighed(*visit[:3]), gather=lambda row: rows.append(row) or row[None])
    return rows[0]


def accumulate(batches, average_at, *, use_factor=True):
    """Play P processes that accumulate gradients and average them at some micro-batches; return theirs and softmaxes."""
    count = len(batches)
    softmaxes = [OnlineSoftmax(count) for _ in batches]
    gradients = [torch.zeros(3, dtype=torch.float64) for _ in batches]
    for k in range(len(batches[0])):
        rows = [sent(s, process[k]) for s, process in zip(softmaxes, batches, strict=True)] if k in average_at else []
        gather = functools.partial(torch.stack, rows) if rows else None
        for p, (softmax, process) in enumerate(zip(softmaxes, batches, strict=True)):
            logits, losses, scores, per_sample = process[k]
            weights, factor = softmax.add(
                Weighed(logits, losses, scores), gather=gather and (lambda _, all=gather: all())
            )
            if factor is not None and use_factor:
                gradients[p] = gradients[p] * factor
            gradients[p] = gradients[p] + weights @ per_sample
        if k in average_at:
            gradients = [sum(gradients) / count] * count
    return gradients, softmaxes


def everything(batches):
    return [torch.cat(parts) for parts in zip(*(visit for process in batches for visit in process), strict=True)]


SIZES = {
    "one batch": [[16]],
    "accumulated": [[4, 4, 4, 4]],
    "two processes": [[8], [8]],
    "two by two": [[4, 4], [4, 4]],
    "uneven": [[5, 1, 3], [2, 7, 1], [1, 1, 1]],
    "nothing in places": [[0, 4, 2], [3, 0, 0]],
}


@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
@pytest.mark.parametrize("averages", ["last", "every", "some"])
@pytest.mark.parametrize("name", SIZES)
def test_the_accumulated_gradient_is_that_of_one_softmax(name, averages, scale):
    batches = draw(SIZES[name], scale)
    last = len(SIZES[name][0]) - 1
    average_at = {"last": {last}, "every": set(range(last + 1)), "some": {0, last}}[averages]
    gradients, softmaxes = accumulate(batches, average_at)
    logits, losses, scores, per_sample = everything(batches)
    weights = torch.softmax(logits, 0)
    for gradient in gradients:
        torch.testing.assert_close(gradient, weights @ per_sample, rtol=1e-10, atol=1e-14)
    sums = softmaxes[0].sums
    torch.testing.assert_close(sums.weighted_loss / sums.weight, weights @ losses)
    torch.testing.assert_close(sums.weighted_score / sums.weight, weights @ scores)
    torch.testing.assert_close(sums.weighted_absolute_score / sums.weight, weights @ scores.abs())
    torch.testing.assert_close(sums.effective_sample_size, 1 / weights.square().sum())
    torch.testing.assert_close(sums.signal_variance, scores.var())
    assert (sums.count, sums.negative) == (len(scores), (scores < 0).sum())
    torch.testing.assert_close(sums.loss, losses.sum())
    parts = [softmax.normalise(v[0]) for softmax, p in zip(softmaxes, batches, strict=True) for v in p]
    torch.testing.assert_close(torch.cat(parts), weights)


def test_the_factor_matters():
    batches = draw(SIZES["accumulated"], 1.0)
    logits, _, _, per_sample = everything(batches)
    gradients, _ = accumulate(batches, {3}, use_factor=False)
    assert not torch.allclose(gradients[0], torch.softmax(logits, 0) @ per_sample, rtol=1e-2)


def test_equal_weights_are_those_of_the_mean_to_the_last_bit():
    """Dividing by 3 and then halving is what a plain Trainer does with two micro-batches of three."""
    softmax, zeros = OnlineSoftmax(), torch.zeros(3)
    weights, factor = softmax.add(Weighed(zeros, zeros, zeros))
    assert (weights == torch.tensor(1 / 3)).all()
    assert factor is None
    weights, factor = softmax.add(Weighed(zeros, zeros, zeros), gather=lambda row: row[None])
    assert (weights == torch.tensor(1 / 6)).all()
    assert factor == 0.5


def test_a_step_without_samples_has_no_gradient():
    softmax, none = OnlineSoftmax(), torch.zeros(0)
    softmax.add(Weighed(none, none, none))
    weights, factor = softmax.add(Weighed(none, none, none), gather=lambda row: row[None])
    assert len(weights) == 0
    assert factor == 0
    assert softmax.sums.count == 0
    assert softmax.sums.weight == 0


def test_one_large_outlier_does_not_overflow():
    softmax, ones = OnlineSoftmax(), torch.ones(2)
    softmax.add(Weighed(torch.tensor([0.0, 1.0]), ones, ones))
    weights, factor = softmax.add(Weighed(torch.tensor([5e4, 0.0]), ones, ones), gather=lambda row: row[None])
    assert weights.tolist() == [1, 0]
    assert factor == 0


def test_equal_scores_have_no_variance():
    softmax, scores = OnlineSoftmax(), torch.full((50,), 0.7)
    softmax.add(Weighed(torch.zeros(50), scores, scores), gather=lambda row: row[None])
    assert softmax.sums.signal_variance == 0


def test_sums_before_a_gather():
    with pytest.raises(RuntimeError, match="known after a gather, got none yet"):
        OnlineSoftmax().sums  # noqa: B018
