"""Which rows of an epoch's last batches are repeated: by the sampler's length, the dispatcher's count, or their ids."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from hf_mimic.padding import EpochEnd, EvenBatches


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


def accelerator(rank=0, processes=2, loader=None, gathered=None):
    state = SimpleNamespace(active_dataloader=loader)
    return SimpleNamespace(
        process_index=rank,
        num_processes=processes,
        split_batches=False,
        device=torch.device("cpu"),
        gradient_state=state,
        gather=lambda ids: torch.cat(gathered.pop(0)),
    )


def loader(rows=10, batch=4, *, ended=True, drop_last=False, remainder=-1, dataset=None):
    sampler = SequentialSampler(range(rows))
    return SimpleNamespace(
        dataset=range(rows) if dataset is None else dataset,
        batch_sampler=BatchSampler(sampler, batch, drop_last),
        _drop_last=drop_last,
        end_of_dataloader=ended,
        remainder=remainder,
    )


def kept(rank, size=4, *, rows=10, last=True, **options):
    source = loader(rows, **options)
    end = EpochEnd(accelerator(rank, loader=source))
    end.prepared(source)
    end.fetched([{}], None)
    mask = end.kept(size, None, last=last)
    return None if mask is None else mask.tolist()


def test_rows_left_over_come_first():
    """10 rows, 2 x 4 a step: two are left over."""
    assert kept(0) == [True, True, False, False]
    assert kept(1) == [False] * 4
    assert kept(0, rows=13) == [True] * 4
    assert kept(1, rows=13) == [True, False, False, False]


@pytest.mark.parametrize("options", [{"rows": 16}, {"last": False}, {"ended": False}, {"drop_last": True}])
def test_nothing_is_repeated(options):
    assert kept(0, **options) is None


def test_one_process_repeats_nothing():
    end = EpochEnd(accelerator(processes=1))
    end.fetched([{}], None)
    assert end.kept(4, None, last=True) is None


def test_a_dispatching_loader_counts_what_it_read():
    """The last 5 rows were handed out as 3 and 2 and one repeated."""
    source = loader(dataset=Stream(), remainder=5)
    end = EpochEnd(accelerator(1, loader=source))
    end.prepared(source)
    end.fetched([{}], None)
    assert end.kept(3, None, last=True).tolist() == [True, True, False]


def test_a_loader_that_ended_while_a_step_was_collected():
    """A stream's pass that ends in the middle of an accumulated step: the loader is no longer active."""
    source = loader(dataset=Stream(), remainder=5, ended=False)
    parts = accelerator(1, loader=source)
    end = EpochEnd(parts)
    end.prepared(source)
    end.fetched([{}, {}], None)
    assert end.kept(3, None, last=True) is None
    parts.gradient_state.active_dataloader = None
    end.fetched([{}], None)
    assert end.kept(3, None, last=True).tolist() == [True, True, False]


def stream_of(rank, gathered):
    dataset = DataLoader(IterableDatasetShard(Stream(), batch_size=4, num_processes=2)).dataset
    source = SimpleNamespace(dataset=dataset, batch_sampler=None, end_of_dataloader=False, remainder=-1)
    end = EpochEnd(accelerator(rank, loader=source, gathered=gathered))
    end.prepared(source)
    return end, source


@pytest.mark.parametrize(("rank", "expected"), [(0, [True, True, False, False]), (1, [False] * 4)])
def test_a_stream_that_each_process_reads_is_compared_by_id(rank, expected):
    first, last = [torch.arange(4), torch.arange(4, 8)], [torch.tensor([8, 9, 0, 1]), torch.arange(2, 6)]
    end, source = stream_of(rank, [last, first] * 4)
    for _ in range(2):  # passes
        source.end_of_dataloader = False
        end.fetched([{}], first[rank])
        assert end.kept(4, first[rank], last=True) is None
        source.end_of_dataloader = True
        end.fetched([{}], last[rank])
        for _ in range(2):  # asking changes nothing
            assert end.kept(4, last[rank], last=True).tolist() == expected
        end.fetched([], None)


def test_a_stream_of_one_batch():
    """Three rows on two processes: all eight are made of them."""
    only = [torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 1])]
    for rank, expected in ((0, [True, True, True, False]), (1, [False] * 4)):
        end, source = stream_of(rank, [only])
        source.end_of_dataloader = True
        end.fetched([{}], only[rank])
        assert end.kept(4, only[rank], last=True).tolist() == expected


def test_a_sampler_without_a_length():
    source = loader(ended=True, remainder=0)
    source.batch_sampler.sampler = iter(range(10))
    end = EpochEnd(accelerator(loader=source))
    end.prepared(source)
    end.fetched([{}], None)
    assert end.kept(4, None, last=True) is None


# ---- batches that change their size --------------------------------------------------------------------------------


class Batches(list):
    drop_last = False


def shared(sizes, processes=2, *, drop_last=False):
    """Return what each process gets of batches of these sizes, and the rows at the end that are no repetition."""
    rows = iter(range(sum(sizes)))
    batches = Batches([next(rows) for _ in range(size)] for size in sizes)
    batches.drop_last = drop_last
    ours = [EvenBatches(batches, processes, rank) for rank in range(processes)]
    found = [list(one) for one in ours]
    assert {len(one) for one in found} == {len(ours[0])}
    return found, ours[0].left_over


def test_whole_turns_are_handed_out_as_they_are():
    assert shared([2, 2, 2, 2]) == ([[[0, 1], [4, 5]], [[2, 3], [6, 7]]], 0)


@pytest.mark.parametrize("sizes", [[4, 4, 4], [4, 4, 4, 2], [4, 4, 1], [3], [4, 4, 4, 4, 3], [1, 1, 1]])
@pytest.mark.parametrize("processes", [2, 3])
def test_the_last_turn_is_shared_out_again(sizes, processes):
    found, left_over = shared(sizes, processes)
    assert all(len({len(one[turn]) for one in found}) == 1 for turn in range(len(found[0])))
    trained = [row for turn in range(len(found[0]) - 1) for one in found for row in one[turn]]
    last = [row for one in found for row in one[-1]]
    real = last[:left_over] if left_over else last
    assert sorted(trained + real) == list(range(sum(sizes)))  # nothing lost, nothing twice
    assert last[len(real) :] == list(range(len(last) - len(real)))  # the first ones again


def test_a_last_turn_that_is_dropped():
    found, left_over = shared([4, 4, 4], drop_last=True)
    assert [len(one) for one in found] == [1, 1]
    assert left_over == 0
