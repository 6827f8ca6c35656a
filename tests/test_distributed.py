"""Two processes (gloo, on the CPU): every split, loader and wrapper gives the gradient of one process.

All jobs run in one launch of `torchrun`; see worker.py and jobs.py. `gloo` may abort a process that is done, so what
counts is what the processes wrote.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import corpora
import pytest
import torch
from jobs import evaluated
from splits import FAMILIES, ROWS, difference, make, steps_of, train
from test_resuming import trainer_of

EXACT = {"double": True, "temperature": 0.3}
MOVING = {"double": True, "optim": "adamw_torch", "learning_rate": 1e-2, "num_train_epochs": 3, "logging_steps": 1}
LOADERS = {
    "workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    "dispatch": {"accelerator_config": {"dispatch_batches": True}},
    "uneven": {"accelerator_config": {"even_batches": False}},
}
STREAMS = {
    "one shard": {"shards": 1},
    "four shards": {"shards": 4, "dataloader_num_workers": 2},
    "each for itself": {"shards": 1, "accelerator_config": {"dispatch_batches": False}},
}
WRAPPERS = {
    "checkpointing": {"activation_checkpointing": True},
    "no unused": {"ddp_find_unused_parameters": False},
    "all layers": {"mimic_layers": "all"},
    "mimic layers": {"reweight": "mimic_layers"},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "scaler": {"scaler": True, "max_grad_norm": 1e6},  # clipping unscales
    "clipped": {"max_grad_norm": 1e-3},
    "start": {"direction": "start"},
}
SHARDINGS = [  # whether blocks are units, whether they are resharded after forward, whose checkpointing
    *((blocks, reshard, "none") for blocks in (False, True) for reshard in (False, True)),
    (True, True, "transformers"),
    (True, True, "accelerate"),
]
TRUSTED = {  # the reference's pass over the data, in two processes
    "trust": {},
    "trust dispatch": {"accelerator_config": {"dispatch_batches": True}},
    "trust auto": {"temperature": "auto"},
}
IMAGE_TEXT = ("clip", "siglip", "blip")
PAIRS = {  # options of image-text models, and those of the run on one process with the same gradient
    "no unused": {"ddp_find_unused_parameters": False},
    "all layers": {"mimic_layers": "all"},
    "text layers": {"mimic_layers": ["text_model"]},
    "equal captions": {"multi_positive": True, "repeated": True},
    "one broken": {"broken": [9]},
    "broken on both": {"broken": [0, 9, 10]},
    "broken micro-batch": {"broken": [4, 5, 6, 7]},  # one of two of a process
    "broken last micro-batch": {"broken": [12, 13, 14, 15]},
    "small loss": {"strategy": "small_loss", "temperature": "auto"},
    "mimic layers": {"reweight": "mimic_layers"},
}
CHOOSING = {  # on two processes
    "dissect warmup": {"strategy": "dissect"},
    "dissect momentum": {"strategy": "dissect", "variant": "momentum"},
    "dissect epoch": {"strategy": "dissect", "refresh": "epoch", "rescore_share": 0.2},
    "dissect cached": {"strategy": "dissect", "cache_negatives": True, "gradient_accumulation_steps": 2},
    "scan": {"strategy": "scan", "selection_rate": 0.6},
    "info_batch": {"strategy": "info_batch"},
}
BROKEN = {"one sample": [9], "a whole micro-batch": [8, 9, 10, 11, 12, 13, 14, 15], "on both": [0, 9]}


def jobs_of_splits():
    for family in FAMILIES:
        for split in ("2p8", "2p4x2"):
            yield f"{family} {split}", {"family": family, "split": split, **EXACT}
        yield f"{family} stock", {"family": family, "split": "2p8", "plain": True}
    yield "lora 2p4x2", {"family": "lora", "split": "2p4x2", **EXACT}
    for family in ("clip", "siglip"):
        yield f"{family} local", {"family": family, "split": "2p4x2", "gather_negatives": False, **EXACT}
    for family in IMAGE_TEXT:
        for split in ("2p8", "2p4x2"):
            yield f"{family} {split}", {"family": family, "split": split, **EXACT}
        yield f"{family} cached", {"family": family, "split": "2p4x2", "cache_negatives": True, **EXACT}
    uneven = {"split": "2p4x2", "accelerator_config": {"even_batches": False}}
    yield "uneven pairs", {"family": "clip", **uneven, **EXACT}
    yield "uneven cached pairs", {"family": "clip", "cache_negatives": True, **uneven, **EXACT}
    yield "clip float", {"family": "clip", "split": "2p4x2", "cache_negatives": True}
    yield "clip not gathered", {"family": "clip", "split": "2p8", "gather_negatives": False, **EXACT}
    for name, options in PAIRS.items():
        yield f"pairs {name}", {"family": "clip", "split": "2p8", **EXACT, **options}
        cached = {"split": "2p4x2", "cache_negatives": True}
        if "reweight" in options:  # features have one gradient only
            continue
        yield f"cached {name}", {"family": "clip", **cached, **EXACT, **options}


def jobs_of_options():
    for name, options in {**LOADERS, **WRAPPERS}.items():
        yield name, {"split": "2p4x2", **EXACT, **options}
    for name, options in STREAMS.items():
        yield name, {"split": "2p8", "max_steps": 2, **options}
    for name, rows in BROKEN.items():
        yield name, {"split": "2p8", "broken": rows, **EXACT}
    for name, options in TRUSTED.items():
        yield name, {"family": "judged", "split": "2p4x2", "strategy": "trust", **EXACT, **options}
    # static_graph and accumulation do not go together: an internal assertion of torch 2.13
    yield "static", {"split": "2p8", **EXACT, "ddp_static_graph": True}
    yield "split", {"split": "16", **EXACT, "accelerator_config": {"split_batches": True}}
    yield "device", {"split": "2p8", "weight_scope": "device", **EXACT}
    yield "trajectory", {"split": "2p4x2", **MOVING}


def jobs_of_shards():
    for layers in ("head", "last_mlp", "last_block", "all"):
        yield f"sharded {layers}", {"layers": layers, "accumulate": 1}
    yield "sharded accumulated", {"layers": "last_block", "accumulate": 2}
    yield "sharded broken", {"layers": "last_block", "accumulate": 1, "broken": [9]}
    yield "sharded hopeless", {"layers": "head", "accumulate": 1, "broken": list(range(8))}


def jobs_of_sharded_scores():
    for layers in ("head", "last_mlp", "last_block", "all"):
        for blocks, reshard, checkpoint in SHARDINGS:
            yield {"family": "vit", "layers": layers, "blocks": blocks, "reshard": reshard, "checkpoint": checkpoint}
    kind = {"blocks": True, "reshard": True, "checkpoint": "none", "layers": "all"}
    yield from ({"family": family, **kind} for family in ("dinov2", "resnet"))
    yield {"family": "vit", **kind, "low": True}


def all_jobs():
    yield from ((name, "step_gradients", options) for name, options in jobs_of_splits())  # starts the process group
    for options in jobs_of_sharded_scores():
        yield " ".join(map(str, options.values())), "sharded_scores_of", options
    yield from ((name, "step_gradients", {"family": "vit", **options}) for name, options in jobs_of_options())
    for split in ("2p8", "2p4x2"):
        yield f"scaled {split}", "error_of", {"family": "vit", "split": split, "scale": 2.0}
    yield from ((name, "sharded", options) for name, options in jobs_of_shards())
    for kill in (3, 5, 8):  # three steps an epoch of 22 rows
        yield f"resumed {kill}", "resumed", {"kill": kill, "save_steps": 1}
    order = {"train_sampling_strategy": "sequential"}
    yield "resumed in order", "resumed", {"kill": 4, "save_steps": 1, **order}
    yield "resumed accumulated", "resumed", {"kill": 3, "save_steps": 1, "gradient_accumulation_steps": 2}
    yield "resumed stream", "resumed", {"kill": 5, "save_steps": 2, "stream": 2, "max_steps": 8}
    for family in IMAGE_TEXT:
        yield f"evaluated {family}", "evaluated", {"family": family, "size": 4}
        yield f"evaluated {family} apart", "evaluated", {"family": family, "size": 4, "gather_negatives": False}
    for name, options in CHOOSING.items():
        yield f"choosing {name}", "histories", options
    yield "choosing apart", "histories", {"strategy": "dissect", "variant": "momentum", "apart": True}
    for name, kill in (("dissect warmup", 5), ("dissect epoch", 7), ("info_batch", 5)):
        options = {"family": "clip", "kill": kill, "save_steps": 1, "selection_rate": 0.6, **CHOOSING[name]}
        yield f"resumed {name}", "resumed", options
    for family in ("vit", "clip"):
        yield f"corpus {family}", "corpus_of", {"family": family}
    yield "corpus error", "corpus_error", {}
    dispatch = {"accelerator_config": {"dispatch_batches": True}}
    yield "resumed dispatch", "resumed", {"kill": 5, "save_steps": 1, **dispatch}


def launch(jobs, folder, *, seconds=400):
    """Run jobs in two processes; return (job, process) to what it returned."""
    torch.save(jobs, folder / "jobs.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("worker.py")), str(folder / "jobs.pt"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    if not all((folder / f"done-{rank}").exists() for rank in (0, 1)):
        raise RuntimeError(
            f"the processes did not finish ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
        )
    return {(name, rank): torch.load(folder / f"{name}-{rank}.pt") for name, *_ in jobs for rank in (0, 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def results(folder):
    return launch(list(all_jobs()), folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return a function that gives the gradients of one process, made once for each setting."""
    known = {}

    def gradients(family, split="16", **options):
        key = (family, split, *sorted((k, str(v)) for k, v in options.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("one")
            known[key] = train(family, split, folder, **options)
        return steps_of(known[key])

    return gradients


def assert_same(result, expected, tolerance=1e-9):
    assert "failed" not in result, result["failed"]
    found = [difference(g, e) for g, e in zip(result["gradients"], expected, strict=True)]
    assert found == pytest.approx([0] * len(expected), abs=tolerance)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("split", ["2p8", "2p4x2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_split_has_the_gradient_of_one_batch(results, alone, family, split, rank):
    """The second step has 6 rows of 22: padded with repeated ones, which count once."""
    result = results[f"{family} {split}", rank]
    assert_same(result, alone(family, **EXACT))
    assert sorted(result["rows"]["sample_id"]) == list(range(100, 100 + ROWS))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_trainer_fails_this(results, alone, family):
    stock, expected = results[f"{family} stock", 0]["gradients"], alone(family, plain=True)
    if family != "vit":  # twice the gradient on two processes
        assert difference(stock[0], expected[0]) == pytest.approx(1, rel=1e-3)
    assert difference(stock[1], expected[1]) > 0.1  # repeated rows count twice


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_negatives_of_the_same_process(results, alone, family):
    """2 processes x 2 x 4 pairs have the micro-batches of 4 x 4 pairs."""
    whole = alone(family, "4x4", **EXACT)[0]
    assert difference(results[f"{family} local", 0]["gradients"][0], whole) < 1e-9


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("family", IMAGE_TEXT)
def test_gathered_pairs_are_one_batch(results, alone, family, rank):
    """2 x 8 pairs == 1 x 16; 2 x 4 accumulated twice == 8 accumulated twice, and == 1 x 16 if cached; padded tails too."""
    assert_same(results[f"{family} 2p8", rank], alone(family, **EXACT))
    assert_same(results[f"{family} cached", rank], alone(family, **EXACT))
    halves = results[f"{family} 2p4x2", rank]["gradients"]
    assert difference(halves[0], alone(family, "8x2", **EXACT)[0]) < 1e-9
    assert difference(halves[0], alone(family, **EXACT)[0]) > 1e-2


def test_gathered_pairs_in_float32(results, alone):
    assert_same(results["clip float", 0], alone("clip"), tolerance=1e-6)


def test_negatives_that_are_not_gathered_are_others(results, alone):
    """What the stock Trainer does."""
    assert difference(results["clip not gathered", 0]["gradients"][0], alone("clip", **EXACT)[0]) > 1e-2


@pytest.mark.parametrize(
    ("how", "name"), [(h, n) for h in ("pairs", "cached") for n in PAIRS if (h, n) != ("cached", "mimic layers")]
)
def test_options_of_gathered_pairs(results, alone, name, how):
    kept = {k: v for k, v in PAIRS[name].items() if k != "ddp_find_unused_parameters"}
    for rank in (0, 1):
        assert_same(results[f"{how} {name}", rank], alone("clip", **{**EXACT, **kept}))


@pytest.mark.parametrize("family", IMAGE_TEXT)
def test_the_evaluation_loss_is_over_the_pairs_of_all_processes(results, family, tmp_path):
    """22 pairs: the last batch of 2 x 4 has 6, and two repeated ones that count as no negatives."""
    expected = evaluated(tmp_path, family=family, size=8)["loss"]
    assert results[f"evaluated {family}", 0]["loss"] == pytest.approx(expected, rel=1e-6)
    assert results[f"evaluated {family}", 1]["loss"] == pytest.approx(expected, rel=1e-6)
    assert abs(results[f"evaluated {family} apart", 0]["loss"] - expected) > 1e-2


def test_batches_of_unequal_sizes(results, alone):
    assert_same(results["uneven pairs", 0], alone("clip", "8x2", **EXACT))
    assert_same(results["uneven cached pairs", 1], alone("clip", **EXACT))


@pytest.mark.parametrize("name", ["clip 2p8", "clip cached"])
def test_scores_of_gathered_pairs(results, tmp_path, name):
    ours, theirs = results[name, 0]["rows"], train("clip", "16", tmp_path, **EXACT).scores.to_arrow().to_pydict()
    for column in ("sample_id", "step", "loss", "mimic_score", "relative_weight"):
        assert ours[column] == pytest.approx(theirs[column], rel=1e-5, abs=1e-7), column


def test_adapters(results, alone):
    assert_same(results["lora 2p4x2", 0], alone("lora", **EXACT))


@pytest.mark.parametrize("name", [*LOADERS, "split"])
def test_every_loader(results, alone, name):
    assert_same(results[name, 0], alone("vit", **EXACT))
    assert sorted(results[name, 0]["rows"]["sample_id"]) == list(range(100, 100 + ROWS))


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_wrapper(results, alone, name):
    options = {
        k: v for k, v in WRAPPERS[name].items() if k in ("mimic_layers", "reweight", "max_grad_norm", "direction")
    }
    assert_same(results[name, 0], alone("vit", **EXACT, **options))


@pytest.mark.parametrize("name", STREAMS)
def test_every_stream(results, alone, name):
    rows = results[name, 0]["rows"]
    assert sorted(rows["sample_id"]) == list(range(100, 100 + ROWS))
    if name != "four shards":  # workers interleave shards
        assert_same(results[name, 0], alone("vit", max_steps=2), tolerance=1e-5)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_samples_on_one_process(results, alone, name):
    broken = BROKEN[name]
    assert_same(results[name, 1], alone("vit", broken=broken, **EXACT))
    rows = results[name, 0]["rows"]
    scored = {i for i, score in zip(rows["sample_id"], rows["mimic_score"], strict=True) if score is not None}
    assert scored == set(range(100, 100 + ROWS)) - {100 + row for row in broken}
    assert results[name, 0]["log"][-1]["train_loss"] > 0


@pytest.mark.parametrize("name", TRUSTED)
def test_the_reference_s_pass_in_two_processes(results, tmp_path, name):
    options = {key: TRUSTED[name].get(key, value) for key, value in EXACT.items()}
    expected = train("judged", "16", tmp_path, strategy="trust", **options)
    rows = expected.scores.to_arrow().to_pydict()
    for column in ("sample_id", "ref_loss", "ref_trust", "relative_weight"):
        assert results[name, 0]["rows"][column] == pytest.approx(rows[column], rel=1e-4, abs=1e-6), column
    assert max(rows["ref_trust"]) - min(rows["ref_trust"]) > 0.05
    assert_same(results[name, 0], steps_of(expected), tolerance=1e-6)


def test_device_scope_averages_over_processes(results, alone):
    expected = alone("vit", "16", weight_scope="device", **EXACT)
    assert difference(results["device", 0]["gradients"][0], expected[0]) > 1e-2  # not one softmax over 16
    assert results["device", 0]["gradients"][0].keys() == expected[0].keys()
    assert difference(results["device", 0]["gradients"][0], results["device", 1]["gradients"][0]) == 0


def test_three_epochs_end_with_the_same_weights_and_logs(results, alone, tmp_path):
    options = {
        "double": True,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "num_train_epochs": 3,
        "logging_steps": 1,
    }
    expected = train("vit", "16", tmp_path, **options)
    for name, weight in expected.model.state_dict().items():
        torch.testing.assert_close(results["trajectory", 1]["weights"][name], weight, rtol=1e-7, atol=1e-9)
    for ours, theirs in zip(results["trajectory", 0]["log"][:-1], expected.state.log_history[:-1], strict=True):
        assert ours | {"epoch": 0} == pytest.approx(theirs | {"epoch": 0}, rel=1e-6)


def test_scores_and_weights_of_two_processes(results, tmp_path):
    ours, theirs = results["vit 2p4x2", 0]["rows"], train("vit", "16", tmp_path, **EXACT).scores.to_arrow().to_pydict()
    for name in ("sample_id", "step", "epoch", "loss", "mimic_score", "relative_weight"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert results["vit 2p4x2", 1]["rows"] == ours


@pytest.mark.parametrize("split", ["2p8", "2p4x2"])
def test_the_self_check_sees_both_processes(results, split):
    for rank in (0, 1):
        assert "GradientMismatchError: <gradient, v> must equal" in results[f"scaled {split}", rank]["error"]
        assert "The gradient is 2 times too large" in results[f"scaled {split}", rank]["error"]


# ---- runs that choose ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOOSING)
def test_every_process_knows_the_same_of_every_sample(results, name):
    ours, theirs = (results[f"choosing {name}", rank] for rank in (0, 1))
    assert "failed" not in ours, ours["failed"]
    assert len(ours["histories"]) == len(theirs["histories"]) >= 5
    for mine, yours in zip(ours["histories"], theirs["histories"], strict=True):
        assert mine.keys() == yours.keys()
        assert all(torch.equal(mine[key].nan_to_num(-1), yours[key].nan_to_num(-1)) for key in mine)
    assert len(ours["histories"][-1]["ids"]) == 44
    assert ours["rows"] == theirs["rows"]


def test_histories_of_their_own_would_differ(results):
    """The control: nothing is gathered, as in the official code."""
    mine, yours = (results["choosing apart", rank]["histories"][0] for rank in (0, 1))
    assert not torch.equal(mine["ids"], yours["ids"])


@pytest.mark.parametrize("name", CHOOSING)
def test_nothing_is_trained_on_twice(results, name):
    rows = results[f"choosing {name}", 0]["rows"]
    trained = [x is not None for x in rows["relative_weight"]]
    keys = [(e, i) for e, i, t in zip(rows["epoch"], rows["sample_id"], trained, strict=True) if t]
    assert len(set(keys)) == len(keys)
    first, second = (len([key for key in keys if key[0] == epoch]) for epoch in (0, 1))
    assert first == (44 if name != "dissect momentum" else second)  # the first epoch is on all
    assert 20 <= second <= 36


# ---- resuming, and processes that are lost -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["3", "5", "8", "in order", "accumulated", "stream", "dissect warmup", "dissect epoch", "info_batch"]
)
def test_two_processes_resume_exactly(results, name):
    for rank in (0, 1):
        result = results[f"resumed {name}", rank]
        assert "failed" not in result, result["failed"]
        (weights, rows), (expected, expected_rows) = result["resumed"], result["whole"]
        assert rows == expected_rows
        assert all(torch.equal(weights[key], value) for key, value in expected.items())
        assert not [text for text in result["warnings"] if "starts over" in text]


def test_dispatched_batches_restart_the_epoch(results):
    result = results["resumed dispatch", 0]
    assert [text for text in result["warnings"] if "epoch 1 starts over" in text]
    assert len(result["resumed"][1]["step"]) == len(result["whole"][1]["step"]) + 16


def test_one_process_goes_on_where_two_were(results, folder):
    """Killed at step 5 of 9, in the second epoch; alone an epoch has six steps."""
    trainer = trainer_of(folder / "resumed 5" / "left", save_steps=1)
    with pytest.warns(
        UserWarning, match=r"made with {'processes': 2, .* goes on with {'processes': 1, .*epoch 1 starts"
    ):
        trainer.train(resume_from_checkpoint=True)
    rows = trainer.scores.to_arrow().to_pydict()
    assert trainer.state.global_step == 5 + 2 * 6
    assert rows["sample_id"][:ROWS] == results["resumed 5", 0]["whole"][1]["sample_id"][:ROWS]
    assert len(rows["step"]) == ROWS + 16 + 2 * ROWS


@pytest.mark.parametrize(("how", "seconds"), [("dies", 5), ("sleeps", 15)])
def test_the_others_end_when_a_process_is_lost(tmp_path, how, seconds):
    """`ddp_timeout` is 5 seconds: the survivor ends with an error and does not wait for ever."""
    torch.save([("lost", "loses_a_process", {"how": how})], tmp_path / "jobs.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(tmp_path / "jobs.pt"), str(tmp_path)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **address, "RANK": str(r), "LOCAL_RANK": str(r)}, **options)
        for r in (0, 1)
    ]
    try:
        while not (tmp_path / "lost").exists() and ranks[0].poll() is None:
            time.sleep(0.05)
        output, _ = ranks[0].communicate(timeout=seconds)
        assert ranks[0].returncode != 0
        assert "Connection" in output or "timeout" in output or "Timed out" in output
        assert (ranks[1].wait() == -9) if how == "dies" else (ranks[1].poll() is None)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


# ---- corpora -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "clip"])
def test_two_processes_score_a_corpus_as_one(results, tmp_path, family):
    corpora.score_corpus(corpora.make_pass(family), tmp_path)
    expected = corpora.scores_of(tmp_path)
    for rank in (0, 1):
        result = results[f"corpus {family}", rank]
        assert "failed" not in result, result["failed"]
        assert result["found"] == (0, 44, 11, 0)
        for name in ("whole", "shards"):
            assert result[name] == expected


def test_an_error_of_the_first_process_is_raised_in_all(results):
    for rank in (0, 1):
        assert "`batch_size` was 4 and is 2" in results["corpus error", rank]["error"]


# ---- FSDP2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", list(jobs_of_sharded_scores()), ids=lambda options: " ".join(map(str, options.values()))
)
def test_scores_of_sharded_models(results, options):
    for rank in (0, 1):
        result = results[" ".join(map(str, options.values())), rank]
        assert "failed" not in result, result["failed"]
        assert result["scores"] < (0.05 if options.get("low") else 1e-5)
        assert result["norm"] < 1e-5
        assert result["same"]
        assert result["clean"]
    assert max(results[" ".join(map(str, options.values())), rank]["control"] for rank in (0, 1)) > 0.1


@pytest.mark.parametrize("name", ["head", "last_mlp", "last_block", "all", "accumulated"])
def test_sharded_parameters(results, tmp_path, name):
    layers = "last_block" if name == "accumulated" else name
    result, expected = results[f"sharded {name}", 0], train("vit", "16", tmp_path, mimic_layers=layers)
    assert result["units"] > 1
    assert_same(result, steps_of(expected), tolerance=1e-5)
    rows = expected.scores.to_arrow().to_pydict()
    assert result["rows"]["sample_id"] == rows["sample_id"]
    assert result["rows"]["mimic_score"] == pytest.approx(rows["mimic_score"], rel=1e-5, abs=1e-6)


def test_a_broken_sample_of_a_sharded_model(results, tmp_path):
    expected = train("vit", "16", tmp_path, mimic_layers="last_block", broken=[9])
    assert_same(results["sharded broken", 0], steps_of(expected), tolerance=1e-5)


def test_a_sharded_batch_without_a_finite_sample(results):
    for rank in (0, 1):
        message = "every process must have samples with finite losses when parameters are sharded"
        assert message in results["sharded hopeless", rank]["error"]


def test_the_comparison_can_fail(alone):
    whole, other = alone("vit", **EXACT), alone("vit", **EXACT, mimic_layers="all")
    assert difference(other[0], whole[0]) > 1e-2
    assert make("vit", torch.float64)[0].dtype == torch.float64
