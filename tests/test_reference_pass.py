"""The reference's pass over the data: its own outputs, nothing of the student changed, adapters, bad references."""

import copy

import models
import numpy as np
import pytest
import torch

from hf_mimic.losses import cross_entropy
from hf_mimic.reference_pass import ReferenceScores, as_reference, runnable_tensors, score_reference

FAMILIES = ["vit", "resnet", "clip_classifier", "swinv2"]


def pair(family):
    """Return student and reference, with running statistics that differ."""
    student, reference = models.make(family), models.make(family, seed=1)
    for name, buffer in reference.named_buffers():
        if "running" in name:
            buffer.add_(0.5)
    return student, reference


def batches(family="vit", size=24, step=8, ids=None):
    batch = models.make_batch(family, size=size)
    batch["sample_id"] = torch.arange(100, 100 + size) if ids is None else torch.as_tensor(ids)
    return [{name: values[i : i + step] for name, values in batch.items()} for i in range(0, size, step)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_what_the_reference_computes_and_then_its_own(family):
    student, reference = pair(family)
    student.train()
    before, batch = copy.deepcopy(student.state_dict()), models.make_batch(family)
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    with torch.no_grad():
        expected, own = reference(**inputs).logits, copy.deepcopy(student).eval()(**inputs).logits
    with as_reference(student, runnable_tensors(student, reference)) as model:
        assert torch.equal(model(**inputs).logits, expected)
    assert not torch.allclose(own, expected)  # control
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), before.values(), strict=True))
    assert student.training


def test_random_numbers_and_weights_are_put_back_after_a_failure():
    student, reference = pair("vit")
    before, state = copy.deepcopy(student.state_dict()), torch.random.get_rng_state()
    with (
        pytest.raises(ValueError, match="not enough values to unpack"),
        as_reference(student, runnable_tensors(student, reference)) as model,
    ):
        model(pixel_values=torch.rand(3))
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), before.values(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_from_a_folder(tmp_path):
    student, reference = pair("resnet")
    reference.save_pretrained(tmp_path)
    found = runnable_tensors(student, str(tmp_path))
    assert {name for name, tensor in reference.state_dict().items() if not torch.equal(found[name], tensor)} == set()


def test_an_adapter_and_a_reference_without_one():
    student = models.with_lora(models.make("vit"))
    plain, inputs = models.make("vit", seed=1), {"pixel_values": models.make_batch("vit")["pixel_values"]}
    other = models.with_lora(models.make("vit", seed=1))
    for reference in (plain, other):
        with torch.no_grad():
            expected = reference(**inputs).logits
        with as_reference(student, runnable_tensors(student, reference)) as model:
            torch.testing.assert_close(model(**inputs).logits, expected)


def test_a_reference_that_lacks_a_trained_tensor():
    student, reference = pair("vit")
    tensors = {n: t for n, t in reference.state_dict().items() if "classifier" not in n}
    with pytest.raises(ValueError, match=r"2 of \d+ do not match:\n  classifier.weight: not in the reference"):
        runnable_tensors(student, tensors)
    for p in student.classifier.parameters():
        p.requires_grad_(False)
    assert "classifier.weight" not in runnable_tensors(student, tensors)  # then the student's own will do


def test_references_that_would_be_another_model(tmp_path):
    student = models.make("vit")
    with pytest.raises(ValueError, match=r"no adapter that the model has not.*merge_and_unload"):
        runnable_tensors(student, models.with_lora(models.make("vit")))
    deeper = models.make("vit", num_hidden_layers=4)
    deeper.save_pretrained(tmp_path)
    for reference in (deeper, str(tmp_path)):
        with pytest.raises(ValueError, match=r"architecture to be run, got num_hidden_layers=4 instead of 2"):
            runnable_tensors(student, reference)
    bare = dict(models.make("resnet", seed=1).named_parameters())
    with pytest.raises(ValueError, match=r"every tensor that its outputs depend on, .*running_mean is not in it"):
        runnable_tensors(models.make("resnet"), bare)


def test_a_reference_that_has_diverged():
    student, reference = pair("vit")
    with torch.no_grad():
        reference.vit.layernorm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"losses must be finite, got 100% that are not: it has diverged"):
        score_reference(student, runnable_tensors(student, reference), batches(), cross_entropy)


# ---- scores --------------------------------------------------------------------------------------------------------


