"""Strategies that run the reference, `head_init` and `on_unhealthy`, as the trainer does them."""

import copy
import warnings

import models
import numpy as np
import pytest
import torch
from training import QUIET, SGD, column, distance, fit, gradients_of, prepare, rows_of, same_weights

from hf_mimic.arguments import MimicTrainingArguments
from hf_mimic.filters import TrustFilter
from hf_mimic.losses import cross_entropy
from hf_mimic.reference_pass import ReferenceScores
from hf_mimic.scores import attach_scores
from hf_mimic.temperature import auto_temperature
from hf_mimic.trainer import MimicTrainer
from hf_mimic.trust import LabelNoiseModel


@pytest.fixture(scope="module")
def vit():
    return models.make("vit")


@pytest.fixture(scope="module")
def judge():
    """Return a reference that is sure of itself, and 48 rows of which it calls every fourth wrong."""
    reference = models.make("vit", seed=1)
    batch = models.make_batch("vit", size=48)
    with torch.no_grad():
        for p in reference.classifier.parameters():
            p.mul_(20)
        labels = reference(batch["pixel_values"]).logits.argmax(1)
    wrong = torch.arange(48) % 4 == 0
    batch["labels"] = torch.where(wrong, (labels + 1) % models.LABELS, labels)
    return reference, rows_of(batch), wrong.numpy()


def expected_scores(model, reference, rows):
    """Run the reference itself, and the noise model on what it says."""
    batch = rows[:]
    with torch.no_grad():
        outputs = reference(batch["pixel_values"])
    losses = cross_entropy(outputs, batch).numpy()
    log_probs, labels = torch.log_softmax(outputs.logits, 1).half().numpy(), batch["labels"].numpy()
    return losses, LabelNoiseModel().fit(log_probs, labels).predict_proba(log_probs, labels)


def test_the_default_records_what_the_reference_says(vit, judge, tmp_path):
    reference, rows, wrong = judge
    trainer = fit(vit, tmp_path, rows=rows, reference=reference, strategy="auto", num_train_epochs=2)
    losses, trust = expected_scores(vit, reference, rows)
    assert trainer.strategy == "trust"
    np.testing.assert_allclose(column(trainer, "ref_loss"), np.tile(losses, 2), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(column(trainer, "ref_trust"), np.tile(trust, 2), atol=1e-4)
    assert trainer.reference_scores.ids.tolist() == list(range(100, 148))
    assert (tmp_path / "reference_scores.parquet").is_file()
    scored = attach_scores(rows, trainer.scores, keep=TrustFilter().fit_predict(trainer.scores))
    assert {"trust", "ref_loss", "ref_trust", "keep"} <= set(scored.column_names)
    assert (np.array(list(scored["keep"])) == ~wrong).all()


def test_the_gradient_is_weighted_by_trust_and_score(vit, judge, tmp_path):
    reference, rows, _ = judge
    tau = 0.05
    options = {"strategy": "trust", "temperature": tau, "max_steps": 1, "per_device_train_batch_size": 48, **SGD}
    trainer = fit(vit, tmp_path, rows=rows, reference=reference, **options)
    trust = column(trainer, "ref_trust")
    odds = np.log(trust.clip(1e-4, 1 - 1e-4)) - np.log1p(-trust.clip(1e-4, 1 - 1e-4))
    logits = -np.logaddexp(0, -(odds + column(trainer, "mimic_score") / tau)).clip(max=8)
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    np.testing.assert_allclose(column(trainer, "relative_weight"), 48 * weights, rtol=1e-3, atol=1e-4)
    model, batch = copy.deepcopy(vit), rows[:]
    (torch.tensor(weights).float() * cross_entropy(model(batch["pixel_values"]), batch)).sum().backward()
    found = gradients_of(trainer)[0]
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["ref_loss", "rho_loss", "small_loss"])
def test_weights_of_the_other_strategies(vit, judge, tmp_path, name):
    reference, rows, _ = judge
    options = {"strategy": name, "temperature": 2.0, "max_steps": 1, "per_device_train_batch_size": 48}
    trainer = fit(vit, tmp_path, rows=rows, reference=reference, **options)
    own, theirs = column(trainer, "loss"), expected_scores(vit, reference, rows)[0]
    logits = {"ref_loss": -theirs, "rho_loss": own - theirs, "small_loss": -own}[name] / 2
    expected = 48 * np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(column(trainer, "relative_weight"), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["trust", "ref_loss", "rho_loss", "small_loss"])
