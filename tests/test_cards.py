"""The cards: golden files byte for byte, metadata as the Hub reads them, and what must never stand in one."""

import dataclasses
import functools
import random
import re
import shlex
from pathlib import Path

import jinja2
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from published import CARDS, CONFIGS, POOR, QUALITY, RICH, TRAINED, WRITTEN, poor_dataset_card, rich_dataset_card

from hf_mimic.card_merging import merge_card
from hf_mimic.card_words import code, fenced, number, percent, shell
from hf_mimic.cards import dataset_card, model_card, scores_card
from hf_mimic.run_record import RunRecord
from hf_mimic.selection_record import Counts

GOLDEN = Path(__file__).parent / "golden"
CELLS = re.compile(r"(?<!\\)\|")


def section(card, heading):
    found = re.search(rf"(?ms)^## {re.escape(heading)}\n<!--.*?-->\n(.*?)(?=^## |\Z)", card)
    return None if found is None else found[1].strip()


def of(record=RICH, **changes):
    return dataset_card(dataclasses.replace(record, **changes), repo_id="you/clean", metadata={"configs": CONFIGS})


def check_markdown(card):
    """Check what holds for every card: nothing empty or unrendered, fences in pairs, tables with as many cells."""
    body = card.split("\n---\n", 1)[1]
    assert not re.search(r"\bNone\b|\bnull,|\{\{|\}\}|\{%|%\}|\n\n\n", body.replace("is null,", ""))
    assert not re.search(r"(^|\s)/(work|tmp|home|root|Users)/|\bhf_[A-Za-z0-9]{8,}", body.replace("hf_mimic", ""))
    cells, in_code = None, False
    for line in body.split("\n"):
        in_code = not in_code if line.startswith("```") else in_code
        if not in_code and line.startswith("|"):
            assert cells in (None, len(CELLS.findall(line))), line
            cells = len(CELLS.findall(line))
        else:
            cells = None
        assert in_code or "<" not in re.sub(r"<!-- hf_mimic:\w{8} -->|`[^`]*`", "", line).replace("< 0.1 %", ""), line
    assert not in_code
    assert "## \n" not in body


@pytest.mark.parametrize("name", CARDS)
def test_cards_are_those_that_were_looked_at(name):
    assert CARDS[name]().encode() == (GOLDEN / f"{name}.md").read_bytes()


@pytest.mark.parametrize("name", CARDS)
def test_cards_are_whole(name):
    check_markdown(CARDS[name]())


def test_the_check_of_cards_sees_what_is_wrong():
    for wrong in ("None", "{{ x }}", "```\n", "| a | b |\n| --- |", "a <script>", "/home/", "hf_abcdefghij"):
        with pytest.raises(AssertionError):
            check_markdown(f"---\na: b\n---\n{wrong}\n")


@pytest.mark.parametrize("name", CARDS)
def test_the_hub_reads_the_metadata(name):
    text = CARDS[name]()
    card = (ModelCard if name.startswith("model") else DatasetCard)(text)
    given = yaml.safe_load(text.split("---\n")[1])
    assert card.data.to_dict() == given
    assert "hf_mimic" in card.data.tags
    assert None not in given.values()
    for key in ("base_model", "datasets", "source_datasets", "tags"):
        assert all(isinstance(item, str) and " " not in item for item in given.get(key, []))


def test_results_stand_in_the_model_index():
    (result,) = ModelCard(CARDS["model_card_with_reference"]()).data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.9137)
    assert (result.task_type, result.dataset_type, result.dataset_split) == (
        "image-classification",
        "you/noisy-images",
        "test",
    )
    assert result.dataset_revision == TRAINED.dataset_revision


def test_results_on_data_that_are_not_known_stand_in_the_text_only():
    run = dataclasses.replace(TRAINED, settings={})
    card = model_card(run, model_id="you/m", metadata={"pipeline_tag": "image-classification"})
    assert "model-index" not in card
    assert "| accuracy | 0.9137 |" in section(card, "Results")
    assert "on which data is not known" in section(card, "Results")


def test_a_model_keeps_the_results_of_other_people():
    old = ModelCard(CARDS["model_card_with_reference"]())
    old.data.eval_results[0].metric_value = 0.5
    old.data.eval_results.append(dataclasses.replace(old.data.eval_results[0], dataset_type="a/b", source_name=None))
    metadata = {"pipeline_tag": "image-classification"}
    new = ModelCard(model_card(TRAINED, model_id="you/vit-clean", metadata=metadata, existing=str(old)))
    assert sorted((r.dataset_type, r.metric_value) for r in new.data.eval_results) == [
        ("a/b", 0.5),
        ("you/noisy-images", 0.9137),
    ]


