"""DISSect's rule: by hand, against a dict, over processes, and what would go wrong otherwise."""

import numpy as np
import pytest
import torch
from oracles import DissectByHand, tie_key_by_hand

from hf_mimic.dissect import DISSect, keep_count, tie_keys, top

NAN = torch.nan


def ids_of(*values):
    return torch.tensor(values)


def scores_of(*values):
    return torch.tensor(values, dtype=torch.float32)


def rule_with(history, **options):
    """Return a rule after its warm-up, with a history by id."""
    rule = DISSect(**options)
    rule.update(ids_of(*history), scores_of(*history.values()))
    rule.set_epoch(1)
    return rule


def history_of(rule, *ids):
    return rule.history.lookup(ids_of(*ids))["history"].tolist()


# ---- pieces --------------------------------------------------------------------------------------------------------


def test_tie_keys_are_a_hash_of_the_id():
    ids = [0, 1, 2, -1, 2**63 - 1, -(2**63), 123456789]
    for seed, epoch in ((0, 0), (0, 1), (7, 3), (2**40, 5), (~3, 2)):
        keys = tie_keys(ids_of(*ids), seed=seed, epoch=epoch)
        assert keys.tolist() == [tie_key_by_hand(i, seed, epoch) for i in ids]
    order = torch.randperm(1000)
    keys = tie_keys(torch.arange(1000), seed=1, epoch=2)
    assert torch.equal(tie_keys(order, seed=1, epoch=2), keys[order])
    assert len(keys.unique()) == 1000


def test_tie_keys_look_random():
    keys = tie_keys(torch.arange(10_000), seed=0, epoch=0)
    assert abs((keys > 0).float().mean() - 0.5) < 0.02
    first, second = (tie_keys(torch.arange(10_000), seed=0, epoch=e).argsort().argsort().double() for e in (1, 2))
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("size", "rate", "count"),
    [(10, 0.7, 7), (100, 0.29, 29), (10, 0.3, 3), (5, 0.5, 2), (1, 0.5, 1), (3, 0.1, 1), (8, 1.0, 8)],
)
def test_how_many_are_kept(size, rate, count):
    assert keep_count(size, rate) == count


def test_top_is_in_order_and_puts_nan_last():
    keys = ids_of(5, 4, 3, 2, 1)
    assert top(scores_of(1, 3, 2, 3, 0), keys, 2).tolist() == [1, 3]
    assert top(scores_of(0, 0, -0.0, 0, 0), keys, 2).tolist() == [3, 4]  # the smallest keys
    assert top(scores_of(NAN, -torch.inf, 1, NAN, torch.inf), keys, 3).tolist() == [1, 2, 4]
    assert top(scores_of(1, 2), ids_of(0, 0), 5).tolist() == [0, 1]


# ---- the rule by hand ----------------------------------------------------------------------------------------------


def test_the_largest_fall_is_kept():
    rule = rule_with({10: 30.0, 11: 20.0, 12: 25.0, 13: 40.0})
    # history - current: 5, -10, 1, -2
    assert rule.choose(ids_of(10, 11, 12, 13), scores_of(25, 30, 24, 42)).tolist() == [0, 2]


def test_warmup_keeps_its_last_score_as_history():
    rule = DISSect(variant="warmup", warmup_epochs=2)
    for epoch, score in enumerate([10.0, 20.0, 30.0, 5.0]):
        rule.set_epoch(epoch)
        rule.update(ids_of(1), scores_of(score))
    assert history_of(rule, 1) == [20.0]
    rule.update(ids_of(2), scores_of(7))  # first seen after the warm-up
    rule.update(ids_of(2), scores_of(9))
    assert history_of(rule, 2) == [7.0]


def test_momentum_is_a_running_mean_from_the_first_score_on():
    rule = DISSect(variant="momentum", momentum=0.9)
    for score in (10.0, 20.0, 0.0):
        rule.update(ids_of(1), scores_of(score))
    assert history_of(rule, 1) == pytest.approx([0.9 * 11.0])


