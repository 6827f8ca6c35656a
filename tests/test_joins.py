"""Rows are joined by their ids."""

import numpy as np
import pytest

from hf_mimic.joins import find_ids


@pytest.mark.parametrize("shuffled", [False, True])
def test_as_a_dict_finds_them(shuffled):
    generator = np.random.default_rng(0)
    known = np.sort(generator.choice(1000, 300, replace=False)) - 500
    known = generator.permutation(known) if shuffled else known
    ids = generator.integers(-600, 600, 400)
    places = {int(value): i for i, value in enumerate(known)}
    place, there = find_ids(known, ids)
    assert there.tolist() == [int(value) in places for value in ids]
    assert place[there].tolist() == [places[int(value)] for value in ids[there]]
    assert 0 < there.sum() < len(ids)


def test_nothing_is_known_or_asked():
    place, there = find_ids(np.array([], np.int64), np.array([1, 2]))
    assert (place.tolist(), there.tolist()) == ([0, 0], [False, False])
    place, there = find_ids(np.array([3, 1]), np.array([], np.int64))
    assert (len(place), len(there)) == (0, 0)