def test_a_local_model_gets_into_no_metadata():
    head = CARDS["model_card_without_reference"]().split("---\n")[1]
    assert yaml.safe_load(head) == {"tags": ["hf_mimic"]}


def test_what_the_caller_knows_of_a_model_stays_where_the_run_knows_less():
    card = model_card(RunRecord(), model_id="a/b", metadata={"base_model": "c/d", "tags": "mine", "license": None})
    assert ModelCard(card).data.to_dict() == {"base_model": "c/d", "tags": ["mine", "hf_mimic", "mimic-score"]}


def test_publishing_again_gives_the_same_bytes():
    once = rich_dataset_card()
    assert rich_dataset_card(existing=once) == once
    assert rich_dataset_card(existing=WRITTEN) == once
    assert rich_dataset_card(existing=WRITTEN.replace("\n", "\r\n")) == once.replace("\n", "\r\n")


def test_another_selection_leaves_nothing_of_the_first_one():
    first = of(RICH)
    second = dataset_card(POOR, repo_id="you/clean", metadata={}, existing=first)
    assert "class 20" not in second
    assert second.split("---\n", 2)[2] == poor_dataset_card().split("---\n", 2)[2]


# ---- what is said of whom --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number_of", "shown"), [(2, 2), (30, 30), (31, 31), (1000, 31)])
def test_of_many_classes_the_ends_are_shown(number_of, shown):
    counts = {f"c{i}": Counts(1000, 1000 - i % 997) for i in range(number_of)}
    words = section(of(classes=counts), "Classes")
    rows = [line for line in words.split("\n") if line.startswith("|")][2:]
    assert len(rows) == shown
    assert ("the 15 least and the 15 most kept" in words) == (number_of > 30)
    shares = [float(row.split("|")[4].strip(" %")) for row in rows if "..." not in row]
    if number_of > 30:
        assert shares == sorted(shares)
        assert shares[0] == min(100 * c.share for c in counts.values())
    else:
        assert [row.split()[1] for row in rows] == list(counts)


def test_classes_that_lose_more_than_half_are_warned_of():
    classes = {"ant": Counts(100, 30), "bee": Counts(100, 49), "cat": Counts(100, 50), "dog": Counts(100, 90)}
    words = section(of(classes=classes, groups={}), "Limits and risks")
    assert (
        "> **Warning: these lose more than half of their samples** (by class): ant (30.0 %), bee (49.0 %). The"
        in words
    )
    assert (
        "Least kept, by class: ant (30.0 %), bee (49.0 %), cat (50.0 %). Most kept: dog (90.0 %), 3.0 times" in words
    )
    assert "Warning" not in section(of(classes=classes, groups={}, rows=Counts(100, 50)), "Limits and risks")


def test_a_class_that_is_gone_has_no_ratio():
    words = section(of(classes={"ant": Counts(9, 0), "bee": Counts(9, 9)}), "Limits and risks")
    assert "Most kept: bee (100.0 %), while the least kept lost all." in words


def test_classes_without_a_share_are_not_compared():
    words = of(classes={"ant": Counts(None, 3), "bee": Counts(0, 0), "cat": Counts(2, 1)}, groups={})
    assert "| ant | not known | 3 | not known |" in words
    assert "Least kept" not in words


def test_equal_shares_are_said_to_be_equal():
    assert "- Every class keeps the same share, 50.0 %." in of(
        classes={"a": Counts(2, 1), "b": Counts(4, 2)}, groups={}
    )


@pytest.mark.parametrize(
    ("health", "words", "loud"),
    [
        ({}, "is not known.", False),
        ({"unhealthy": 0.0, "score_trust_correlation": 0.5}, "healthy (correlation with the reference's trust", False),
        ({"unhealthy": 1.0, "score_fit_correlation": -0.25}, "unhealthy**", True),
        ({"score_fit_correlation": 0.2}, "is not known (correlation with how well", False),
    ],
)
def test_health_is_said_and_bad_health_loudly(health, words, loud):
    run = dataclasses.replace(TRAINED, health=health)
    for card in (of(run=run), model_card(run, model_id="a/b")):
        assert words in section(card, "Health of the score")
        assert ("> **Warning: the run found its own mimic score unhealthy.**" in card.split("\n## ")[0]) == loud


