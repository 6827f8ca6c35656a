"""`DISSectBatchSampler`: both kinds of refresh, with DataLoader and accelerate, resumed, and fed with drifting scores."""

import copy
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, skip_first_batches
from accelerate.utils import DataLoaderConfiguration
from oracles import DissectByHand
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset

from hf_mimic import DISSectBatchSampler, samplers
from hf_mimic.dissect import DISSect

EXAMPLES = Path(__file__).parent.parent / "examples"
MOMENTUM, WARMUP, SELECTED = (
    {"variant": "momentum"},
    {"variant": "warmup"},
    {"variant": "warmup", "warmup_data": "selected"},
)


def shuffled(size, seed=0):
    return SeedableRandomSampler(range(size), data_seed=seed)


def rows(size):
    return [{"sample_id": i, "x": float(i)} for i in range(size)]


def flat(batches):
    """Return the indices of some batches (n,), int64."""
    return torch.tensor([i for batch in batches for i in batch], dtype=torch.int64)


def made_up_scores(ids, epoch):
    """Return scores (B,) that depend on sample and epoch alone."""
    return torch.sin(ids * 12.9898 + epoch * 78.233) * 20 + 5 * epoch


def train(sampler, epoch, batches=None):
    """Run one epoch, feeding back made-up scores; return its batches."""
    sampler.set_epoch(epoch)
    again = sampler.due()
    if again:
        indices = torch.tensor(again)
        sampler.update(sampler.sample_ids[indices], made_up_scores(indices, epoch - 0.3), rescored=True)
    taken = []
    for batch in sampler:
        taken.append(batch)
        ids = sampler.sample_ids[torch.tensor(batch)]
        sampler.update(ids, made_up_scores(torch.tensor(batch), epoch))
        if len(taken) == batches:
            break
    return taken


# ---- refresh="step" ------------------------------------------------------------------------------------------------


def test_step_yields_all_candidates():
    sampler = DISSectBatchSampler(SequentialSampler(range(10)), 4, selection_rate=0.5, variant="momentum")
    assert list(sampler) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert sampler.batch_size == sampler.candidate_batch_size == 4


def test_select_scores_chooses_and_then_takes_note():
    sampler = DISSectBatchSampler(
        range(4), 4, score_fn=lambda batch: batch["x"] * 1.0, variant="momentum", momentum=0.5
    )
    ids = torch.tensor([4, 5, 6, 7])
    sampler.update(ids, torch.tensor([9.0, 0.0, 5.0, 0.0]))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    batch = {
        "sample_id": ids,
        "x": x,
        "name": list("abcd"),
        "scale": torch.tensor(3.0),
        "pair": (1, 2),
        "task": "clip",
    }
    kept = sampler.select(batch)
    assert kept["sample_id"].tolist() == [4, 6]
    assert kept["x"].tolist() == [1.0, 3.0]
    assert kept["name"] == ["a", "c"]
    assert (kept["scale"].item(), kept["pair"], kept["task"]) == (3.0, (1, 2), "clip")
    assert sampler.rule.history.lookup(ids)["history"].tolist() == [5.0, 1.0, 4.0, 2.0]


def test_select_takes_note_of_what_all_processes_have():
    def gather(pair):
        ids, scores = pair
        return torch.cat([ids, ids + 100]), torch.cat([scores, scores + 1])

    sampler = DISSectBatchSampler(range(2), 2, score_fn=lambda batch: batch["x"], **WARMUP)
    sampler.select({"sample_id": torch.tensor([0, 1]), "x": torch.tensor([1.0, 2.0])}, gather=gather)
    assert sampler.rule.history.lookup(torch.tensor([0, 1, 100, 101]))["history"].tolist() == [1.0, 2.0, 2.0, 3.0]


def test_a_loop_with_workers_chooses_what_the_rule_by_hand_chooses():
    for workers in (0, 2):
        sampler = DISSectBatchSampler(shuffled(40), 16, score_fn=lambda batch: batch["score"], **MOMENTUM)
        loader = DataLoader(rows(40), batch_sampler=sampler, num_workers=workers)
        by_hand = DissectByHand("0.5", "momentum")
        for epoch in range(3):
            sampler.set_epoch(epoch)
            for batch in loader:
                ids, batch["score"] = batch["sample_id"], made_up_scores(batch["sample_id"], epoch)
                expected = by_hand.choose(ids.tolist(), batch["score"].numpy(), epoch)
                by_hand.update(ids.tolist(), batch["score"].numpy(), epoch)
                assert sampler.select(batch)["sample_id"].tolist() == ids[expected].tolist()


