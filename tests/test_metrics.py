"""Accuracy and detection, by hand."""

import numpy as np
import pytest
from transformers import EvalPrediction

from hf_mimic.metrics import accuracy, detection


def test_accuracy_by_hand():
    logits = np.array([[0.1, 0.9], [2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    assert accuracy(EvalPrediction(logits, np.array([1, 0, 0, 1]))) == {"accuracy": 0.5}


def test_detection_by_hand():
    wrong = np.array([True, True, False, False, False])
    score = np.array([-1.0, 0.3, 0.2, 0.4, 0.5])  # 5 of 6 pairs (wrong, right) are in order
    keep = np.array([False, True, True, False, True])  # 1 of 2 found, 1 of 2 that were found is wrong
    assert detection(wrong, score=score, keep=keep) == {"auroc": pytest.approx(5 / 6), "f1": pytest.approx(0.5)}
    assert detection(wrong, score=-score)["auroc"] == pytest.approx(1 / 6)
    assert detection(wrong, keep=~wrong) == {"f1": 1.0}
    assert detection(wrong, keep=wrong) == {"f1": 0.0}


def test_unscored_samples_are_left_out_of_the_auroc():
    wrong = np.array([True, False, False, True])
    score = np.array([0.0, 1.0, np.nan, np.nan])
    assert detection(wrong, score=score) == {"auroc": 1.0}


def test_integers_are_taken_as_flags():
    assert detection(np.array([1, 0, 1]), keep=np.array([0, 1, 0])) == {"f1": 1.0}


@pytest.mark.parametrize(("wrong", "count"), [([True, True], "2 wrong of 2"), ([False] * 3, "0 wrong of 3")])
def test_detection_needs_both_kinds(wrong, count):
    with pytest.raises(ValueError, match=f"detection needs right and wrong samples, got {count}"):
        detection(np.array(wrong), score=np.zeros(len(wrong)))
