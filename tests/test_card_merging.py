"""Cards are merged without losing what a person wrote, wherever it stands."""

import itertools
import random
import re

import pytest
import yaml

from hf_mimic.card_merging import EDITED, mark_sections, merge_card

META = "---\nlicense: mit\ntags:\n- hf_mimic\nconfigs:\n- config_name: default\n---\n\n"
FRESH = META + mark_sections(
    "# you/clean\n\nIntro.\n\n## What\n\nTwo.\n\n## Use\n\n```bash\n## no heading\n```\n\n## Cite\n\nThem.\n"
)
LATER = META + mark_sections("# you/clean\n\nIntro 2.\n\n## What\n\nThree.\n\n## New\n\nnew\n\n## Cite\n\nThem.\n")


def headings(card):
    return [line for line in card.split("\n") if re.match("#{1,2} ", line) and line != "## no heading"]


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def merged(existing, fresh=FRESH):
    """Merge, and check that once more changes nothing and no word of a person is lost."""
    card = merge_card(existing, fresh)
    assert merge_card(card, fresh) == card
    ours = set(FRESH.split()) | set(LATER.split())
    assert {word for word in existing.lstrip("\ufeff").split() if word not in ours} <= {*card.split(), "<!--", "-->"}
    return card


@pytest.mark.parametrize("existing", [None, "", " \n", "\ufeff\n"])
def test_without_a_card_the_fresh_one_is_the_card(existing):
    assert merge_card(existing, FRESH) == FRESH
    assert merge_card(FRESH, FRESH) == FRESH


def test_sections_that_we_wrote_are_replaced_and_those_that_are_gone_left_out():
    card = merged(FRESH, LATER)
    assert card == LATER
    assert "Two." not in card


def test_sections_of_a_person_stay_where_they_are():
    existing = FRESH.replace("## Use", "## Mine\n\nmy own words\n\n## Use") + "\n## Last\nwords"
    card = merged(existing, LATER)
    assert headings(card) == ["# you/clean", "## What", "## New", "## Mine", "## Cite", "## Last"]
    assert "## Last\nwords\n" in card


def test_a_section_of_ours_that_was_edited_is_kept_behind_the_fresh_one():
    card = merged(FRESH.replace("Two.", "Two, and mine."), LATER)
    assert headings(card) == ["# you/clean", "## What", f"## What{EDITED}", "## New", "## Cite"]
    assert "Three.\n\n## What (edited by hand)\n\nTwo, and mine.\n" in card


def test_a_second_edit_is_kept_beside_the_first():
    once = merged(FRESH.replace("Two.", "first edit"))
    twice = merged(once.replace("Two.", "second edit"), LATER)
    assert twice.count(f"## What{EDITED}") == 2
    assert "first edit" in twice
    assert "second edit" in twice


def test_an_edited_section_that_is_no_longer_ours_is_kept():
    card = merged(FRESH.replace("```bash", "my note\n\n```bash"), LATER)
    assert f"## Use{EDITED}" in card
    assert "my note" in card


def test_an_edit_that_says_what_we_say_now_is_no_edit():
    assert merged(FRESH.replace("Two.", "Three.").replace("Intro.", "Intro 2."), LATER) == LATER


def test_spaces_at_the_ends_of_lines_are_no_edit():
    assert merged(FRESH.replace("Two.", "Two.  ").replace("Them.\n", "Them. \n\n\n"), LATER) == LATER


def test_the_title_of_a_person_stays():
    card = merged(FRESH.replace("# you/clean", "# My data\n\nA line."), LATER)
    assert headings(card)[0] == "# My data"
    assert card.index("A line.") < card.index("Intro 2.")
    assert "Intro.\n" not in card


def test_the_text_before_the_first_heading_is_the_persons_if_it_is_not_ours():
    card = merged("---\nlicense: mit\n---\nSome words.\n\n## Mine\n\nmore")
    assert headings(card) == ["## Mine", "## What", "## Use", "## Cite"]
    assert card.index("Some words.") < card.index("Intro.") < card.index("## Mine")