def scored(family="vit", **options):
    student, reference = pair(family)
    tensors = runnable_tensors(student, reference)
    return score_reference(student, tensors, batches(family), cross_entropy, **options), reference


@pytest.mark.filterwarnings("ignore:the reference agrees")
def test_losses_are_the_reference_s_own():
    found, reference = scored()
    batch = models.make_batch("vit", size=24)
    with torch.no_grad():
        expected = cross_entropy(reference(batch["pixel_values"]), batch)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)
    assert found.ids.tolist() == list(range(100, 124))


def labelled_by(reference, batch, wrong=0):
    with torch.no_grad():
        labels = reference(batch["pixel_values"]).logits.argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % models.LABELS
    return {**batch, "labels": labels}


def test_trust_is_low_where_the_label_is_not_what_the_reference_says():
    student, reference = pair("vit")
    rows = [labelled_by(reference, batch, wrong=2) for batch in batches(size=96, step=12)]
    with torch.no_grad():
        for p in reference.classifier.parameters():
            p.mul_(20)  # sure of itself
    found = score_reference(student, runnable_tensors(student, reference), rows, cross_entropy)
    wrong = np.arange(96) % 12 < 2
    assert found.trust[wrong].max() < 0.5 < found.trust[~wrong].min()
    assert found.noise_rate == pytest.approx(2 / 12, abs=0.05)


def test_a_reference_that_agrees_by_chance_only():
    with pytest.warns(UserWarning, match="agrees with .*no more than chance: it is no judge"):
        found, _ = scored()
    assert np.isnan(found.trust).all()
    assert found.noise_rate is None
    assert np.isfinite(found.losses).all()


def test_repeated_rows_count_once_and_all_processes_are_joined():
    student, reference = pair("vit")
    rows = [labelled_by(reference, batch) for batch in batches(size=48, step=12)]
    tensors = runnable_tensors(student, reference)
    whole = score_reference(student, tensors, rows, cross_entropy)
    kept = []
    score_reference(student, tensors, rows[:2], cross_entropy, gather=lambda c: kept.append(c[0]) or c)
    joined = score_reference(student, tensors, rows[2:] + rows[:1], cross_entropy, gather=lambda c: [*kept, *c])
    assert joined.ids.tolist() == whole.ids.tolist()
    np.testing.assert_allclose(joined.trust, whole.trust, atol=1e-6)


def test_samples_without_label_or_with_a_broken_one():
    student, reference = pair("vit")
    rows = [labelled_by(reference, batch) for batch in batches(size=48, step=12)]
    rows[0]["labels"][0] = -100
    rows[1]["pixel_values"][3] = torch.nan
    found = score_reference(student, runnable_tensors(student, reference), rows, cross_entropy)
    assert np.flatnonzero(np.isnan(found.trust)).tolist() == [0, 15]
    assert np.flatnonzero(np.isnan(found.losses)).tolist() == [15]


def test_a_file_of_another_run_is_not_believed(tmp_path):
    path, found = tmp_path / "scores.parquet", ReferenceScores(np.array([3]), np.array([0.3]), np.array([0.9]))
    assert ReferenceScores.load(path) is None
    found.save(path, fingerprint="one")
    assert ReferenceScores.load(path, fingerprint="two") is None
    assert ReferenceScores.load(path, fingerprint="one").ids.tolist() == [3]
    path.write_bytes(path.read_bytes()[:60])  # torn
    assert ReferenceScores.load(path, fingerprint="one") is None


def test_no_samples():
    student, reference = pair("vit")
    with pytest.raises(ValueError, match="must have samples for the reference to run on"):
        score_reference(student, runnable_tensors(student, reference), [], cross_entropy)


def test_lookup_and_file(tmp_path):
    found = ReferenceScores(np.array([7, 3, 5, 3]), np.array([0.7, 0.3, np.inf, 9]), np.array([0.9, 0.2, 0.5, 9]))
    found.save(tmp_path / "new" / "scores.parquet")
    for scores in (found, ReferenceScores.load(tmp_path / "new" / "scores.parquet")):
        losses, trust = scores.lookup(torch.tensor([3, 5, 4, 7, 8, 0]))
        torch.testing.assert_close(
            losses, torch.tensor([0.3, torch.nan, torch.nan, 0.7, torch.nan, torch.nan]), equal_nan=True
        )
        torch.testing.assert_close(
            trust, torch.tensor([0.2, 0.5, torch.nan, 0.9, torch.nan, torch.nan]), equal_nan=True
        )
