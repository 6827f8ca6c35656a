"""Strategies that choose once an epoch: what they keep, by hand, and the batches that are made of it."""

from functools import partial

import pytest
import torch

from hf_mimic.dissect import tie_keys
from hf_mimic.subsets import KEEPERS, EpochSignals, SubsetBatchSampler

SIZE = 100
IDS = torch.arange(1000, 1000 + SIZE)
LOSSES = torch.linspace(0, 1, SIZE)[torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))]


def signals(epoch, losses=LOSSES, reference=None):
    reference = torch.full((SIZE,), torch.nan) if reference is None else reference
    return EpochSignals(epoch, losses, reference, tie_keys(IDS, seed=0, epoch=epoch))


def keep(name, epoch, *, rate=0.6, epochs=16, **more):
    return KEEPERS[name](signals(epoch, **more), rate=rate, epochs=epochs)


def test_a_random_share_is_another_one_each_epoch():
    (first, none), (second, _) = keep("random", 0), keep("random", 1)
    assert first.sum() == second.sum() == 60
    assert not torch.equal(first, second)
    assert torch.equal(first, keep("random", 0)[0])
    assert none is None


@pytest.mark.parametrize("name", ["ref_clip_score", "ref_clip_loss"])
def test_a_coreset_is_the_best_by_the_reference(name):
    kept, _ = keep(name, 3, reference=LOSSES)
    assert torch.equal(kept, keep(name, 9, reference=LOSSES)[0])
    assert LOSSES[kept].min() > LOSSES[~kept].max()


def test_scan_drops_both_ends_ever_more_and_starts_again():
    """With rate .7 the candidates are the 30 easiest and the 30 hardest; the cosine is 0, .25, .75, 1."""
    kept = [keep("scan", epoch, rate=0.7)[0] for epoch in range(5)]
    assert [int(mask.sum()) for mask in kept] == [100, 85, 55, 40, 100]
    gone = LOSSES[~kept[3]].sort().values
    assert gone[29] < 0.3 < 0.7 < gone[30]
    assert sum(int(mask.sum()) for mask in kept[:4]) == 4 * 70


def test_scan_keeps_a_tenth_at_the_least():
    assert int(keep("scan", 3, rate=0.3)[0].sum()) == 10


def test_scan_and_info_batch_keep_what_has_no_loss_yet():
    unknown = torch.full((SIZE,), torch.nan)
    for name in ("scan", "info_batch"):
        assert keep(name, 3, losses=unknown)[0].all()
        half = LOSSES.where(torch.arange(SIZE) < 50, torch.nan)
        assert keep(name, 3, losses=half)[0][50:].all()


def test_info_batch_drops_some_of_what_is_below_the_mean():
    """50 of 100 are at the mean or below, 20 of them go: the others count 50 / 30."""
    kept, importance = keep("info_batch", 3, rate=0.8)
    assert int((~kept).sum()) == 20
    assert LOSSES[~kept].max() <= LOSSES.mean()
    assert importance[kept & (LOSSES <= LOSSES.mean())].tolist() == pytest.approx([50 / 30] * 30)
    assert set(importance[LOSSES > 0.51].tolist()) == {1.0}
    assert (importance * kept).sum() == pytest.approx(SIZE, rel=1e-6)  # unbiased


def test_info_batch_raises_the_bound_for_a_small_rate():
    """.7 is more than three quarters of a half: the bound becomes the quantile of which three quarters are .7."""
    kept, importance = keep("info_batch", 3, rate=0.3)
    assert int(kept.sum()) == 30
    assert LOSSES[~kept].max() > 0.8
    assert importance.max() == pytest.approx(4.0, rel=0.1)
    assert (importance * kept).sum() == pytest.approx(SIZE, rel=1e-6)


def test_info_batch_ends_on_everything():
    assert [bool(keep("info_batch", epoch)[0].all()) for epoch in (13, 14, 15)] == [False, True, True]


# ---- batches -------------------------------------------------------------------------------------------------------


def sampler(name, *, size=SIZE, batch=16, rate=0.6, drop_last=False):
    keeper = partial(KEEPERS[name], rate=rate, epochs=16)
    order = torch.utils.data.SequentialSampler(range(size))
    return SubsetBatchSampler(order, batch, keeper=keeper, sample_ids=IDS[:size], drop_last=drop_last)


def test_every_epoch_has_as_many_batches():
    batches = list(sampler("random"))
    assert len(batches) == 7 == -(-SIZE // 16)
    assert [len(batch) for batch in batches] == [9] * 6 + [6]
    assert len(list(sampler("random", drop_last=True))) == 6


def test_an_epoch_on_everything_is_that_of_a_plain_loader():
    batches = list(sampler("info_batch"))
    assert [index for batch in batches for index in batch] == list(range(SIZE))
    assert [len(batch) for batch in batches] == [16] * 6 + [4]


def test_what_was_chosen_stays_chosen_in_the_epoch():
    ours = sampler("info_batch")
    ours.update(IDS, LOSSES)
    ours.set_epoch(3)
    before = list(ours)
    ours.update(IDS, 1 - LOSSES)
    assert list(ours) == before
    assert ours.importance(IDS[:3]) is not None
    again = sampler("info_batch")
    again.load_state_dict(ours.state_dict())
    again.set_epoch(3)
    assert list(again) == before
    again.set_epoch(4)
    assert list(again) != before


def test_a_loss_that_is_not_finite_is_not_noted():
    ours = sampler("scan")
    ours.update(IDS[:2], torch.tensor([1.0, 2.0]))
    ours.update(IDS[:2], torch.tensor([torch.nan, 3.0]))
    assert ours.history.lookup(IDS[:2])["loss"].tolist() == [1.0, 3.0]