# ---- lengths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 8, 21, 24])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("refresh", ["step", "epoch"])
@pytest.mark.parametrize("rule", [MOMENTUM, WARMUP, SELECTED])
def test_lengths(size, drop_last, refresh, rule):
    sampler = DISSectBatchSampler(shuffled(size), 8, refresh=refresh, drop_last=drop_last, selection_rate=0.4, **rule)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        sampler.update(torch.arange(size), torch.randn(size))
        assert len(batches) == len(sampler) == (size // 8 if drop_last else -(-size // 8))
        assert sum(map(len, batches)) == sampler.samples_per_epoch
        full = 8 if refresh == "step" or (epoch == 0 and rule == WARMUP) else 3
        assert [len(batch) for batch in batches[: size // 8]] == [full] * (size // 8)
        assert sampler.batch_size in (None, full)


def test_candidates_are_drawn_when_they_are_needed():
    drawn = []
    for refresh in ("step", "epoch"):
        numbers = (drawn.append(i) or i for i in range(100))
        sampler = DISSectBatchSampler(numbers, 10, refresh=refresh, sample_ids=range(100), **MOMENTUM)
        batches = iter(sampler)
        assert drawn == []
        next(batches)
        assert drawn == list(range(10))
        drawn.clear()


# ---- refresh="epoch" -----------------------------------------------------------------------------------------------


def by_hand_epochs(sampler_order, size, batch, rate, rescored, epochs):
    """Yield the batches of refresh="epoch" after one epoch of warm-up, from deltas per sample in a dict.

    Args:
        sampler_order: epoch -> order of the indices.
        size: N.
        batch: B.
        rate: As text.
        rescored: epoch -> indices that are re-scored before it.
        epochs: How many.
    """
    rule = DissectByHand(rate, "warmup")
    history = made_up_scores(torch.arange(size), 0)
    deltas, centre, trained = (
        {},
        {},
        set(),
    )  # index -> (delta, epoch of measuring); epoch -> its mean; of the last epoch
    for epoch in range(1, epochs):
        measured = {i: (history - made_up_scores(torch.arange(size), epoch - 0.3))[i].item() for i in rescored(epoch)}
        if measured:
            share = len(trained) / size
            of_trained = np.mean([deltas[i][0] for i in trained])
            centre[epoch - 1] = share * of_trained + (1 - share) * np.mean(list(measured.values()))
        deltas |= {i: (delta, epoch - 1) for i, delta in measured.items()}
        value = {i: delta - centre.get(when, 0.0) for i, (delta, when) in deltas.items()}
        rule.history, trained, taken = {i: np.float32(v) for i, v in value.items()}, set(), []
        for start in range(0, size, batch):
            candidates = sampler_order(epoch)[start : start + batch]
            kept = rule.choose(candidates, np.zeros(len(candidates), np.float32), epoch)
            taken.append([candidates[i] for i in kept])
            trained |= set(taken[-1])
        deltas |= {i: ((history - made_up_scores(torch.arange(size), epoch))[i].item(), epoch) for i in trained}
        yield taken


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_epochs_are_chosen_by_the_last_delta_less_the_mean_of_its_epoch(share):
    sampler = DISSectBatchSampler(shuffled(50), 12, refresh="epoch", rescore_share=share, seed=0)
    due = {}

    def order(epoch):
        other = shuffled(50)
        other.set_epoch(epoch)
        return list(other)

    expected = by_hand_epochs(order, 50, 12, "0.5", lambda epoch: due[epoch], epochs=6)
    assert flat(train(sampler, 0)).sort().values.tolist() == list(range(50))
    for epoch in range(1, 6):
        sampler.set_epoch(epoch)
        due[epoch] = sampler.due()
        found, by_hand = train(sampler, epoch), next(expected)
        assert found == by_hand


def test_what_is_due():
    sampler = DISSectBatchSampler(shuffled(100), 20, refresh="epoch", rescore_share=0.1, sample_ids=np.arange(100) * 7)
    assert sampler.due() == []
    train(sampler, 0)
    sampler.set_epoch(1)
    assert sampler.due() == []  # the warm-up scored all
    first = set(flat(train(sampler, 1)).tolist())
    sampler.set_epoch(2)
    due = sampler.due()
    assert len(due) == 10
    assert due == sorted(set(due) - first)
    assert sampler.due() == due  # asking changes nothing
    sampler.rescore([])
    other = copy.deepcopy(sampler)
    other.rule.seed = 1
    assert other.due() != due
    next(iter(sampler))
    assert sampler.due() == []  # the epoch has begun


def test_rescore_feeds_the_scores_of_what_is_due():
    sampler = DISSectBatchSampler(shuffled(40), 10, refresh="epoch", score_fn=lambda batch: batch["x"] + 1, **MOMENTUM)
    train(sampler, 0)
    sampler.set_epoch(1)
    due = sampler.due()
    assert len(due) == 4
    sampler.rescore(DataLoader(Subset(rows(40), due), batch_size=3))
    found = sampler.rule.history.lookup(torch.tensor(due))
    assert found["history"].tolist() == [i + 1 for i in due]
    assert found["epoch"].tolist() == [0.5] * 4  # after epoch 0, before epoch 1
    list(sampler)
    sampler.set_epoch(1)
    with pytest.raises(ValueError, match="re-scoring must come before the first batch of its epoch, got epoch 1"):
        sampler.rescore(DataLoader(rows(2)))


def test_deltas_are_frozen_while_an_epoch_runs():
    """Scores that come before the epoch count in it, those that come in the middle do not."""

    def begun():
        sampler = DISSectBatchSampler(shuffled(60), 10, refresh="epoch", rescore_share=0.0, **MOMENTUM)
        train(sampler, 0)
        train(sampler, 1)
        sampler.set_epoch(2)
        return sampler

    early, late, never, other = begun(), begun(), begun(), torch.randn(60) * 50
    early.update(torch.arange(60), other)
    batches = iter(late)
    found = [next(batches)]
    late.update(torch.arange(60), other)
    found += list(batches)
    assert found == list(never)
    assert found != list(early)


def test_an_epoch_without_scores_is_told():
    sampler = DISSectBatchSampler(shuffled(20), 10, refresh="epoch", **MOMENTUM)
    list(sampler)
    with pytest.warns(
        UserWarning, match="DISSect has no scores of epoch 0, .* Give the scores of every training step"
    ):
        list(sampler)


def test_the_mean_delta_of_an_epoch_is_not_biased_by_the_choice():
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(4000, generator=generator) * 10 - 3
    trained = deltas.argsort(descending=True)[:1200]
    rest = deltas.argsort(descending=True)[1200:]
    deltas[rest[:500]] = torch.nan  # seen for the first time
    true = deltas.nanmean().item()
    estimates, naive = [], []
    for _ in range(200):
        again = rest[torch.randperm(len(rest), generator=generator)[:400]]
        times = torch.full((4000,), 3.0)
        times[trained], times[again] = 5.0, 5.5
        estimates.append(samplers._mean_delta(deltas, times, 5).item())
        naive.append(deltas[times >= 5].nanmean().item())
    assert abs(np.mean(estimates) - true) < 0.1
    assert abs(np.mean(naive) - true) > 3
    assert samplers._mean_delta(deltas, times.clamp_max(5.0), 5) == 0  # nothing was re-scored


def share_of_forgotten(monkeypatch, centred):
    """Return the share of forgotten samples chosen in the last epoch of a run in which all scores rise."""
    if not centred:
        monkeypatch.setattr(samplers, "_mean_delta", lambda *args: torch.zeros(()))
    sampler = DISSectBatchSampler(shuffled(400), 40, refresh="epoch", rescore_share=0.2, warmup_epochs=1)
    forgotten, generator = torch.arange(400) % 2 == 0, torch.Generator().manual_seed(0)

    def measure(indices, time):
        noise = torch.randn(len(indices), generator=generator)
        return 20 + 8 * time - 4 * forgotten[indices] * (time > 0) + noise

    for epoch in range(8):
        sampler.set_epoch(epoch)
        due = torch.tensor(sampler.due(), dtype=torch.int64)
        sampler.update(due, measure(due, epoch - 0.5), rescored=True)
        indices = flat(sampler)
        sampler.update(indices, measure(indices, epoch))
    return forgotten[indices].float().mean().item()


def test_a_rise_of_all_scores_does_not_hide_which_ones_fell_behind(monkeypatch):
    assert share_of_forgotten(monkeypatch, centred=True) > 0.85
    assert share_of_forgotten(monkeypatch, centred=False) < 0.7


# ---- epochs and checkpoints ----------------------------------------------------------------------------------------


def test_a_pass_that_ended_is_followed_by_the_next_epoch():
    sampler = DISSectBatchSampler(shuffled(20), 10, refresh="epoch")
    list(sampler)
    assert sampler.rule.epoch == 0  # the last batches are still being trained on
    sampler.update(torch.arange(20), torch.randn(20))
    assert [len(batch) for batch in sampler] == [5, 5]
    assert sampler.rule.epoch == 1
    sampler.update(torch.arange(20), torch.randn(20))
    next(iter(sampler))
    assert sampler.rule.epoch == 2
    next(iter(sampler))
    assert sampler.rule.epoch == 2  # that pass did not end
    sampler.set_epoch(2)
    sampler.set_epoch(2)
    assert sampler.sampler.epoch == 2


@pytest.mark.parametrize("rule", [MOMENTUM, WARMUP, SELECTED])
def test_a_run_resumed_in_mid_epoch_gets_the_same_batches(rule):
    def fresh():
        return DISSectBatchSampler(shuffled(90), 10, refresh="epoch", rescore_share=0.2, **rule)

    sampler = fresh()
    for epoch in range(3):
        train(sampler, epoch)
    head = train(sampler, 3, batches=4)
    buffer = io.BytesIO()
    torch.save(sampler.state_dict(), buffer)
    tail = list(sampler)[4:]
    for batch in tail:
        sampler.update(torch.tensor(batch), made_up_scores(torch.tensor(batch), 3))
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)

    again = fresh()
    again.load_state_dict(state)
    loader = skip_first_batches(DataLoader(rows(90), batch_sampler=again), 4)
    again.set_epoch(3)
    assert again.due() == []
    found = [batch["sample_id"].tolist() for batch in loader]
    assert found == tail
    for batch in found:
        again.update(torch.tensor(batch), made_up_scores(torch.tensor(batch), 3))
    assert [train(sampler, epoch) for epoch in (4, 5)] == [train(again, epoch) for epoch in (4, 5)]

    without = fresh()
    without.load_state_dict({**state, "frozen_epoch": -1})
    without.set_epoch(3)
    assert list(without) != head + tail  # the history has moved on since the epoch began


def test_the_state_of_another_data_set_is_refused():
    sampler = DISSectBatchSampler(shuffled(20), 10, refresh="epoch")
    list(sampler)
    with pytest.raises(ValueError, match="the state must be that of 21 samples, got one of 20"):
        DISSectBatchSampler(shuffled(21), 10, refresh="epoch").load_state_dict(sampler.state_dict())


# ---- accelerate ----------------------------------------------------------------------------------------------------


def test_a_prepared_loader_shuffles_and_tells_the_epoch():
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    sampler = DISSectBatchSampler(RandomSampler(rows(50)), 8, refresh="epoch", selection_rate=0.5)
    loader = accelerator.prepare(DataLoader(rows(50), batch_sampler=sampler))
    assert isinstance(sampler.sampler, SeedableRandomSampler)
    epochs = []
    for epoch in range(3):
        ids = torch.cat([batch["sample_id"] for batch in loader])
        assert sampler.rule.epoch == epoch
        sampler.update(ids, made_up_scores(ids, epoch))
        epochs.append(ids.tolist())
    assert sorted(epochs[0]) == list(range(50))
    assert len(set(epochs[1])) == len(epochs[1]) == 6 * 4 + 1
    assert epochs[1] != epochs[2]


CONFIGURATIONS = [
    {"refresh": "step", **WARMUP},
    {"refresh": "epoch", **MOMENTUM},
    {"refresh": "epoch", **SELECTED},
    {"refresh": "epoch", **WARMUP},
    {"refresh": "epoch", "drop_last": True, **WARMUP},
    {"refresh": "epoch", "drop_last": True, **MOMENTUM},
]


def two_processes(size, epochs=3, batch_size=(), **options):
    """Return for each epoch the batches without processes and those of each of two processes."""
    whole, *parts = (DISSectBatchSampler(shuffled(size), 8, selection_rate=0.4, **options) for _ in range(3))
    shards = [BatchSamplerShard(part, 2, rank) for rank, part in enumerate(parts)]
    for shard in shards:
        shard.batch_size = batch_size if batch_size != () else shard.batch_size
    found = []
    for epoch in range(epochs):
        for sampler in (whole, *parts):
            sampler.set_epoch(epoch)
        found.append((list(whole), [list(shard) for shard in shards]))
        for sampler in (whole, *parts):
            ids = torch.arange(size)
            sampler.update(ids, made_up_scores(ids, epoch))
    return found


@pytest.mark.parametrize("size", [5, 40, 43, 48, 53])
@pytest.mark.parametrize("options", CONFIGURATIONS)
def test_two_processes_get_as_many_batches_and_lose_no_sample(size, options):
    dropped = options.get("drop_last", False)
    for whole, (first, second) in two_processes(size, **options):
        assert len(first) == len(second)
        found = [batch for pair in zip(first, second, strict=True) for batch in pair]
        if dropped:
            assert found == whole[: len(whole) // 2 * 2]
        else:
            assert {i for batch in found for i in batch} == {i for batch in whole for i in batch}
            assert len({len(batch) for batch in found[:-2]}) <= 1
            assert len(first) == -(-len(whole) // 2)


@pytest.mark.parametrize("options", CONFIGURATIONS[:3])
def test_batches_of_one_size_are_filled_up_to_it(options):
    for _, processes in two_processes(53, **options):
        assert {len(batch) for batches in processes for batch in batches} == {8 if options["refresh"] == "step" else 3}


def test_a_fixed_size_would_lose_the_batches_after_a_full_warmup():
    for epoch, (whole, (first, second)) in enumerate(two_processes(48, batch_size=8, **CONFIGURATIONS[3])):
        lost = {i for batch in whole for i in batch} - {i for batch in first + second for i in batch}
        assert bool(lost) == (epoch > 0)


# ---- misuse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be a whole number >= 1, got 0"),
        ({"refresh": "batch"}, "`refresh` must be one of 'step', 'epoch', got 'batch'"),
        ({"rescore_share": 1.1}, r"`rescore_share` must be in \[0, 1\], got 1.1"),
        ({"selection_rate": 2}, r"`selection_rate` must be in \(0, 1\], got 2"),
        ({"refresh": "epoch"}, '`sample_ids` must be given with refresh="epoch" and a range, .* got none'),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DISSectBatchSampler(range(10), **{"batch_size": 4, **options})


def test_wrong_types():
    with pytest.raises(TypeError, match=r"`sample_ids` must be integers \(N,\), got torch.float32 of shape \(3,\)"):
        DISSectBatchSampler(range(3), 2, refresh="epoch", sample_ids=[0.5, 1.0, 2.0])
    with pytest.raises(TypeError, match="unexpected keyword argument 'selection'"):
        DISSectBatchSampler(range(3), 2, selection=0.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rule'"):
        DISSectBatchSampler(range(3), 2, rule=DISSect(), seed=1)
    rule = DISSect(0.25)
    assert DISSectBatchSampler(range(3), 2, rule=rule).rule is rule


def test_what_select_needs():
    batch = {"sample_id": torch.arange(2), "x": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"`score_fn` must be given to score batches, got none"):
        DISSectBatchSampler(range(2), 2).select(batch)
    sampler = DISSectBatchSampler(range(2), 2, score_fn=lambda batch: batch["x"][:1])
    with pytest.raises(ValueError, match=r"a batch must have `sample_id` \(B,\), got x"):
        sampler.select({"x": torch.zeros(2)})
    with pytest.raises(ValueError, match="`scores` must have one score per id"):
        sampler.select(batch)
    sampler = DISSectBatchSampler(range(2), 2, refresh="epoch", sample_ids=[0, 1])
    with pytest.raises(ValueError, match='`select` is for refresh="step", got refresh="epoch"'):
        sampler.select(batch)


# ---- the example ---------------------------------------------------------------------------------------------------


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield __import__("dissect_plain_loop").main
    del sys.modules["dissect_plain_loop"]


@pytest.mark.parametrize("refresh", ["step", "epoch"])
def test_the_example_runs(example, refresh, capsys):
    shares = example(["--refresh", refresh, "--epochs", "2", "--pretrain_epochs", "0", "--selection_rate", "0.2"])
    assert len(shares) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "0.61 of all captions are right"
    assert lines[2].startswith("epoch 1: trained on 100 pairs")


@pytest.mark.slow
@pytest.mark.parametrize("refresh", ["step", "epoch"])
def test_the_example_finds_the_right_captions(example, refresh):
    assert np.mean(example(["--refresh", refresh])[3:]) > 0.7  # of all captions .61 are right