def test_an_edited_introduction_becomes_a_section():
    card = merged(FRESH.replace("Intro.", "Intro, and my words."), LATER)
    assert headings(card)[:2] == ["# you/clean", f"## you/clean{EDITED}"]
    assert "Intro 2.\n\n## you/clean (edited by hand)\n\nIntro, and my words.\n" in card


def test_headings_in_fences_and_comments_are_none():
    mine = "## Mine\n\n~~~~\n## no\n```\n~~~\n## no\n~~~~\n\n<!-- a\n\n## no\n-->\n\n    ## no\n\nend"
    card = merged(f"# T\n\n{mine}\n")
    assert mine in card


@pytest.mark.parametrize("opened", ["```python\nx = 1", "~~~~\n~~~", "<!-- never\n\n## closed"])
def test_what_is_open_at_the_end_does_not_swallow_our_sections(opened):
    card = merged(f"# T\n\n## Mine\n\n{opened}\n")
    assert headings(card)[-3:] == ["## What", "## Use", "## Cite"]
    assert opened in card
    assert headings(merged(f"{opened}\n"))[-3:] == ["## What", "## Use", "## Cite"]


def test_line_ends_stay_those_of_the_card():
    unix = merged("# T\n\n## Mine\n\nwords\n")
    windows = merged("# T\r\n\r\n## Mine\r\n\r\nwords\r\n")
    assert windows == unix.replace("\n", "\r\n")
    assert merged(windows, LATER) == merged(unix, LATER).replace("\n", "\r\n")
    assert merged("# T\r\r\n\r## Mine\n") == merged("# T\n\n## Mine\n")


def test_a_byte_order_mark_hides_nothing():
    card = merged("\ufeff---\nlicense: apache-2.0\n---\n# T\n")
    assert metadata(card)["license"] == "apache-2.0"
    assert "\ufeff" not in card


def test_headings_that_occur_twice():
    existing = FRESH.replace("## Use", "## What\n\nmy What\n\n## Use") + "\n## What\n\nmine, too\n"
    card = merged(existing, LATER)
    assert headings(card).count("## What") == 3
    assert card.count("Three.") == 1


def test_a_copy_of_our_section_is_dropped_unless_it_was_edited():
    section = FRESH[FRESH.index("## What") : FRESH.index("## Use")]
    assert merged(FRESH + "\n" + section, LATER) == LATER
    card = merged(FRESH + "\n" + section.replace("Two", "My two"), LATER)
    assert "My two." in card


def test_a_card_of_push_to_hub_gets_our_sections():
    existing = "---\ndataset_info:\n  features: []\nconfigs:\n- config_name: hf_mimic\n---\n"
    card = merged(existing)
    assert card.endswith(FRESH[len(META) :])
    assert metadata(card)["configs"] == [{"config_name": "default"}]
    assert metadata(card)["dataset_info"] == {"features": []}


def test_a_card_without_metadata_gets_ours():
    card = merged("# T\n\ntext\n")
    assert card.startswith(META)
    assert merged("text only").startswith(META)
    assert merged("---\n---\n# T\n").startswith(META + "# T")


def test_every_order_of_words_and_marks_is_merged_idempotently():
    pieces = ["# T", "## A", "## What", "<!-- hf_mimic:00000000 -->", "```", "~~~", "text", "", "<!--", "-->", "---"]
    rng = random.Random(0)
    for _ in range(300):
        existing = "# T\n" + "\n".join(rng.choices(pieces, k=8)) + "\n"
        card = merge_card(existing, FRESH)
        assert merge_card(card, FRESH) == card, existing
        again = merge_card(card, LATER)
        assert merge_card(again, LATER) == again, existing
        for heading in ("## What", "## New", "## Cite"):
            assert heading in again


def test_every_deletion_of_our_sections_is_mended():
    parts = re.split("(?m)^(?=## (?!no))", FRESH)
    for kept in itertools.product([False, True], repeat=3):
        existing = parts[0] + "".join(p for p, keep in zip(parts[1:], kept, strict=True) if keep)
        assert merged(existing) == FRESH