def test_deltas_of_visits_are_kept_for_later():
    rule = DISSect(variant="momentum", momentum=0.5)
    for epoch, score in enumerate([10.0, 4.0]):
        rule.set_epoch(epoch)
        rule.update(ids_of(1), scores_of(score))
        found = rule.history.lookup(ids_of(1))
        assert found["epoch"].item() == epoch
        assert found["delta"].isnan().item() == (epoch == 0)  # the first visit has nothing to compare with
    assert found["delta"].item() == 6.0  # with the history before the visit


def test_an_unseen_id_takes_the_median_delta():
    rule = rule_with({0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}, selection_rate=0.6)
    # deltas 5, -1, -3, -9, unseen: -2, the third of five
    assert rule.choose(ids_of(0, 1, 2, 3, 99), scores_of(-5, 1, 3, 9, 50)).tolist() == [0, 1, 4]
    assert rule.choose(ids_of(0, 1, 2, 3, 99), scores_of(-5, 1, 1.5, 9, 50)).tolist() == [
        0,
        1,
        4,
    ]  # between -1 and -1.5


def test_scores_that_are_not_finite_come_last_and_are_not_kept():
    rule = rule_with({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0})
    bad = scores_of(NAN, 50, torch.inf, 60)
    assert rule.choose(ids_of(0, 1, 2, 3), bad).tolist() == [1, 3]
    rule.set_epoch(0)
    rule.update(ids_of(0, 1, 2, 3, 4), scores_of(NAN, 50, -torch.inf, 60, NAN))
    found = rule.history.lookup(ids_of(0, 1, 2, 3, 4))
    assert found["history"].nan_to_num(-1).tolist() == [1, 50, 1, 60, -1]
    assert found["epoch"].nan_to_num(-1).tolist() == [0, 0, 0, 0, -1]


def test_padded_rows_are_chosen_only_if_there_are_not_enough_others():
    rule = rule_with({0: 50.0, 1: 0.0, 2: 0.0, 3: 0.0})
    ids, scores = ids_of(0, 1, 2, 0), scores_of(0, 0, NAN, 0)
    for valid, kept in (([1, 1, 1, 0], [0, 1]), ([0, 1, 1, 0], [1, 2]), ([1, 0, 0, 0], [0]), ([0, 0, 1, 0], [2])):
        found = rule.choose(ids, scores, valid=torch.tensor(valid, dtype=torch.bool)).tolist()
        assert len(found) == 2
        assert set(kept) <= set(found)


def test_padded_rows_do_not_move_the_median():
    rule = rule_with({0: 0.0, 1: 0.0, 2: 0.0}, selection_rate=0.4)
    ids, scores = ids_of(0, 1, 99, 2, 2), scores_of(-4, 4, 0, -9, -9)  # deltas 4, -4, unseen, 9, 9
    assert rule.choose(ids, scores, valid=torch.tensor([True, True, True, False, False])).tolist() == [0, 2]


def test_an_empty_batch():
    rule = rule_with({0: 1.0})
    none = torch.arange(0)
    assert rule.choose(none, none.float()).tolist() == []
    rule.update(none, none.float())
    assert len(rule.history) == 1


def test_choosing_changes_nothing():
    rule = rule_with({0: 1.0, 1: 2.0})
    before = rule.history.state_dict()
    rule.choose(ids_of(0, 1, 5), scores_of(3, 4, 5))
    after = rule.history.state_dict()
    assert all(torch.equal(before[name].nan_to_num(-7), after[name].nan_to_num(-7)) for name in before)


def test_warming_up():
    full, selected, momentum = (DISSect(**o) for o in ({}, {"warmup_data": "selected"}, {"variant": "momentum"}))
    ids, scores = torch.arange(6), torch.zeros(6)
    assert [full.warming_up, selected.warming_up, momentum.warming_up] == [True, True, False]
    assert full.choose(ids, scores).tolist() == list(range(6))
    assert len(selected.choose(ids, scores)) == len(momentum.choose(ids, scores)) == 3
    full.set_epoch(1)
    assert len(full.choose(ids, scores)) == 3