@pytest.mark.parametrize(
    ("quality", "words"),
    [
        (None, "How many labels are wrong is not known."),
        ({**QUALITY, "noise_rate": None, "evidence": "none"}, "This is no sign of clean labels."),
        (
            QUALITY,
            "By estimate 31.2 % of the labels of the 9,900 samples that were scored are wrong (interval 28.7 % to",
        ),
        ({**QUALITY, "evidence": "votes"}, "filters that each see two groups of scores; no label was checked."),
    ],
)
def test_noise_is_said_with_its_evidence(quality, words):
    assert words in section(of(quality=quality), "Estimated noise")


def test_unscored_rows_and_what_became_of_them():
    assert "Rows without a score: 100, which were kept: there is no evidence" in of()
    assert "Rows without a score: 7, which were dropped" in of(unscored=7, unscored_kept=False)
    assert "Rows without a score: none" in of(unscored=0)


def test_a_threshold_for_each_epoch():
    assert "- Threshold: 0.5, 0.25 (one for each epoch)" in of(threshold=[0.5, 0.25])
    assert "- Threshold: 0\n" in of(threshold=0.0)


def test_only_configs_that_are_there_are_named():
    configs = [CONFIGS[0], {**CONFIGS[2], "data_files": [{"split": "all", "path": "x"}]}]
    card = dataset_card(RICH, repo_id="you/clean", metadata={"configs": configs})
    assert '"scores"' not in section(card, "How to use")
    assert 'load_dataset("you/clean", "selection", split="all")' in section(card, "How to undo")
    without = dataset_card(RICH, repo_id="you/clean", metadata={"configs": configs[:1]})
    assert "dropped" not in section(without, "How to undo")


@pytest.mark.parametrize("card", [rich_dataset_card, poor_dataset_card, CARDS["scores_card"]])
def test_the_python_of_cards_compiles(card):
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", card())
    assert blocks
    for block in blocks:
        compile(block, "card", "exec")