def test_accumulation_does_not_change_a_strategy(vit, judge, tmp_path, name):
    reference, rows, _ = judge
    found = []
    for size, steps in ((24, 1), (8, 3)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "num_train_epochs": 2}
        trainer = fit(vit, tmp_path / str(size), rows=rows, reference=reference, strategy=name, **options, **SGD)
        found.append(trainer)
    assert distance(found[0].model, found[1].model) < 1e-5
    np.testing.assert_allclose(
        column(found[0], "relative_weight"), column(found[1], "relative_weight"), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", ["trust", "mimic"])
def test_a_loss_ten_times_as_large_gives_the_same_weights(vit, judge, tmp_path, name):
    reference, rows, _ = judge
    found = []
    for scale in (1.0, 10.0):
        arguments = {"loss_fn": lambda outputs, batch, scale=scale: scale * cross_entropy(outputs, batch)}
        options = {"strategy": name, "num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.1 / scale}
        if name == "trust":
            arguments = {}  # the loss of class labels is what the default is known for; the rest is in test_health
        trainer = fit(vit, tmp_path / str(scale), rows=rows, reference=reference, arguments=arguments, **options)
        found.append(column(trainer, "relative_weight"))
    np.testing.assert_allclose(found[0][:8], found[1][:8], rtol=1e-3, atol=1e-5)


def test_the_pass_leaves_no_trace_in_training(vit, judge, tmp_path):
    """At an infinite temperature without any wrong label, trust is uniform training but for the trust itself."""
    reference, rows, _ = judge
    plain = fit(vit, tmp_path / "a", rows=rows, reference=reference, strategy="uniform", num_train_epochs=1)
    trainer = prepare(vit, tmp_path / "b", rows=rows, reference=reference, strategy="trust", num_train_epochs=1)
    ones = ReferenceScores(np.arange(100, 148), np.ones(48), np.ones(48))
    trainer.reference.scores = lambda *args, **kwargs: ones
    trainer.args.temperature = "1e12"
    trainer.train()
    assert same_weights(plain.model, trainer.model)


def test_a_resumed_run_sees_the_same_reference_scores(vit, judge, tmp_path):
    reference, rows, _ = judge
    options = {"strategy": "trust", "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    whole = fit(vit, tmp_path, rows=rows, reference=reference, **options)
    (tmp_path / "checkpoint-12").rename(tmp_path / "last")
    again = prepare(models.make("vit", seed=5), tmp_path, rows=rows, reference=reference, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert same_weights(whole.model, again.model)
    assert again.training.weighing.state() == whole.training.weighing.state()


@pytest.mark.parametrize("scope", ["global", "device"])
def test_unknown_samples_count_as_right(vit, judge, tmp_path, scope):
    reference, rows, _ = judge
    trainer = prepare(vit, tmp_path, rows=rows, reference=reference, strategy="trust", weight_scope=scope)
    trainer.reference.scores = lambda *args, **kwargs: ReferenceScores(np.array([1]), np.ones(1), np.ones(1))
    trainer.train()
    np.testing.assert_allclose(column(trainer, "relative_weight"), 1.0, rtol=1e-5)
    assert np.isnan(column(trainer, "ref_trust")).all()


def test_another_strategy_on_resume_has_its_own_temperature(judge, tmp_path):
    reference, rows, _ = judge
    model = models.make("vit")
    options = {"save_strategy": "steps", "save_steps": 3}
    for first, then in (("trust", "mimic"), ("mimic", "trust")):
        folder = tmp_path / first
        fit(model, folder, rows=rows, reference=reference, strategy=first, max_steps=3, **options)
        again = prepare(model, folder, rows=rows, reference=reference, strategy=then, max_steps=8, **options)
        with pytest.warns(UserWarning, match="resumed with other settings"):
            again.train(resume_from_checkpoint=True)
        assert all(p.isfinite().all() for p in again.model.parameters())
        assert np.isfinite(column(again, "relative_weight")).all()


def test_scores_of_other_data_are_made_anew(vit, judge, tmp_path):
    reference, rows, _ = judge
    options = {"strategy": "trust", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    fit(vit, tmp_path, rows=rows, reference=reference, **options)
    columns = {name: rows[:][name] for name in ("pixel_values", "labels")}
    other = rows_of(columns).map(lambda row: {"sample_id": row["sample_id"] + 1000})
    again = prepare(vit, tmp_path, rows=other.with_format("torch"), reference=reference, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.reference_scores.ids.tolist() == list(range(1100, 1148))


def test_the_pass_sees_every_sample(vit, judge, tmp_path):
    reference, rows, _ = judge
    options = {"strategy": "trust", "max_steps": 1, "dataloader_drop_last": True, "per_device_eval_batch_size": 20}
    trainer = fit(vit, tmp_path, rows=rows, reference=reference, **options)
    assert len(trainer.reference_scores.ids) == 48


# ---- what "auto" is ------------------------------------------------------------------------------------------------


def strategy_of(model, tmp_path, rows, **options):
    return prepare(model, tmp_path, rows=rows, **{"strategy": "auto", **options}).strategy


def test_auto_is_mimic_where_the_reference_cannot_judge(vit, tmp_path):
    rows = rows_of(models.make_batch("vit", size=16))
    pairs = rows_of(models.make_batch("clip", size=16))
    assert strategy_of(vit, tmp_path, rows) == "trust"
    assert strategy_of(models.make("clip"), tmp_path, pairs) == "mimic"
    assert strategy_of(vit, tmp_path, rows.to_iterable_dataset(), max_steps=2) == "mimic"
    assert strategy_of(vit, tmp_path, rows.remove_columns("sample_id"), record_scores=False) == "mimic"
    half = {n: t for n, t in models.moved(vit).items() if "classifier" in n}
    assert strategy_of(vit, tmp_path, rows, reference=half) == "mimic"


@pytest.mark.parametrize("name", ["trust", "ref_loss", "rho_loss"])
def test_a_named_strategy_that_cannot_be_had_is_an_error(vit, tmp_path, name):
    rows = rows_of(models.make_batch("vit", size=16))
    message = rf'strategy="{name}" runs the reference over the training data once, but the data are a stream; use'
    with pytest.raises(ValueError, match=message):
        strategy_of(vit, tmp_path, rows.to_iterable_dataset(), max_steps=2, strategy=name)
    half = {n: t for n, t in models.moved(vit).items() if "classifier" in n}
    with pytest.raises(ValueError, match=r"but it cannot be run \(the reference must have every"):
        strategy_of(vit, tmp_path, rows, reference=half, strategy=name)


def test_ref_loss_of_pairs(tmp_path):
    model = models.make("clip")
    rows = rows_of(models.make_batch("clip", size=16))
    with pytest.raises(ValueError, match=r'the loss is not the cross-entropy.*or strategy="ref_loss"'):
        strategy_of(model, tmp_path, rows, strategy="trust")
    trainer = fit(model, tmp_path, rows=rows, strategy="ref_loss", num_train_epochs=1)
    assert np.isfinite(column(trainer, "ref_loss")).all()
    assert np.isnan(column(trainer, "ref_trust")).all()


# ---- head_init -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["zero", "reference", "keep"])
def test_head_init(vit, tmp_path, how, caplog):
    rows = rows_of(models.make_batch("vit", size=16))
    reference = models.make("vit", seed=1)
    trainer = prepare(vit, tmp_path, rows=rows, reference=reference, head_init=how, mimic_layers=["all"])
    head = {"zero": torch.zeros(4, 32), "reference": reference.classifier.weight, "keep": vit.classifier.weight}[how]
    assert torch.equal(trainer.model.classifier.weight, head)
    assert ("of the model were replaced" in caplog.text) == (how != "keep")  # never silently
    if how == "reference":
        assert not trainer.direction()["classifier.weight"].any()


def test_head_init_of_a_model_that_is_made_anew(tmp_path):
    rows, reference = rows_of(models.make_batch("vit", size=16)), models.make("vit", seed=1)
    options = {**QUIET, "learning_rate": 0.0, "optim": "sgd", "strategy": "uniform", "mimic_layers": ["all"]}
    args = MimicTrainingArguments(str(tmp_path), head_init="reference", max_steps=1, **options)
    init = {"model_init": lambda: models.make("vit"), "reference_model": reference}
    trainer = MimicTrainer(None, args, None, rows, **init)
    trainer.train()
    assert torch.equal(trainer.model.classifier.weight, reference.classifier.weight)


def test_a_reference_head_and_the_head_as_only_layer(vit, tmp_path):
    rows = rows_of(models.make_batch("vit", size=16))
    with pytest.warns(UserWarning, match=r"the reference equals the model in the chosen layers"):
        prepare(vit, tmp_path, rows=rows, head_init="reference")


@pytest.mark.parametrize(
    ("strategy", "layers", "known"),
    [("mimic", "last_mlp", False), ("mimic", "head", True), ("trust", "last_mlp", True)],
)
def test_the_reference_s_head_is_read_only_where_it_is_needed(vit, judge, tmp_path, strategy, layers, known):
    reference, rows, _ = judge
    trainer = prepare(vit, tmp_path, rows=rows, reference=reference, strategy=strategy, mimic_layers=[layers])
    assert (trainer.reference.head_cosine is not None) == known


# ---- on_unhealthy --------------------------------------------------------------------------------------------------


def base_of(reference):
    """Return a model that the reference may have been fine-tuned from."""
    base = copy.deepcopy(reference)
    with torch.no_grad():
        for p in base.classifier.parameters():
            p.mul_(0.1)
    return base


def turned(tmp_path, judge, **options):
    """Return a trainer whose score is made to point the wrong way."""
    reference, rows, _ = judge
    model = base_of(reference)
    options = {"num_train_epochs": 16, "logging_steps": 5, "per_device_train_batch_size": 24, **SGD, **options}
    trainer = prepare(model, tmp_path, rows=rows, reference=reference, **options)
    direction = trainer.direction
    trainer.direction = lambda: {name: -v for name, v in direction().items()}
    trainer.direction.parameters = direction.parameters
    return trainer


def test_a_turned_score_is_noticed_by_its_trust(judge, tmp_path):
    trainer = turned(tmp_path, judge, strategy="trust")
    with pytest.warns(UserWarning, match="the mimic score is uninformative or has turned around .*Likely cause"):
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "unhealthy" in entry]
    assert logged[-1]["unhealthy"] == 1.0
    assert logged[-1]["score_trust_correlation"] < 0.1
    weights, trust = (column(trainer, name)[-24:] for name in ("relative_weight", "ref_trust"))
    np.testing.assert_allclose(weights, 24 * trust / trust.sum(), rtol=1e-3, atol=1e-2)  # it is left out


def test_short_runs_are_looked_at_too(judge, tmp_path):
    trainer = turned(tmp_path, judge, strategy="trust", on_unhealthy="raise", num_train_epochs=3)  # six steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_mimic.health._ENOUGH", 64.0)
        with pytest.raises(RuntimeError, match="turned around"):
            trainer.train()


@pytest.mark.parametrize("name", ["small_loss", "uniform"])
def test_strategies_that_do_not_use_the_score_go_on(judge, tmp_path, name):
    turned(tmp_path, judge, strategy=name, on_unhealthy="raise").train()


def test_raise(judge, tmp_path):
    with pytest.raises(RuntimeError, match=r'turned around .*\(on_unhealthy="raise"\)'):
        turned(tmp_path, judge, strategy="trust", on_unhealthy="raise").train()


def test_uniform_from_then_on(judge, tmp_path):
    trainer = turned(tmp_path, judge, strategy="mimic", temperature="1", on_unhealthy="uniform", num_train_epochs=8)
    with pytest.warns(UserWarning, match="It is left out of the weights as long as that is so"):
        trainer.train()
    weights = column(trainer, "relative_weight")
    assert weights[:48].std() > 0.1
    np.testing.assert_allclose(weights[-48:], 1.0, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["mimic", "trust"])
@pytest.mark.parametrize("scope", ["global", "device"])
def test_weights_follow_from_what_was_recorded(judge, tmp_path, strategy, scope):
    """The automatic temperature, written anew from the columns of the score table alone."""
    reference, rows, _ = judge
    options = {"strategy": strategy, "weight_scope": scope, "mimic_layers": "all", **SGD, "learning_rate": 0.01}
    trainer = fit(base_of(reference), tmp_path, rows=rows, reference=reference, num_train_epochs=6, **options)
    names = ("mimic_score", "loss", "ref_trust", "relative_weight")
    steps = zip(*(column(trainer, name).reshape(-1, 8).astype(float) for name in names), strict=True)
    variance, shape, rho, seen, least, sharp = None, 1.0, 0.0, 0, np.sqrt(np.log(2)), []
    for scores, losses, trusts, weights in steps:
        believed = max(rho - 1 / (seen * rho), 0) if seen * rho**2 > 1 else 0.0
        belief = believed if strategy == "trust" else min(2 * believed**3, least)
        if seen >= 256 and rho < (0.1 if strategy == "trust" else 0):
            belief = 0.0
        sigma2, kappa2 = variance, shape
        if scope == "device":
            own = auto_temperature(torch.tensor(scores), 0.5 ** (7 / 9)).item()
            sigma2 = scores.var(ddof=1)
            kappa2 = 1.0 if strategy == "trust" else np.clip((own * least) ** 2 / sigma2, 0.05, 20)
        slope = belief / np.sqrt(sigma2 * kappa2) if belief and sigma2 else 0.0
        evidence = np.log(trusts.clip(1e-4, 1 - 1e-4) / (1 - trusts.clip(1e-4, 1 - 1e-4)))
        logits = scores * slope if strategy == "mimic" else -np.log1p(np.exp(-(evidence + scores * slope))).clip(max=8)
        expected = np.exp(logits - logits.max())
        np.testing.assert_allclose(weights / 8, expected / expected.sum(), rtol=2e-3, atol=1e-5)
        sharp.append(np.ptp(scores * slope))
        size = 1 / np.square(weights / 8).sum() / 8
        if variance is not None and strategy == "mimic" and belief > 0.05:
            shape = np.clip(shape * min(1 + 0.1 * (np.log(size) / (-(belief**2) * 7 / 9) - 1), 2), 0.05, 20)
        variance = (
            scores.var(ddof=1)
            if variance is None
            else variance + 0.1 * (min(scores.var(ddof=1), 25 * variance) - variance)
        )
        found = np.corrcoef(scores, trusts if strategy == "trust" else -losses)[0, 1]
        rho, seen = rho + 8 / min(seen + 8, 1024) * (found - rho), seen + 8
    assert max(sharp) > 0.3  # the score did count


@pytest.mark.parametrize("scope", ["global", "device"])
def test_the_automatic_temperature_leaves_a_turned_score_out(judge, tmp_path, scope):
    trainer = turned(tmp_path, judge, strategy="mimic", num_train_epochs=8, weight_scope=scope)
    with pytest.warns(UserWarning, match="It is left out of the weights as long as that is so"):
        trainer.train()
    np.testing.assert_allclose(column(trainer, "relative_weight"), 1.0, rtol=1e-5)


def test_a_fixed_temperature_does_not(judge, tmp_path):
    trainer = turned(tmp_path, judge, strategy="mimic", temperature="1")
    with pytest.warns(UserWarning, match="has turned around") as told:
        trainer.train()
    assert "left out" not in str(told[0].message)
    assert column(trainer, "relative_weight")[-48:].std() > 0.01


def test_a_good_score_is_let_be(judge, tmp_path):
    reference, rows, _ = judge
    base = base_of(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"strategy": "trust", "num_train_epochs": 16, "per_device_train_batch_size": 24}
        trainer = fit(base, tmp_path, rows=rows, reference=reference, **options)
    assert trainer.training.weighing.report()["unhealthy"] == 0.0
