import dataclasses
import json

import pytest

from hf_mimic.run_record import RunRecord
from hf_mimic.selection_record import MOST_REASONS, OTHER, Counts, SelectionRecord, count_by

RECORD = SelectionRecord(
    run=RunRecord(model="a/b"),
    rule="trust >= 0.4",
    threshold=0.4,
    rows=Counts(100, 70),
    unscored=5,
    unscored_kept=True,
    reasons={"trust below 0.4": 30, "trust of 0.4 or more": 65, "no trust": 5},
    classes={"zebra": Counts(60, 50), "ant": Counts(40, 20)},
    groups={"country": {"NZ": Counts(None, 70)}},
    quality={"noise_rate": 0.3},
    splits={"train": 70, "test": 20},
    split="train",
    original_dataset="you/noisy",
    original_revision="b" * 40,
    sample_id_column="sample_id",
    command="hf-mimic push --config /home/ann/c.yaml",
)


def test_a_record_survives_json():
    text = json.dumps(RECORD.as_dict(), allow_nan=False)
    again = SelectionRecord.from_dict({**json.loads(text), "of_tomorrow": 1})
    assert again == RECORD
    assert list(again.classes) == ["zebra", "ant"]  # the order of the labels


def test_reasons_are_ranked_and_the_path_is_gone():
    assert list(RECORD.reasons) == ["trust of 0.4 or more", "trust below 0.4", "no trust"]
    assert RECORD.command == "hf-mimic push --config c.yaml"


def test_reasons_beyond_twenty_are_counted_together():
    reasons = {f"reason {i:02d}": i + 1 for i in range(30)}
    kept = dataclasses.replace(RECORD, reasons=reasons).reasons
    assert len(kept) == MOST_REASONS
    assert list(kept)[-1] == OTHER
    assert sum(kept.values()) == sum(reasons.values())
    assert list(kept.values())[:2] == [30, 29]
    assert dataclasses.replace(RECORD, reasons=kept).reasons == kept


def test_shares():
    assert Counts(4, 1).share == 0.25
    assert Counts(None, 1).share is None
    assert Counts(0, 0).share is None


@pytest.mark.parametrize("counts", [(1, 2), (-1, 0), (3, -1), (2.0, 1), (True, 1), (2, None)])
def test_counts_must_be_possible(counts):
    with pytest.raises(ValueError, match=r"must not be more than there was|must be a whole number of samples"):
        Counts(*counts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": ""}, "`rule` must be a string that says something"),
        ({"unscored": 1.5}, "`unscored` must be a whole number"),
        ({"reasons": {"x": -1}}, r"`reasons\['x'\]` must be a whole number"),
        ({"splits": None}, "`splits` must be a dict"),
        ({"rows": {"before": 3}}, "`rows` must have `before` and `after`"),
        ({"classes": {"a": 3}}, r"`classes\['a'\]` must have `before` and `after`, got 3"),
        ({"original_dataset": " "}, "`original_dataset` must be a name or None"),
    ],
)
def test_wrong_types_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SelectionRecord.from_dict({**RECORD.as_dict(), **change})


def test_a_field_that_is_missing_is_named():
    given = RECORD.as_dict()
    del given["split"]
    with pytest.raises(ValueError, match="must have every field, split missing"):
        SelectionRecord.from_dict(given)


def test_count_by_counts_as_one_would_by_hand():
    counts = count_by(["a", None, "a", 3], [True, True, False, False])
    assert counts == {"a": Counts(2, 1), "no value": Counts(1, 1), "3": Counts(1, 0)}