# ---- ties ----------------------------------------------------------------------------------------------------------


def test_ties_are_settled_by_seed_epoch_and_id():
    ids, scores = torch.arange(100), torch.zeros(100)

    def chosen(seed, epoch, order=None):
        rule = DISSect(variant="momentum", seed=seed)
        rule.set_epoch(epoch)
        order = torch.arange(100) if order is None else order
        return set(ids[order][rule.choose(ids[order], scores)].tolist())

    assert chosen(0, 0) == chosen(0, 0, torch.randperm(100))
    assert len({frozenset(chosen(s, e)) for s in range(3) for e in range(3)}) == 9
    assert chosen(0, 0) != set(range(50))  # not simply the first
    often = sum(torch.bincount(torch.tensor(sorted(chosen(s, 0))), minlength=100) for s in range(200))
    assert often.min() > 60
    assert often.max() < 140


# ---- against a dict ------------------------------------------------------------------------------------------------


def stream(seed, epochs=5, size=53, batch=16):
    """Yield (epoch, ids, scores): shuffled batches, a short last one, new ids in every epoch, ties, NaN."""
    generator = np.random.default_rng(seed)
    pool = generator.integers(-(2**63), 2**63 - 1, 120)
    for epoch in range(epochs):
        ids = generator.permutation(pool[: 60 + 15 * epoch])[:size]
        scores = np.round(generator.normal(20 + 3 * epoch, 6, size)).clip(0).astype(np.float32)
        scores[generator.random(size) < 0.03] = np.nan
        for start in range(0, size, batch):
            yield epoch, ids[start : start + batch], scores[start : start + batch]


def differences(rule, oracle, *, update_first=False):
    """Return in how many batches the rule and the oracle choose other samples, and how many there are."""
    different, batches = 0, 0
    for epoch, ids, scores in stream(seed=1):
        rule.set_epoch(epoch)
        given = torch.from_numpy(ids), torch.from_numpy(scores)
        if update_first:
            rule.update(*given)
        found = rule.choose(*given).tolist()
        if not update_first:
            rule.update(*given)
        expected = oracle.choose(ids.tolist(), scores, epoch)
        oracle.update(ids.tolist(), scores, epoch)
        assert len(found) == len(expected)
        different, batches = different + (found != expected), batches + 1
    if not update_first:
        assert rule.history.lookup(torch.tensor(list(oracle.history)))["history"].tolist() == list(
            oracle.history.values()
        )
    return different, batches


@pytest.mark.parametrize("rate", ["0.3", "0.5", "0.7", "1.0"])
@pytest.mark.parametrize(
    "options",
    [
        {"variant": "momentum"},
        {"variant": "momentum", "momentum": 0.0, "seed": 5},
        {"variant": "warmup"},
        {"variant": "warmup", "warmup_epochs": 2, "warmup_data": "selected", "seed": 3},
    ],
)
def test_choices_of_five_epochs_are_those_of_a_dict(rate, options):
    assert differences(DISSect(float(rate), **options), DissectByHand(rate, **options)) == (0, 20)


@pytest.mark.parametrize("variant", ["momentum", "warmup"])
def test_other_rules_choose_other_samples(variant):
    """A history that starts at 0 as in the official code, and an update before the choice."""
    zero, _ = differences(DISSect(variant=variant), DissectByHand("0.5", variant, start=0.0))
    early, _ = differences(DISSect(variant=variant), DissectByHand("0.5", variant), update_first=True)
    assert zero >= 4
    assert early >= 4


# ---- order and processes -------------------------------------------------------------------------------------------


def states_differ(a, b):
    a, b = a.state_dict()["scores"], b.state_dict()["scores"]
    return any(not torch.equal(a[name].nan_to_num(-7), b[name].nan_to_num(-7)) for name in a)


