"""The benchmark of large score tables: it writes what training would, keeps the right samples, and decodes no image."""

import sys
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))

import filters_scale

from hf_mimic.scores import ScoreTable


@pytest.mark.parametrize("trust", [False, True])
def test_the_benchmark_in_small(tmp_path, trust):
    assert filters_scale.write_shards(tmp_path / "scores", 1000, 2, trust=trust) > 0
    filters = filters_scale.FILTERS | filters_scale.TRUST if trust else filters_scale.FILTERS
    seconds = filters_scale.ours(tmp_path / "scores", filters, tmp_path / "keep.parquet")
    assert [*seconds] == ["aggregate", *filters, "write"]
    assert filters_scale.one_pass(tmp_path / "scores") > 0
    rows, kept = ScoreTable.load(tmp_path / "scores").to_arrow(), pq.read_table(tmp_path / "keep.parquet")
    assert sorted(rows["sample_id"].to_pylist()) == sorted([*range(1000)] * 2)
    assert rows["ref_trust"].null_count == (0 if trust else len(rows))
    assert kept["sample_id"].to_pylist() == list(range(1000))
    assert 0.5 < filters_scale.sum_kept(kept) < 0.95


def test_no_image_is_decoded(monkeypatch):
    monkeypatch.setattr(datasets.Image, "decode_example", datasets.Image.decode_example)  # put back afterwards
    monkeypatch.setattr(Image, "open", Image.open)
    found = filters_scale.images(50)
    assert {"attach", "filter", "filter row by row", "peak"} <= found.keys()
