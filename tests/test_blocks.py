"""Sums over rows in blocks, against numpy on the whole."""

import numpy as np
import pytest

from hf_mimic import blocks
from hf_mimic.blocks import any_known, mean_and_count, row_means

NAN = float("nan")


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("block", [1, 7, 100])
def test_means_of_rows(monkeypatch, order, block):
    monkeypatch.setattr(blocks, "_BLOCK", block)
    values = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    whole = values.astype(float).mean(1)
    np.testing.assert_allclose(row_means(np.asarray(values, order=order)), whole, rtol=1e-12)
    values[::3, 1], values[5] = NAN, NAN
    expected = [np.mean([float(v) for v in row if v == v]) if (row == row).any() else NAN for row in values]
    found = row_means(np.asarray(values, order=order))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found.dtype == float
    assert not np.allclose(found, whole, equal_nan=True)


def test_what_is_counted():
    mean, count = mean_and_count(np.float32([[1, NAN], [1, 3], [NAN, NAN]]))
    np.testing.assert_array_equal(mean, [1, 2, NAN])
    assert (count.tolist(), count.dtype) == ([1, 2, 0], np.int32)


def test_it_looks_no_further_than_the_first_known_value(monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK", 2)
    seen = []
    isnan = np.isnan
    monkeypatch.setattr(blocks.np, "isnan", lambda values: seen.append(len(values)) or isnan(values))
    assert any_known(np.array([NAN, NAN, NAN, 1, NAN, NAN]))
    assert seen == [2, 2]
    assert not any_known(np.full((3, 2), NAN))