@pytest.mark.parametrize("variant", ["momentum", "warmup"])
def test_the_order_of_batches_does_not_change_the_history(variant):
    one, other = DISSect(variant=variant), DISSect(variant=variant)
    for epoch in range(3):
        scores, order = torch.randn(60), torch.randperm(60)
        for rule, rows in ((one, torch.arange(60)), (other, order)):
            rule.set_epoch(epoch)
            for batch in rows.split(7):
                rule.update(batch, scores[batch])
    assert not states_differ(one, other)


@pytest.mark.parametrize("variant", ["momentum", "warmup"])
def test_processes_agree_if_they_learn_the_scores_of_all(variant):
    shared, alone = [DISSect(variant=variant) for _ in range(2)], [DISSect(variant=variant) for _ in range(2)]
    for epoch in range(3):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch))
        for batch in order.view(-1, 2, 8):
            scores = torch.randn(2, 8)
            for rank in range(2):
                shared[rank].set_epoch(epoch)
                alone[rank].set_epoch(epoch)
                shared[rank].update(batch.flatten(), scores.flatten())
                alone[rank].update(batch[rank], scores[rank])
    assert not states_differ(*shared)
    assert states_differ(*alone)
    known = alone[0].history.lookup(torch.arange(64))["history"].isfinite()
    assert not known.all()  # a process never sees some of the samples


def test_a_repeated_id_moves_the_history_once():
    rule = rule_with({1: 10.0}, variant="momentum", momentum=0.5)
    rule.update(ids_of(1, 1), scores_of(20, 20))
    assert history_of(rule, 1) == [15.0]


def test_a_rule_goes_on_from_its_state():
    rule, again = DISSect(variant="momentum"), DISSect(variant="momentum")
    for epoch, ids, scores in stream(seed=2, epochs=3):
        rule.set_epoch(epoch)
        rule.update(torch.from_numpy(ids), torch.from_numpy(scores))
    again.load_state_dict(rule.state_dict())
    assert again.epoch == 2
    ids, scores = torch.from_numpy(ids), torch.randn(len(ids))
    assert torch.equal(rule.choose(ids, scores), again.choose(ids, scores))
    assert not states_differ(rule, again)


# ---- misuse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection_rate": 1.5}, r"`selection_rate` must be in \(0, 1\], got 1.5. Use 1.0 to train on every sample."),
        ({"selection_rate": 0.0}, r"`selection_rate` must be in \(0, 1\], got 0.0"),
        (
            {"variant": "warm_up"},
            "`variant` must be one of 'warmup', 'momentum', got 'warm_up'. Did you mean 'warmup'?",
        ),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\), got 1.0"),
        ({"warmup_epochs": 0}, '`warmup_epochs` must be a whole number >= 1 with variant="warmup", got 0'),
        ({"warmup_epochs": 1.5}, "`warmup_epochs` must be a whole number >= 1"),
        ({"variant": "momentum", "warmup_epochs": -1}, "`warmup_epochs` must be a whole number >= 0"),
        ({"warmup_data": "all"}, "`warmup_data` must be one of 'full', 'selected', got 'all'"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DISSect(**options)


def test_ids_and_scores_that_do_not_fit():
    rule = DISSect()
    for use in (rule.choose, rule.update):
        with pytest.raises(
            ValueError, match=r"`scores` must have one score per id, got shape \(2,\) for ids of shape \(3,\)"
        ):
            use(torch.arange(3), torch.zeros(2))
        with pytest.raises(TypeError, match="sample ids must be an integer tensor"):
            use(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="`epoch` must be a whole number >= 0, got -1"):
        rule.set_epoch(-1)


def test_a_repeated_row_without_a_score_does_not_undo_the_other():
    """A padded row has the id of a sample that is in the same batch."""
    rule = DISSect(variant="momentum", momentum=0.5)
    rule.update(torch.tensor([7, 8]), torch.tensor([10.0, 20.0]))
    rule.update(torch.tensor([7, 8, 7]), torch.tensor([30.0, 40.0, torch.nan]))
    assert rule.history.lookup(torch.tensor([7, 8]))["history"].tolist() == [20.0, 30.0]