def test_a_fresh_card_without_marks_is_marked():
    plain = re.sub("<!-- hf_mimic:.* -->\n\n", "", FRESH)
    card = merge_card(None, plain)
    assert card.count("<!-- hf_mimic:") == 4
    assert merge_card(card, plain) == card


# ---- metadata --------------------------------------------------------------------------------------------------------

OWN = "# what it is\nlicense: apache-2.0 # ours\nlanguage: [no, en]\npretty_name: 'Größe, 雪'\nversion: 1.10\n"


def test_metadata_of_a_person_stay_to_the_letter():
    card = merged(f"---\n{OWN}tags:\n- mine # because\n- hf_mimic\nconfigs:\n- config_name: default # set\n---\n")
    assert f"---\n{OWN}tags:\n- mine # because\n- hf_mimic\nconfigs:\n- config_name: default # set\n---\n" in card


def test_tags_are_united_and_comments_stay():
    card = merged(f"---\ntags:\n# of mine\n- snow\n{OWN}---\n")
    assert metadata(card)["tags"] == ["snow", "hf_mimic"]
    assert "# of mine\n" in card
    assert OWN.rstrip() in card
    assert metadata(merged("---\ntags: snow\n---\n"))["tags"] == ["snow", "hf_mimic"]
    assert metadata(merged("---\ntags:\n---\n"))["tags"] == ["hf_mimic"]


def test_a_value_of_a_person_goes_before_ours_but_for_what_we_compute():
    fresh = "---\nlicense: mit\nbase_model: new/base\ndatasets:\n- new/data\n---\n\n# T\n"
    card = merge_card("---\nlicense: other\nbase_model: old/base\ndatasets: [old/data]\n---\n", fresh)
    assert metadata(card) == {"license": "other", "base_model": "new/base", "datasets": ["new/data"]}
    assert metadata(merge_card("---\nlicense:\n---\n", fresh))["license"] == "mit"


def index(name, *results):
    return {"name": name, "results": list(results)}


def result(value, source=None):
    given = {"task": {"type": "t"}, "dataset": {"type": "d", "name": "d"}, "metrics": [{"type": "a", "value": value}]}
    return given if source is None else {**given, "source": {"name": source, "url": "https://host.org"}}


def with_index(*entries):
    return f"---\n{yaml.safe_dump({'model-index': list(entries)} if entries else {'a': 1})}---\n\n# T\n"


def test_our_results_are_replaced_and_those_of_others_kept():
    fresh = with_index(index("new", result(3, "hf_mimic")))
    card = merge_card(with_index(index("old", result(1), result(2, "hf_mimic")), index("b", result(5))), fresh)
    assert metadata(card)["model-index"] == [index("old", result(1), result(3, "hf_mimic")), index("b", result(5))]
    assert merge_card(card, fresh) == card


def test_results_of_ours_that_are_no_longer_known_are_left_out():
    assert "model-index" not in metadata(merge_card(with_index(index("old", result(2, "hf_mimic"))), with_index()))
    kept = merge_card(with_index(index("old", result(1), result(2, "hf_mimic"))), with_index())
    assert metadata(kept)["model-index"] == [index("old", result(1))]


@pytest.mark.parametrize(
    "text",
    [
        "{license: other, extra: {a: 1}}",
        "extra: &x {a: 1}\nlicense: other\nmore: *x",
        "? license\n: other\n? extra\n: {a: 1}",
    ],
)
def test_metadata_in_rare_forms_lose_no_value(text):
    card = merge_card(f"---\n{text}\n---\n", FRESH)
    found = metadata(card)
    assert (found["license"], found["extra"], found["tags"]) == ("other", {"a": 1}, ["hf_mimic"])
    assert merge_card(card, FRESH) == card


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b: c", r"the metadata of a card must be YAML, got what cannot be read \(mapping values"),
        ("just words", "must be `key: value` lines, got 'just words'. Correct the README.md of the repo"),
        ("- a\n- b", "must be `key: value` lines"),
    ],
)
def test_metadata_that_cannot_be_read_are_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        merge_card(f"---\n{text}\n---\n# T\n", FRESH)