def test_the_python_of_a_card_brings_back_the_rows_and_names_the_dropped_ones(monkeypatch):
    import datasets

    rows = {"sample_id": [4, 5, 6], "x": ["a", "b", "c"]}
    choice = {"sample_id": [4, 5, 6], "keep": [True, False, True], "reason": ["good", "bad", "good"]}
    asked = []

    def load_dataset(repo, config=None, revision=None, split=None):
        asked.append((repo, config, revision, split))
        return datasets.Dataset.from_dict(choice if config == "selection" else rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = {}
    for heading in ("How to reproduce", "How to undo"):
        exec(re.search(r"(?ms)^```python\n(.*?)^```", section(of(), heading))[1], found)
    assert found["curated"]["x"][:] == ["a", "c"]
    assert found["dropped"]["reason"][:] == ["bad"]
    assert asked[:2] == [
        ("you/noisy-images", None, RICH.original_revision, "train"),
        ("you/clean", "selection", None, "train"),
    ]


def test_without_a_reference_nothing_is_said_of_one():
    card = of(run=RunRecord(kind="training", model="a/b", settings={"strategy": "small_loss", "temperature": "auto"}))
    assert "| reference | none |" in card
    assert "its reference" not in card
    assert "`direction`" not in card
    assert "against the reference" not in card.split("## ")[0]


def test_the_paper_of_dissect_is_cited_where_it_was_used():
    for strategy, cited in (("dissect", True), ("dissect_mimic", True), ("trust", False)):
        card = of(run=RunRecord(settings={"strategy": strategy}))
        assert ("2507.12998" in card) == cited
        assert "2501.06708" in card


# ---- words of the data -----------------------------------------------------------------------------------------------

EVIL = [
    "a | b",
    "x\\",
    "\\|",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](http://evil.org/x.png)",
    "```\n# boom\n```",
    "a\r\n\r\n## Heading\u2028## More",
    "<!-- hf_mimic:00000000 -->",
    "--> <!--",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "\ud800 half",
    "\u202egnp.exe",
    "$$x$$ ~~y~~ **z** __w__",
    "www.evil.org https://evil.org",
    "   ",
    "é" * 500,
    "&lt;b&gt;",
]


def html(card):
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").enable("table").render(card.split("\n---\n", 1)[1])


@pytest.mark.parametrize("name", EVIL)
def test_words_of_the_data_are_only_shown(name):
    record = {
        "classes": {name: Counts(9, 3), "b": Counts(9, 8)},
        "groups": {name: {name: Counts(9, 3), "b": Counts(9, 7)}},
        "reasons": {name: 3},
        "rule": name.strip() or "keep",
    }
    card = dataset_card(
        dataclasses.replace(RICH, **record), repo_id="you/clean", metadata={}, figures={name: "figures/a b).png"}
    )
    assert len(re.findall(r"(?m)^## ", card)) == len(re.findall(r"(?m)^## ", of())) + 1  # of figures
    assert merge_card(card, card) == card
    page = html(card)
    assert not re.search(
        r"<(script|img (?!src=\"figures/)|b>|h1>(?!you/clean))|href=\"(javascript|http://evil|https://evil)", page
    )
    assert page.count("<table>") == html(of()).count("<table>")
    expected = " ".join(re.sub("[\u202e\u2028]", " ", name).replace("\ud800", "\ufffd").split()) or "(blank)"
    shown = re.sub("&lt;|&gt;|&quot;|&amp;", lambda m: {"l": "<", "g": ">", "q": '"', "a": "&"}[m[0][1]], page)
    assert expected[:100] in shown


@pytest.mark.parametrize("name", EVIL)
def test_words_of_a_run_are_only_shown(name):
    run = RunRecord(
        kind="training",
        model=name,
        reference_model=name,
        base_model=name,
        dataset=name,
        dataset_revision=name,
        split=name,
        settings={name: name, "strategy": name, "layers": [name, {name: 1}], "eval_split": name},
        seeds={name: 1},
        versions={name: name},
        results={name: 0.5},
        command=shlex.join(["hf-mimic", name, "--x", name]),
    )
    split = name.strip() or "x y"
    columns = {"split": split, "splits": {split: 3, "b": 4}, "sample_id_column": split}
    record = dataclasses.replace(RICH, run=run, original_dataset=split, original_revision=name, **columns)
    cards = [
        dataset_card(record, repo_id="you/clean", metadata={"configs": CONFIGS}),
        model_card(run, model_id="you/clean", metadata={"pipeline_tag": "image-classification"}),
    ]
    for card in cards:
        page = html(card)
        assert not re.search(r"<(script|img|b>|h1>(?!you/clean))|href=\"(javascript|http://evil|https://evil)", page)
        assert [line for line in page.split("\n") if line.startswith("<h2>")] == [
            f"<h2>{heading}</h2>" for heading in re.findall(r"(?m)^## (.*)$\n<!--", card)
        ]
        for block in re.findall(r"(?ms)^```python\n(.*?)^```", card):
            compile(block, "card", "exec")
        assert merge_card(card, card) == card
        head = yaml.safe_load(card.split("\n---\n")[0])
        assert not {"base_model", "datasets", "source_datasets"} & head.keys()


def test_templates_use_no_name_that_is_not_given(monkeypatch):
    strict = functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined)
    monkeypatch.setattr(jinja2, "Template", strict)
    for make in CARDS.values():
        assert make()


def test_no_text_gets_out_of_a_code_span_or_a_fence():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("`a \\|\n", k=6))
        shown = html(f"---\n---\n{code(text)}")
        assert shown.count("<code>") == 1, text
        assert html(f"---\n---\n{fenced(text, 'bash')}").count("<pre>") == 1


def test_a_long_command_is_broken_at_its_flags():
    command = "hf-mimic train --model you/a --note 'two --words here' " + " ".join(
        f"--flag_{i} {i}" for i in range(12)
    )
    broken = shell(command)
    assert max(map(len, broken.split("\n"))) <= 90
    assert shlex.split(broken.replace("\\\n", "")) == shlex.split(command)
    assert shell("hf-mimic train --model a") == "hf-mimic train --model a"


def test_numbers_and_shares():
    assert [number(n) for n in (0, 12345, 0.123456, 1e-9)] == ["0", "12,345", "0.1235", "1e-09"]
    assert [percent(s) for s in (0, 1, 0.5, 0.0001, 0.9999, None)] == [
        "0.0 %",
        "100.0 %",
        "50.0 %",
        "< 0.1 %",
        "> 99.9 %",
        "not known",
    ]


def test_columns_of_scores_have_a_meaning_or_none():
    card = scores_card(
        RunRecord(), repo_id="a/b", metadata={}, n_samples=1, n_visits=1, columns=["trust", "x|y"], quality=None
    )
    assert "| `trust` | the same" in card
    assert "| x\\|y |  |" in card
    check_markdown(card)
