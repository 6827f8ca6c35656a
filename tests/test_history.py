"""`ScoreHistory` against a dict: unseen ids, repeated ids, growth, and no waiting for the device."""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from hf_mimic import history
from hf_mimic.dissect import DISSect
from hf_mimic.history import ScoreHistory


def same(found, expected):
    return np.array_equal(found.numpy(), np.array(expected, np.float32), equal_nan=True)


def draw_ids(generator, count):
    """Return ids as hashes are: any int64."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def test_what_was_never_written_is_nan():
    table = ScoreHistory(("history", "delta"))
    assert same(table.lookup(torch.tensor([3, 0]))["history"], [np.nan, np.nan])
    table.write(torch.tensor([3]), history=torch.tensor([1.5]))
    found = table.lookup(torch.tensor([3, 0, 3]))
    assert same(found["history"], [1.5, np.nan, 1.5])
    assert same(found["delta"], [np.nan] * 3)
    assert len(table) == 1


def test_the_last_row_of_a_repeated_id_wins_and_other_numbers_stay():
    table = ScoreHistory(("history", "delta"))
    table.write(torch.tensor([7, 5, 7]), history=torch.tensor([1.0, 2.0, 3.0]), delta=torch.tensor([0.1, 0.2, 0.3]))
    table.write(torch.tensor([7]), delta=torch.tensor([9.0]))
    found = table.lookup(torch.tensor([5, 7]))
    assert same(found["history"], [2.0, 3.0])
    assert same(found["delta"], [0.2, 9.0])
    assert len(table) == 2


@pytest.mark.parametrize("small", [0, 40, 4096])
def test_streams_of_ids_against_a_dict(small, monkeypatch):
    monkeypatch.setattr(history, "_SMALL", small)
    generator = torch.Generator().manual_seed(0)
    pool = torch.cat([draw_ids(generator, 300), torch.tensor([-(2**63), 2**63 - 1, 0, -1])])
    table, expected = ScoreHistory(("history", "delta")), {}
    for step in range(60):
        ids = pool[
            torch.randint(len(pool), (int(torch.randint(0, 20, (), generator=generator)),), generator=generator)
        ]
        numbers = torch.randn(2, len(ids), generator=generator)
        names = [("history",), ("delta",), ("history", "delta")][step % 3]
        table.write(ids, **{name: numbers[i] for i, name in enumerate(names)})
        for row, sample in enumerate(ids.tolist()):
            for i, name in enumerate(names):
                expected.setdefault(sample, {})[name] = float(numbers[i, row])
        found = table.lookup(pool)
        for name in ("history", "delta"):
            assert same(found[name], [expected.get(i, {}).get(name, np.nan) for i in pool.tolist()])
    assert len(table) == len(expected)


def test_growth_is_amortised(monkeypatch):
    merges, merge = [], ScoreHistory._merge
    monkeypatch.setattr(ScoreHistory, "_merge", lambda table: (merges.append(len(table._ids)), merge(table)))
    table, generator = ScoreHistory(("history",)), torch.Generator().manual_seed(0)
    for _ in range(1500):
        table.write(draw_ids(generator, 32), history=torch.zeros(32))
    assert 2 < len(merges) < 20
    assert len(table._new_ids) <= 4096 + 32


class NoWaiting(TorchFunctionMode):
    """Fails on what would make the host wait for an accelerator."""

    waits = ("item", "tolist", "nonzero", "masked_select", "unique", "__bool__", "__int__", "__float__", "__index__")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function.__name__ not in self.waits, function.__name__
        if function.__name__ in ("__getitem__", "__setitem__"):
            assert getattr(args[1], "dtype", None) != torch.bool, "a mask"
        return function(*args, **(kwargs or {}))


def test_the_host_waits_for_the_device_only_in_merges():
    rule, ids, scores = DISSect(variant="momentum"), torch.arange(100), torch.randn(100)
    rule.update(ids, scores)
    with NoWaiting():
        rule.choose(ids[:10], scores[:10])
        rule.update(ids + 50, scores)
        rule.history.write(ids, delta=scores)
        with pytest.raises(AssertionError, match="a mask"):
            len(rule.history)


def test_state_is_a_copy_and_is_taken_back():
    table, generator = ScoreHistory(("history",)), torch.Generator().manual_seed(0)
    ids = draw_ids(generator, 50)
    table.write(ids, history=torch.arange(50.0))
    state = table.state_dict()
    assert set(state) == {"ids", "history"}
    assert (state["ids"].diff() > 0).all()
    table.write(ids, history=torch.zeros(50))
    len(table)
    again = ScoreHistory(("history",))
    again.write(torch.tensor([1, 2]), history=torch.ones(2))
    again.load_state_dict(state)
    again.write(ids[:1], history=torch.tensor([-1.0]))
    assert same(again.lookup(ids)["history"], [-1.0, *range(1, 50)])
    assert len(again) == 50
    assert same(state["history"][state["ids"] == ids[0]], [0.0])


def test_numbers_are_kept_without_graph_in_float32():
    table = ScoreHistory(("history",))
    table.write(
        torch.tensor([1], dtype=torch.int32), history=torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    )
    found = table.lookup(torch.tensor([1]))["history"]
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_errors():
    table = ScoreHistory(("history",))
    with pytest.raises(
        TypeError, match=r"sample ids must be an integer tensor \(B,\), got torch.float32 of shape \(1,\)"
    ):
        table.lookup(torch.tensor([0.5]))
    with pytest.raises(TypeError, match="got list"):
        table.lookup([1])
    with pytest.raises(ValueError, match=r"`name` must be one of 'history', got 'histori'\. Did you mean 'history'\?"):
        table.write(torch.tensor([1]), histori=torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"`history` must have one number per id, got shape \(2,\) for 1 ids"):
        table.write(torch.tensor([1]), history=torch.zeros(2))
    with pytest.raises(ValueError, match="the state must have ids, history, got ids, other"):
        table.load_state_dict({"ids": torch.tensor([1]), "other": torch.zeros(1)})
    for names in ((), ("a", "a"), ("ids",)):
        with pytest.raises(ValueError, match='`names` must be different names, none of them "ids"'):
            ScoreHistory(names)
